"""The training loop, and what it needs to stop, resume and survive bad steps.

Read stage.py (a whole stage), early_checks.py (what is refused before torch is imported), start_or_resume.py (a new run, or
a resumed one), extend.py (a run that goes on longer than planned), loop.py (the loop), trainer.py (one step; saving and
resuming), state.py (what is saved). Then the files that these use: schedule.py (learning rate), optim.py, prefetch.py,
validation.py (a held-out loss), evaluations.py (when, and on how much), samples.py, compilation.py, progress.py, slowdown.py,
out_of_memory.py (which micro-batch fits). Bad steps: guard.py (finds outliers), rollback.py (goes back), skipped_steps.py
(records their documents). dry_run.py measures the speed and memory of a run.

A batch must never depend on anything but seed, step, rank and world size.
"""

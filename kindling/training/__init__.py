"""The training loop, and what it needs to stop, resume and survive bad steps.

Read stage.py (one stage as a whole), start_or_resume.py (its run, resumed or new), loop.py (the loop), trainer.py
(one step; saving and resuming), state.py (what is saved), then what these call: schedule.py (learning rate),
optim.py, prefetch.py, validation.py, compilation.py, progress.py. Bad steps: guard.py (which are), rollback.py (going
back), recorder.py (what was in them). dry_run.py measures what a run would take. A batch must never depend on more
than seed, step, rank and world size.
"""

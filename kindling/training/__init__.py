"""The training loop, and what it needs to stop, resume and survive bad steps.

Read start_or_resume.py (the run that is trained), trainer.py (the loop), schedule.py, optim.py, prefetch.py,
validation.py, guard.py and recorder.py (bad steps), dry_run.py (what a run would take). It must never make a batch
that depends on more than seed, step, rank and world size.
"""

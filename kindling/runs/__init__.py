"""A run's folder: config, tokenizer, metrics and checkpoints.

Read checkpoint.py (the folder and its checkpoints), loading.py (find a run, load its model), averaging.py (the mean of
several checkpoints), fsdp.py (models and checkpoints in parts), metrics.py (the log of a run). This package must never lose
what was saved, nor load a file whose checksum differs.
"""

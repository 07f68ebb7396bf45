"""A run's folder: config, tokenizer, metrics and checkpoints.

Read checkpoint.py (folders and checkpoints), fsdp.py (models and checkpoints in parts), metrics.py (the record of a
run). It must never lose what was saved, nor load a file whose checksum differs.
"""

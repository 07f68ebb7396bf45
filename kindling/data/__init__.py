"""From sources to the rows that a model is trained on.

Documents: sources.py, filters.py, duplicates.py, docstrings.py, workers.py, mixture.py, ledger.py, shards.py.
Instructions: prompts.py, conversations.py, examples.py, audit.py. A whole build: build.py and explain.py; split over machines:
parts.py, distributed_build.py. It must never drop anything without counting it, nor let the number of workers change
a byte.
"""

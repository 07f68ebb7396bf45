"""From sources to the rows that a model is trained on.

A build: build.py calls all the rest; preflight.py says before it what cannot be built. Documents: sources.py,
dataset_rows.py, workers.py, process_document.py, filters.py, generated.py, decontamination.py, docstrings.py, mixture.py,
duplicates.py, ledger.py, shards.py, atomic_folder.py. Fill-in-the-middle: infilling.py, packing.py. Instructions: prompts.py,
exported_templates.py, jinja_chat.py, conversations.py, examples.py, audit.py. What happened to a document: explain.py. A build
split over machines: build_in_parts.py, distributed_build.py.

It must never drop anything without counting it, nor let the number of workers change a byte.
"""

"""The server behind serve.py: a model for editors, OpenAI clients and a page in the browser.

Read in this order: generation.py (a request and what comes of it), engine.py (what a model must offer), scheduler.py (many
requests, one model). Nothing here imports torch, except the engine of runs in PyTorch.
"""

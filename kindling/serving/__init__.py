"""The server behind serve.py: a model for editors, OpenAI clients and a page in the browser.

Read in this order: generation.py (a request and what comes of it), engine.py (what a model must offer), scheduler.py (many
requests, one model), batch.py (a token for each of them), prefixes.py (which row a prompt gets), answer.py (tokens to the text
of an answer), edit.py (text at a cursor), counters.py (what was done). int8_engine.py and torch_engine.py are the engines.
Nothing here imports torch, except the engine of runs in PyTorch.
"""

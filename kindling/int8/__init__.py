"""The runtime without PyTorch, for autocomplete.py.

Read model.py (a model with int8 weights in NumPy) and cache.py, then kernel.py and kernel.c (the same in C). It
must never import torch.
"""

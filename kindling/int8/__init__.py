"""The runtime without PyTorch, for autocomplete.py.

Read model.py (a model with int8 weights in NumPy), then kernel.py and kernel.c (one token in C). It must never import torch.
"""

"""The runtime without PyTorch, for autocomplete.py.

Read model.py (a model of int8 weights in NumPy), kernel.py and kernel.c (one token in C). It must never import torch.
"""

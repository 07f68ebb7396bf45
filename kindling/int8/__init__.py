"""The runtime without PyTorch, for autocomplete.py and for serving exports.

Read model.py (a model with int8 weights in NumPy), cache.py, tokenizer.py and exports.py, then kernel.py and kernel.c (the
same in C). It must never import torch.
"""

"""Text from a trained model.

Read sampling.py (logits to a token), decoding.py (tokens after tokens), completion.py (text after text), healing.py,
chat.py, and inference.py (weights prepared for single tokens). It must never read a run's folder: it is given a model
and a tokenizer.
"""

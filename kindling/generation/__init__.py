"""Text from a trained model.

Read sampling.py (logits to a token), decoding.py (token ids after token ids), completion.py (text after text), healing.py
(prompts that end inside a word), chat.py (the chat in the terminal) and inference.py (weights prepared for generation). It
must never read a run's folder: callers pass a model and a tokenizer.
"""

"""Text to token ids and back.

Read handwritten_bpe.py (byte-level BPE by hand), tokenizer.py (one interface for all kinds), train_tokenizer.py (each kind is
trained), added_space.py (the space that some tokenizers add), pretrained.py (tokenizers of others), infilling.py (the control
tokens of fill-in-the-middle), then compare.py (kinds side by side). It must never turn a special token that is written in a
text into a control token: text is text.
"""

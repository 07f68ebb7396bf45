"""Text from a trained model.

Read settings.py (how the next token is chosen), sampling.py (logits to a token), numpy_sampling.py (the same without torch),
decoding.py (token ids after token ids), text_stream.py (tokens to text as they come), completion.py (text after text),
healing.py (prompts that end inside a word), chat.py (the chat in the terminal), inference.py (weights prepared for
generation) and int8_linear.py. It must never read a run's folder: callers pass a model and a tokenizer.
"""

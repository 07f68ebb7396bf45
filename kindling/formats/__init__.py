"""Models in the formats of other tools, and back.

Hugging Face: hf_layout.py, hf_format.py, modeling_kindling.py, model_card.py. llama.cpp: gguf_format.py.
autocomplete.py: int8_format.py. All are checked by parity.py. It must never leave an export that was not read back
and compared.
"""

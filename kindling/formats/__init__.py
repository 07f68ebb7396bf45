"""Models in the formats of other tools, and back.

For Hugging Face: hf_layout.py, hf_format.py, hf_import.py (other people's models), modeling_kindling.py, model_card.py. For
llama.cpp: gguf_format.py, and modelfile.py for Ollama. For autocomplete.py: int8_format.py. fold_weights.py turns a shape into
one that more of them hold. portability.py says which of them hold a preset. parity.py compares an export with its model. An
export must never be left without that comparison.
"""

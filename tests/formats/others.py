"""Small folders in the Hugging Face layout, as transformers itself writes them, for tests of other people's models."""

from pathlib import Path

import torch

# the turns of ChatML, as Qwen2 and many others have them
CHATML = (
    "{%- if messages[0].role == 'system' -%}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' -}}{%- endif -%}"
    "{%- for message in messages -%}{%- if message.role != 'system' -%}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
TEXT = "def add(a, b):\n    return a + b  # the sum of two numbers, as Python adds them\n" * 3
SHAPE = {
    "vocab_size": 320, "max_position_embeddings": 160, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {
    "vocab_size": 320,
    "n_positions": 160,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "eos_token_id": 0,
    "bos_token_id": 0,
}
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 32, "rope_theta": 1000.0}  # fmt: skip


def tokenizer(template: str | None = None, bos: bool = False):
    """Return a byte-level BPE of 300 tokens with ChatML's special tokens; `bos`: it begins each text with one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    named = {"bos_token": "<s>"} if bos else {}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>", **named
    )
    fast.chat_template = template
    return fast


def save(
    folder: Path, name: str, template: str | None = None, bos: bool = False, ends: tuple[int, ...] = (), shards=False,
    dtype=torch.float32, **settings,
) -> Path:  # fmt: skip
    """Write a random model of an architecture, such as "Qwen2", with its tokenizer into a new folder; return the folder."""
    import transformers

    torch.manual_seed(3)
    shape = GPT2 if name == "GPT2" else SHAPE
    cfg = getattr(transformers, f"{name}Config")(**{**shape, **settings})
    model = getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
    if ends:
        model.generation_config.eos_token_id = list(ends)
    model.to(dtype).save_pretrained(folder, **({"max_shard_size": "50KB"} if shards else {}))
    tokenizer(template, bos).save_pretrained(folder)
    return folder


def theirs(folder: Path):
    """Return a folder's model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

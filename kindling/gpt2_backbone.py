"""GPT-2 from transformers, for `model.TransformersGPT2`: building it, and its weights under the names of our GPT."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from config import ModelConfig

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

NAMES = {
    "wte": "wte",
    "wpe": "wpe",
    "h": "blocks",
    "ln_1": "norm_1",
    "ln_2": "norm_2",
    "ln_f": "norm_f",
    "c_attn": "qkv",
    "c_fc": "up",
}
"""The parts of GPT-2's parameter names in ours. `c_proj` is the last layer of attention and of the feed-forward layer."""


def build_gpt2(cfg: ModelConfig) -> GPT2LMHeadModel:
    """Return a `GPT2LMHeadModel` of the shape of `cfg`, with weights from torch's global generator."""
    from transformers import GPT2Config, GPT2LMHeadModel

    # GPT2Config's defaults would set bos and eos outside the vocabulary, and dropout in three places
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=cfg.vocab_size, n_positions=cfg.block_size, n_embd=cfg.n_embd, n_layer=cfg.n_layer,
            n_head=cfg.n_head, n_inner=cfg.ff_width, activation_function="gelu_new", resid_pdrop=cfg.dropout,
            embd_pdrop=cfg.dropout, attn_pdrop=cfg.dropout, layer_norm_epsilon=cfg.norm_eps,
            initializer_range=cfg.init_std, use_cache=False, bos_token_id=None, eos_token_id=None,
            attn_implementation="sdpa",
        )
    )  # fmt: skip


def require_no_positions(position_ids: Tensor | None) -> None:
    """Raise ValueError if positions are given: GPT-2 on transformers has no mask across documents."""
    if position_ids is not None:
        raise ValueError("positions must be None on transformers' GPT-2, but are given; use --model.backbone kindling")


def gpt2_attention(gpt2: GPT2LMHeadModel, idx: Tensor) -> Tensor:
    """Return every head's attention weights (n_layer, B, n_head, T, T) for idx (B, T)."""
    was_training = gpt2.training
    gpt2.eval()  # without dropout
    gpt2.set_attn_implementation("eager")  # the fused kernel does not form the weights
    try:
        return torch.stack(gpt2.transformer(idx, output_attentions=True).attentions)
    finally:
        gpt2.set_attn_implementation("sdpa")
        gpt2.train(was_training)


def gpt2_weights(gpt2: GPT2LMHeadModel) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight under its name in our GPT, and in its layout; a tied head counts once."""
    for name, p in gpt2.transformer.named_parameters():
        parts = [NAMES.get(part, part) for part in name.split(".")]
        if "c_proj" in parts:
            parts[parts.index("c_proj")] = "proj" if "attn" in parts else "down"
        is_linear = p.dim() == 2 and "blocks" in parts
        yield ".".join(parts), p.T if is_linear else p  # GPT-2's linear layers are (in, out)

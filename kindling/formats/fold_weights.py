"""What folds into standard weights: the same function of the tokens in a shape that more tools hold.

    cfg, weights = fold_qk_norm(cfg, weights)

QK-norm without weights is QK-norm with weights of one. Only its epsilon is another. Normalisation ignores the scale of what it
gets, but for that epsilon: so the rows of queries and keys are scaled by the root of the ratio of the two. That is exact but
for the rounding of the products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from config import ModelConfig

UNIT_EPS = torch.finfo(torch.float32).eps  # of QK-norm without weights: torch's default


def without_derived(cfg: ModelConfig) -> ModelConfig:
    """Return the same shape with None for d_head and qkv_bias where it derives what they are."""
    d_head = None if cfg.head_dim * cfg.n_head == cfg.n_embd else cfg.d_head
    qkv_bias = None if cfg.has_qkv_bias == cfg.bias else cfg.qkv_bias
    return replace(cfg, d_head=d_head, qkv_bias=qkv_bias)


def fold_qk_norm(cfg: ModelConfig, weights: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the shape and weights of our `GPT` with learned QK-norm; others are returned as they are."""
    weights = dict(weights)
    if cfg.qk_norm is not True:
        return cfg, weights
    scale = (cfg.norm_eps / UNIT_EPS) ** 0.5
    n_scaled = (cfg.n_head + cfg.kv_heads) * cfg.head_dim  # rows of queries and keys; values come after them
    for layer in range(cfg.n_layer):
        attn = f"blocks.{layer}.attn"
        for name in (f"{attn}.qkv.weight", f"{attn}.qkv.bias"):
            if name in weights:
                weights[name] = torch.cat((weights[name][:n_scaled] * scale, weights[name][n_scaled:]))
        for name in (f"{attn}.q_norm.weight", f"{attn}.k_norm.weight"):
            weights[name] = torch.ones(cfg.head_dim)
    return replace(cfg, qk_norm="learned"), weights

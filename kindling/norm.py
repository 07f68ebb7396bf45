"""The normalisations of model.py: before each sub-layer, before the head, and of queries and keys (`qk_norm` "learned")."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig


class Norm(nn.Module):
    """LayerNorm, with or without bias, or RMSNorm (Zhang and Sennrich 2019).

    `qk`: of the queries or the keys of each head. That is always RMSNorm, with one weight for each channel of a head, as Qwen3
    has it, and with the epsilon of the other norms.
    """

    def __init__(self, cfg: ModelConfig, qk: bool = False):
        super().__init__()
        self.rms, self.eps = qk or cfg.norm == "rmsnorm", cfg.norm_eps
        self.weight = nn.Parameter(torch.ones(cfg.head_dim if qk else cfg.n_embd))
        self.bias = nn.Parameter(torch.zeros(cfg.n_embd)) if cfg.bias and not self.rms else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)  # FSDP may gather it in bfloat16; the residual stream is float32
        if self.rms:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.layer_norm(x, weight.shape, weight, None if self.bias is None else self.bias.to(x.dtype), self.eps)

"""A linear layer with int8 weights, for generation on a CPU. Its products are in bfloat16.

y = Int8Linear(linear)(x)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kindling.int8_rounding import round_rows, row_scales


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and one scale for each output: symmetric, rounded to nearest."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()  # (N, K)
        scale = row_scales(weight).clamp_min(1e-30).bfloat16()  # (N,)
        self.padding = -weight.size(1) % 16  # the kernel reads sixteen columns at a time, also past the last
        self.register_buffer("weight", F.pad(round_rows(weight, scale), (0, self.padding)))  # (N, K + padding)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)  # (B * T, K)
        if self.padding:
            flat = F.pad(flat, (0, self.padding))  # (B * T, K + padding)
        y = torch._weight_int8pack_mm(flat, self.weight, self.scale).view(*x.shape[:-1], -1)  # (B, T, N)
        return y if self.bias is None else y + self.bias

"""Rounding weights to int8 with one scale for each row, symmetric and to nearest."""

from __future__ import annotations

import torch
from torch import Tensor


def row_scales(weight: Tensor) -> Tensor:
    """Return each row's largest absolute value over 127, (N,), of a weight (N, K); 0 for a row of zeros."""
    return weight.abs().amax(dim=1) / 127


def round_rows(weight: Tensor, scale: Tensor) -> Tensor:
    """Return a weight (N, K) over the scale (N,) of each row as int8; no scale may be 0."""
    return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the int8 matrix and the float32 scale of each row (N,) of a weight (N, K)."""
    weight = weight.float()
    scale = row_scales(weight)  # (N,)
    scale[scale == 0] = 1.0
    return round_rows(weight, scale), scale

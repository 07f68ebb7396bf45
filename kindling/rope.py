"""The frequencies of rotary positions (RoPE), also stretched for a longer context, for PyTorch and NumPy; imports neither."""

from __future__ import annotations

import math
from typing import Any


def frequencies(even: Any, head_dim: int, theta: float, scaling: tuple[float, ...] = ()) -> Any:
    """Return RoPE's frequencies (D/2,), stretched; `even` holds 0, 2, ... below head_dim, as an array or a tensor of floats."""
    return stretched(theta ** (-even / head_dim), scaling)


def stretched(rate: Any, scaling: tuple[float, ...]) -> Any:
    """Return the rotary frequencies `rate` (D/2,), an array or a tensor, as `ModelConfig.rope_factors` changes them.

    (factor,): all are divided by the factor. (factor, low, high, context): those that turn fewer than `low` times within
    `context` tokens are, those that turn more than `high` times stay, and between the two it blends (Llama 3.1).
    """
    if not scaling:
        return rate
    if len(scaling) == 1:
        return rate / scaling[0]
    factor, low, high, context = scaling
    turns = rate * (context / (2 * math.pi))
    kept = ((turns - low) / (high - low)).clip(0, 1)
    return rate * kept + rate / factor * (1 - kept)

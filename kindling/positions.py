"""Functions of positions for model.py: encodings, the mask between documents, and the hash of a token and the one before it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kindling.rope import frequencies

BIGRAM_PRIMES = 2_654_435_761, 2_246_822_519  # of xxHash: large and odd, with no small ratio


def sinusoidal_positions(block_size: int, n_embd: int) -> Tensor:
    """Return the fixed position encodings (block_size, n_embd) of Vaswani et al. 2017, section 3.5."""
    position = torch.arange(block_size, dtype=torch.float64)[:, None]  # (T, 1)
    rate = torch.exp(torch.arange(0, n_embd, 2, dtype=torch.float64) * (-math.log(10_000.0) / n_embd))  # (C/2,)
    angle = position * rate  # (T, C/2)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).float()  # (T, C)


def rotary_tables(
    block_size: int, head_dim: int, theta: float, scaling: tuple[float, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Return cos and sin (block_size, head_dim) of RoPE (Su et al. 2021), in Llama's half-rotation layout.

    `scaling` is `ModelConfig.rope_factors`.
    """
    rate = frequencies(torch.arange(0, head_dim, 2, dtype=torch.float32), head_dim, theta, scaling)  # (D/2,)
    angle = torch.arange(block_size, dtype=torch.float32)[:, None] * rate  # (T, D/2)
    angle = torch.cat((angle, angle), dim=-1)  # (T, D)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) by its position's angle; x (B, H, T, D), cos and sin (T, D) or (B, 1, T, D)."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x.float() * cos + turned * sin).to(x.dtype)


def document_mask(position_ids: Tensor) -> Tensor:
    """Return which keys each query may see, (B, 1, T, T) bool: itself, and the tokens before it in its document.

    position_ids (B, T) int64: a document begins wherever they are 0.
    """
    document = (position_ids == 0).cumsum(dim=1)  # (B, T)
    same = document[:, None, :, None] == document[:, None, None, :]  # (B, 1, T, T)
    return same.tril()


def previous_tokens(idx: Tensor, position_ids: Tensor | None, before: Tensor | None) -> Tensor:
    """Return the token before each one of idx (B, T) in its document, (B, T); -1 where none is.

    position_ids (B, T) int64 are 0 where a document begins; None: each row is one document. `before` (B,) is the token
    before each row's first, None where there is none.
    """
    first = idx.new_full((idx.size(0),), -1) if before is None else before  # (B,)
    previous = torch.cat((first[:, None], idx[:, :-1]), dim=1)  # (B, T)
    return previous if position_ids is None else previous.masked_fill(position_ids == 0, -1)


def bigram_ids(idx: Tensor, previous: Tensor, n_rows: int) -> Tensor:
    """Return the row of the bigram hash embedding (modded-nanogpt) for each token of idx and the one before it in `previous`.

    Where `previous` is -1, nothing stands before the token, and the row is 0; otherwise a hash picks one of the other rows.
    Exact in int64 for any vocabulary up to 2^30.
    """
    hashed = previous * BIGRAM_PRIMES[0] + idx * BIGRAM_PRIMES[1]
    return (1 + hashed % (n_rows - 1)) * (previous >= 0)

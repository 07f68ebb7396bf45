"""What a `model.GPT` keeps of the tokens that it has read, so that in generation a new token costs one token's work.

    cache = gpt.new_cache(n_rows)
    logits = gpt.read(idx, cache)       # of the next tokens of each row

Limit: room for the whole context is taken at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from config import ModelConfig


class Cache:
    """The keys and values of what each row has read so far, (n_layer, B, n_kv_head, S, D), and how many tokens that is.

    Rows are independent: each has its own `lengths`, and its next token is at that position, whatever the others do. A row
    is emptied by a length of 0. `last` is the token that each row has read last, anything in an empty row.
    """

    def __init__(self, cfg: ModelConfig, n_rows: int, like: Tensor):
        """Make room for `block_size` tokens of each row, of the device and type of `like`."""
        shape = (cfg.n_layer, n_rows, cfg.kv_heads, cfg.block_size, cfg.head_dim)
        self.keys, self.values = (torch.zeros(shape, device=like.device, dtype=like.dtype) for _ in range(2))
        self.lengths, self.last = (torch.zeros(n_rows, device=like.device, dtype=torch.int64) for _ in range(2))  # (B,)

    def positions(self, T: int) -> Tensor:
        """Return the positions of the next T tokens of each row, (B, T)."""
        return self.lengths[:, None] + torch.arange(T, device=self.lengths.device)  # (B, T)

    def mask(self, positions: Tensor, S: int) -> Tensor | None:
        """Return which of S keys each of the tokens at `positions` (B, T) may see, (B, 1, T, S) bool; None if it is plain:
        causal where T = S, and every key for one token.
        """
        B, T = positions.shape
        if B == 1 and T in (1, S):
            return None
        seen = torch.arange(S, device=positions.device)  # (S,)
        return (seen <= positions[:, :, None])[:, None]  # (B, 1, T, S)

    def extend(self, layer: int, k: Tensor, v: Tensor, positions: Tensor, S: int) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, n_kv_head, T, D) of tokens at `positions`; return the layer's, (B, n_kv_head, S, D)."""
        keys, values = self.keys[layer], self.values[layer]
        if k.size(0) == 1:  # faster than by index
            start = S - k.size(2)
            keys[:, :, start:S], values[:, :, start:S] = k, v
        else:
            rows = torch.arange(k.size(0), device=k.device)[:, None]  # (B, 1)
            for store, new in ((keys, k), (values, v)):
                store[rows, :, positions] = new.transpose(1, 2).to(store.dtype)  # (B, T, n_kv_head, D)
        return keys[:, :, :S], values[:, :, :S]

    def copy_row(self, row: int, other: Cache, source: int = 0) -> None:
        """Take over a row of another cache."""
        n = int(other.lengths[source])
        self.keys[:, row, :, :n] = other.keys[:, source, :, :n]
        self.values[:, row, :, :n] = other.values[:, source, :, :n]
        self.lengths[row], self.last[row] = n, other.last[source]

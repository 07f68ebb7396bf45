"""The key / value cache of a `model.GPT`: in generation, each new token then costs the work of one token.

    cache = gpt.new_cache(n_rows)
    logits = gpt.forward_cached(idx, cache)       # after the next tokens of each row
    logits = gpt.forward_cached(prompts, PromptRows(cache, rows, lengths))    # whole prompts as some of its rows

Limit: memory for the whole context is allocated at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from config import ModelConfig


class Cache:
    """The keys and values of each row's tokens so far, (n_layer, B, n_kv_head, S, D), and their number.

    Rows are independent: `lengths` (B,) holds each row's number of tokens, which is the position of its next token. A length
    of 0 empties a row. They are on the CPU, where reading one waits for nothing. `last` (B,) is each row's last token; in an
    empty row it means nothing.
    """

    def __init__(self, cfg: ModelConfig, n_rows: int, like: Tensor):
        """Allocate `block_size` tokens for each row, on the device and in the type of `like`."""
        shape = (cfg.n_layer, n_rows, cfg.kv_heads, cfg.block_size, cfg.head_dim)
        self.keys, self.values = (torch.zeros(shape, device=like.device, dtype=like.dtype) for _ in range(2))
        self.lengths = torch.zeros(n_rows, dtype=torch.int64)  # (B,)
        self.last = torch.zeros(n_rows, device=like.device, dtype=torch.int64)  # (B,)

    def positions(self, T: int) -> Tensor:
        """Return the positions of the next T tokens of each row, (B, T)."""
        return (self.lengths[:, None] + torch.arange(T)).to(self.last.device)  # (B, T)

    def mask(self, position_ids: Tensor, S: int) -> Tensor | None:
        """Return which of S keys each token at `position_ids` (B, T) may see, (B, 1, T, S) bool.

        None if no mask is needed: for one row, if T = S (plainly causal) or T = 1 (sees every key).
        """
        B, T = position_ids.shape
        if B == 1 and T in (1, S):
            return None
        seen = torch.arange(S, device=position_ids.device)  # (S,)
        return (seen <= position_ids[:, :, None])[:, None]  # (B, 1, T, S)

    def extend(self, layer: int, k: Tensor, v: Tensor, position_ids: Tensor, S: int) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values (B, n_kv_head, T, D) at `position_ids`; return all of it, (B, n_kv_head, S, D)."""
        keys, values = self.keys[layer], self.values[layer]
        if k.size(0) == 1:  # faster than indexing
            start = S - k.size(2)
            keys[:, :, start:S], values[:, :, start:S] = k, v
        else:
            rows = torch.arange(k.size(0), device=k.device)[:, None]  # (B, 1)
            for store, new in ((keys, k), (values, v)):
                store[rows, :, position_ids] = new.transpose(1, 2).to(store.dtype)  # (B, T, n_kv_head, D)
        return keys[:, :, :S], values[:, :, :S]

    def advance(self, idx: Tensor, x: Tensor) -> Tensor:
        """Count the tokens idx (B, T) as part of their rows; return the features of each row's last token, of x (B, T, C)."""
        self.lengths += idx.size(1)
        self.last.copy_(idx[:, -1])
        return x[:, -1]  # (B, C)

    def copy_row(self, row: int, other: Cache, source: int = 0, length: int | None = None) -> None:
        """Copy a row of a cache into `row`, or only its first tokens; then `last` is for the caller to set."""
        n = int(other.lengths[source]) if length is None else length
        self.keys[:, row, :, :n] = other.keys[:, source, :, :n]
        self.values[:, row, :, :n] = other.values[:, source, :, :n]
        self.lengths[row], self.last[row] = n, other.last[source]


class CacheRows(Cache):
    """Some rows of a cache, to be extended while the others stay as they are."""

    def __init__(self, whole: Cache, rows: list[int], n_last: int = 1):
        """`n_last` is how many tokens at the end of each row have their features returned by `advance`."""
        self._whole, self._rows, self._n_last = whole, rows, n_last
        self._index = torch.tensor(rows, device=whole.last.device)  # (B,)
        self.lengths, self.last = whole.lengths[rows], whole.last[self._index]  # (B,), copies

    def extend(self, layer: int, k: Tensor, v: Tensor, position_ids: Tensor, S: int) -> tuple[Tensor, Tensor]:
        keys, values = self._whole.keys[layer], self._whole.values[layer]  # (n_rows, n_kv_head, block_size, D)
        if len(self._rows) == 1:  # a view, without copies
            (row,), start = self._rows, S - k.size(2)
            keys[row, :, start:S], values[row, :, start:S] = k[0], v[0]
            return keys[row : row + 1, :, :S], values[row : row + 1, :, :S]
        index = self._index[:, None]  # (B, 1)
        for store, new in ((keys, k), (values, v)):
            store[index, :, position_ids] = new.transpose(1, 2).to(store.dtype)  # (B, T, n_kv_head, D)
        return keys[self._index, :, :S], values[self._index, :, :S]

    def advance(self, idx: Tensor, x: Tensor) -> Tensor:
        """Count the tokens idx (B, T); return the features (B * n_last, C) of the last ones of each row."""
        super().advance(idx, x)
        self._whole.lengths[self._rows], self._whole.last[self._index] = self.lengths, self.last
        return x[:, -self._n_last :].flatten(0, 1)


class PromptRows(Cache):
    """Some rows of a cache, to fill with whole prompts in one pass: idx (N, T) has each prompt with padding after it.

    What the padding leaves in the cache is beyond the length of its row. So no token sees it, and the next ones replace it.
    """

    def __init__(self, cache: Cache, rows: Sequence[int], lengths: Sequence[int]):
        """Fill `rows` of the cache with prompts of so many tokens, at least one each."""
        device = cache.last.device
        self.cache, self.filled = cache, torch.tensor(lengths)  # (N,)
        self.places, self.rows = list(rows), torch.tensor(rows, device=device)  # (N,), on the CPU and on the device
        self.ends = torch.arange(len(rows), device=device), self.filled.to(device) - 1  # the last token of each
        self.lengths, self.last = torch.zeros_like(self.filled), cache.last[self.rows]  # (N,)

    def mask(self, position_ids: Tensor, S: int) -> Tensor | None:
        """Return None: a causal pass over each row, in which padding comes after all that counts."""
        return None

    def extend(self, layer: int, k: Tensor, v: Tensor, position_ids: Tensor, S: int) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values (N, n_kv_head, T, D); return them in the type of the cache."""
        stores = self.cache.keys[layer], self.cache.values[layer]
        k, v = (new.to(store.dtype) for store, new in zip(stores, (k, v)))
        for store, new in zip(stores, (k, v)):
            store[self.rows, :, :S] = new
        return k, v

    def advance(self, idx: Tensor, x: Tensor) -> Tensor:
        """Set the lengths of the rows; return the features (N, C) of each prompt's last token, of x (N, T, C)."""
        self.cache.lengths[self.places] = self.filled
        self.cache.last[self.rows] = idx[self.ends]
        return x[self.ends]  # (N, C)

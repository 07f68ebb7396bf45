"""The keys and values of the texts that an int8 model works on: each new token then costs the work of one token."""

from __future__ import annotations

import numpy as np


class Cache:
    """Keys and values (n_rows, n_layer, n_kv, block_size, D), and the tokens that they belong to.

    They are float32, or for the kernel in C int8 with a scale for each vector, which is a quarter of the memory and of the time
    to read it. Rows are independent texts: `tokens` holds each row's tokens so far, and their number is the position of its next
    one. Memory is taken from the system when a position is first used, and kept.
    """

    def __init__(self, shape: tuple[int, ...], rounded: bool):
        """Make empty rows; the first number of `shape` is how many."""
        self.keys, self.values = (np.zeros(shape, np.int8 if rounded else np.float32) for _ in range(2))
        scales = shape[:-1] if rounded else (0,) * 4  # (n_rows, n_layer, n_kv, block_size)
        self.key_scale, self.value_scale = (np.zeros(scales, np.float32) for _ in range(2))
        self.tokens: list[list[int]] = [[] for _ in range(shape[0])]

    @property
    def lengths(self) -> list[int]:
        """The number of tokens in each row."""
        return [len(tokens) for tokens in self.tokens]

    def truncate(self, row: int, length: int) -> None:
        """Keep the first `length` tokens of a row; 0 empties it."""
        assert 0 <= length <= len(self.tokens[row])
        del self.tokens[row][length:]

    def copy_row(self, row: int, other: Cache, source: int, length: int) -> None:
        """Put the first `length` tokens of another cache's row in place of `row`."""
        assert 0 <= length <= len(other.tokens[source]) and self.keys.dtype == other.keys.dtype
        for name in ("keys", "values", *(("key_scale", "value_scale") if self.key_scale.size else ())):
            getattr(self, name)[row, :, :, :length] = getattr(other, name)[source, :, :, :length]
        self.tokens[row] = other.tokens[source][:length]

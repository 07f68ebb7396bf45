"""An int8 export as an engine of the server. Imports no torch.

model = Model(folder)
model.compile()
engine = Int8Engine(model, rows_for(model, CACHE_BYTES))
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from kindling.int8.model import Model
from kindling.int8.tokenizer import ExportTokenizer
from kindling.tokenization.infilling import FimIds, find_fim_ids

CACHE_BYTES = 36_000_000
"""Memory for keys and values, of which little is used while texts are short."""
PIECE = 32  # tokens; twice as many are hardly faster for each, and texts that are being written wait twice as long


def rows_for(model: Model, memory_bytes: int) -> int:
    """Return how many texts of a whole context have their keys and values in this much memory, but at least 2."""
    n_vectors = 2 * model.m["n_layer"] * model.kv_heads * model.block_size
    vector_bytes = model.head_dim + 4 if model.kernel is not None else 4 * model.head_dim
    return max(2, memory_bytes // (n_vectors * vector_bytes))


class Int8Engine:
    """The rows of a cache, and an int8 model that extends them."""

    piece = PIECE

    def __init__(self, model: Model, n_rows: int):
        """Use the model with its present kernel. Of the C kernel, a text's logits are the same bits in any company."""
        self.n_rows, self.block_size, self.vocab_size = n_rows, model.block_size, model.m["vocab_size"]
        self._model, self._cache = model, model.new_cache(n_rows)

    def tokens(self, row: int) -> Sequence[int]:
        """Return the tokens whose keys and values a row holds."""
        return self._cache.tokens[row]

    def truncate(self, row: int, length: int) -> None:
        """Keep the first `length` tokens of a row; 0 empties it."""
        self._cache.truncate(row, length)

    def copy_row(self, row: int, source: int, length: int) -> None:
        """Put the first `length` tokens of the row `source` in place of `row`."""
        self._cache.copy_row(row, self._cache, source, length)

    def forward(self, texts: Sequence[tuple[int, Sequence[int]]], n_last: Sequence[int] = ()) -> np.ndarray:
        """Run the next tokens of some rows; return the logits (N, V) after the last of each, or after its `n_last` last ones."""
        return self._model.forward([(row, list(ids)) for row, ids in texts], self._cache, n_last)


class Int8Vocabulary(ExportTokenizer):
    """The tokenizer of an export, and whether its model fills in the middle."""

    def __init__(self, folder: Path, model: Model):
        """Read the tokenizer of the export in `folder`. Raises CompletionError if it is damaged."""
        super().__init__(folder, model)
        self._infills = bool(model.meta.get("infills", False))  # older exports do not have the key

    def piece(self, token: int) -> str:
        """Return a token as the tokenizer's file writes it; "" for an id without a token."""
        return self.backend.id_to_token(token) or ""

    @property
    def special_tokens(self) -> Sequence[str]:
        """The control tokens of the vocabulary."""
        return sorted(filter(None, self.special_ids))

    @cached_property
    def fim(self) -> FimIds | None:
        """The control tokens of fill-in-the-middle, or None if the vocabulary or the model's training has none."""
        return find_fim_ids(self.special_ids, self.special_ids) if self._infills else None

"""A run in PyTorch as an engine of the server, on any device and in any precision that generate.py offers.

gpt = prepare_for_inference(model.to(device), precision)
engine = TorchEngine(gpt, rows_for(gpt, CACHE_BYTES))
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch

from kindling.cache import CacheRows
from kindling.generation.completion import token_spellings
from kindling.generation.decoding import reading
from kindling.tokenization.infilling import FimIds
from kindling.tokenization.tokenizer import Tokenizer
from model import GPT

CACHE_BYTES = 500_000_000
PIECE, PIECE_ON_CPU = 512, 64  # tokens; on a GPU a short pass takes as long as a longer one


def rows_for(gpt: GPT, memory_bytes: int) -> int:
    """Return how many texts of a whole context have their keys and values in this much memory, but at least 2."""
    cfg = gpt.cfg
    width = (gpt.cache_dtype or gpt.wte.weight.dtype).itemsize
    return max(2, memory_bytes // (2 * cfg.n_layer * cfg.kv_heads * cfg.block_size * cfg.head_dim * width))


class TorchEngine:
    """The rows of a cache, and a model that extends them."""

    def __init__(self, gpt: GPT, n_rows: int):
        self.n_rows, self.block_size, self.vocab_size = n_rows, gpt.cfg.block_size, gpt.cfg.vocab_size
        self._gpt, self._cache = gpt, gpt.new_cache(n_rows)
        self._device = self._cache.last.device
        self.piece = PIECE_ON_CPU if self._device.type == "cpu" else PIECE
        self._tokens: list[list[int]] = [[] for _ in range(n_rows)]

    def tokens(self, row: int) -> Sequence[int]:
        """Return the tokens whose keys and values a row holds."""
        return self._tokens[row]

    def truncate(self, row: int, length: int) -> None:
        """Keep the first `length` tokens of a row; 0 empties it."""
        assert 0 <= length <= len(self._tokens[row])
        del self._tokens[row][length:]
        self._set_length(row)

    def copy_row(self, row: int, source: int, length: int) -> None:
        """Put the first `length` tokens of the row `source` in place of `row`."""
        self._cache.copy_row(row, self._cache, source, length)
        self._tokens[row] = self._tokens[source][:length]
        self._set_length(row)

    def _set_length(self, row: int) -> None:
        tokens = self._tokens[row]
        self._cache.lengths[row], self._cache.last[row] = len(tokens), tokens[-1] if tokens else 0

    def forward(self, texts: Sequence[tuple[int, Sequence[int]]], n_last: Sequence[int] = ()) -> np.ndarray:
        """Run the next tokens of some rows; return the logits (N, V) after the last of each, or after its `n_last` last ones.

        Texts with one new token each are run together, the others one after another.
        """
        n_last = n_last or [1] * len(texts)
        ends = list(accumulate(n_last))
        logits = torch.empty(ends[-1], self.vocab_size)
        single = [i for i, (_, ids) in enumerate(texts) if len(ids) == 1]
        longer = [[i] for i, (_, ids) in enumerate(texts) if len(ids) > 1]
        for group in [single, *longer] if single else longer:
            rows = CacheRows(self._cache, [texts[i][0] for i in group], n_last[group[0]])
            idx = torch.tensor([list(texts[i][1]) for i in group], device=self._device)  # (B, T)
            places = [at for i in group for at in range(ends[i] - n_last[i], ends[i])]
            with reading():
                logits[places] = self._gpt.forward_cached(idx, rows).float().cpu()
        for row, ids in texts:
            self._tokens[row] += ids
        return logits.numpy()


class TorchVocabulary:
    """The tokenizer of a run, and whether its model fills in the middle."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, infills: bool):
        """`vocab_size` is the model's; `infills` says that it was trained to fill in the middle (data.fim_rate)."""
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self.eos_id: int = tokenizer.eos_id
        self.end_ids, self.special_ids = tokenizer.end_ids, tokenizer.special_ids
        self.bos_id: int | None = tokenizer.bos_id
        self.special_tokens: Sequence[str] = tokenizer.special_tokens
        self.fim: FimIds | None = tokenizer.fim if infills else None

    @cached_property
    def spellings(self) -> Sequence[str]:
        """The text of each token, as generation/healing.py needs it."""
        return token_spellings(self._tokenizer, self._vocab_size)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text. Raises KindlingError for what cannot be encoded."""
        return self._tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        return self._tokenizer.decode(ids)

    def piece(self, token: int) -> str:
        """Return a token as the tokenizer's file writes it; "" for an id without a token."""
        return self._tokenizer.piece(token)

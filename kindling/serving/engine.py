"""What the server asks of a model, so that it need not know whether PyTorch or the int8 runtime computes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from kindling.tokenization.infilling import FimIds


class Engine(Protocol):
    """A model that continues several texts, one in each row of its cache. One thread uses it at a time."""

    n_rows: int
    block_size: int
    vocab_size: int
    """The number of logits, which may be more than the tokenizer's tokens."""
    piece: int
    """Tokens of prompts that are run in one pass, so that the texts being written do not wait long for the next one."""

    def tokens(self, row: int) -> Sequence[int]:
        """Return the tokens whose keys and values a row holds."""

    def truncate(self, row: int, length: int) -> None:
        """Keep the first `length` tokens of a row; 0 empties it."""

    def copy_row(self, row: int, source: int, length: int) -> None:
        """Put the first `length` tokens of the row `source` in place of `row`."""

    def forward(self, texts: Sequence[tuple[int, Sequence[int]]], n_last: Sequence[int] = ()) -> np.ndarray:
        """Run the next tokens of some rows, each with its row; return the logits (N, V) float32 after the last of each.

        `n_last` gives how many tokens at the end of each text have their logits returned, one text after the other; by default
        one of each. The tokens must fit in the context. The other rows stay as they are.
        """


class Vocabulary(Protocol):
    """The tokenizer of a run or of an export."""

    eos_id: int
    bos_id: int | None

    @property
    def end_ids(self) -> Sequence[int]:
        """The ids of all tokens that end a text."""

    @property
    def special_ids(self) -> Mapping[str, int]:
        """The ids of the special tokens."""

    @property
    def fim(self) -> FimIds | None:
        """The control tokens of fill-in-the-middle, or None if the vocabulary or the model's training has none."""

    @property
    def special_tokens(self) -> Sequence[str]:
        """The control tokens of the vocabulary."""

    @property
    def spellings(self) -> Sequence[str]:
        """The text of each token, as generation/healing.py needs it."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text. A control token written in it is text. Raises KindlingError for what cannot be encoded."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""

    def piece(self, token: int) -> str:
        """Return a token as the tokenizer's file writes it; "" for an id without a token."""

"""Which row of the cache a prompt gets: the one that holds the longest beginning of it, so that only the rest must be run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kindling.serving.engine import Engine


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the number of tokens at the beginning that both have."""
    n_same, too_many = 0, min(len(a), len(b)) + 1  # the answer is from the one to below the other
    while too_many - n_same > 1:
        middle = (n_same + too_many) // 2
        if a[n_same:middle] == b[n_same:middle]:
            n_same = middle
        else:
            too_many = middle
    return n_same


class Found(NamedTuple):
    """The row with the longest beginning of a prompt, and how long that is."""

    row: int
    length: int


class Prefixes:
    """The rows of an engine: those in use, and those that only keep what was read."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._last_used = [0] * engine.n_rows
        self._clock = 0
        self._in_use: set[int] = set()

    @property
    def n_free(self) -> int:
        """Rows that are not in use."""
        return len(self._last_used) - len(self._in_use)

    def find(self, ids: list[int]) -> Found:
        """Return the row that holds the most of a prompt but for its last token, whose logits are wanted."""
        lengths = [common_length(self._engine.tokens(row), ids[:-1]) for row in range(len(self._last_used))]
        # of equal ones a free one, which need not be copied, and then the newest
        row = max(range(len(lengths)), key=lambda row: (lengths[row], row not in self._in_use, self._last_used[row]))
        return Found(row, lengths[row])

    def take(self, found: Found) -> int:
        """Return a free row, now in use, that holds the beginning that was found and nothing more.

        If the row that was found is free and most of it is used again, it is that one. Otherwise a row is overwritten: the least
        recently used of those that another row holds as well, as when an editor asks again before its last request has ended,
        or of all.
        """
        free = [row for row in range(len(self._last_used)) if row not in self._in_use]
        others = [row for row in free if row != found.row or found.length == 0]
        if found.row in free and (2 * found.length > len(self._engine.tokens(found.row)) or not others):
            row = found.row
        else:
            row = min(others, key=lambda row: (not self._is_held_twice(row), self._last_used[row]))
        if row == found.row or found.length == 0:
            self._engine.truncate(row, found.length)
        else:
            self._engine.copy_row(row, found.row, found.length)
        self._in_use.add(row)
        self._touch(row)
        return row

    def _is_held_twice(self, row: int) -> bool:
        """Return whether another row holds most of what this one does."""
        tokens = self._engine.tokens(row)
        others = (self._engine.tokens(other) for other in range(len(self._last_used)) if other != row)
        return any(2 * common_length(tokens, held) >= len(tokens) for held in others)

    def give_back(self, row: int) -> None:
        """Say that a row is no longer in use; it keeps its tokens."""
        self._in_use.discard(row)
        self._touch(row)

    def _touch(self, row: int) -> None:
        self._clock += 1
        self._last_used[row] = self._clock

"""What a server has done so far, as numbers that any thread may read."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import get_args

from kindling.serving.generation import Ending

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


@dataclass
class Histogram:
    """How many values are at most each of `SECONDS` but above the one before, and how many above all."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    total: float = 0.0
    """The sum of all values."""

    def add(self, seconds: float) -> None:
        """Count a value."""
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.total += seconds


def _endings() -> dict[str, int]:
    return dict.fromkeys((*get_args(Ending), "failed", "cancelled", "refused"), 0)


@dataclass
class Counters:
    """Counts since the start, and the present state."""

    requests: dict[str, int] = field(default_factory=_endings)
    """By what ended them. refused: the queue was full, or none of the model's rows was free in time."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompts' tokens, those that did not have to be run."""
    new_tokens: int = 0
    n_waiting: int = 0
    """Requests in the queue."""
    n_running: int = 0
    """Requests that have a row."""
    n_rows: int = 0
    first_token_s: Histogram = field(default_factory=Histogram)
    """From the request to its first token."""
    token_s: Histogram = field(default_factory=Histogram)
    """From a token of a request to its next one."""

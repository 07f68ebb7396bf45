"""Many requests, one model: what comes together is decoded together, and each joins and leaves between two tokens."""

from __future__ import annotations

from collections.abc import Callable

from kindling.errors import KindlingError
from kindling.serving.engine import Engine, Vocabulary
from kindling.serving.generation import Event, Generation


class Busy(KindlingError):
    """The queue is full. `retry_after_s` says when to ask again."""

    def __init__(self, retry_after_s: float):
        super().__init__(f"the server has as many requests as it takes; ask again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class Scheduler:
    """A thread that runs an engine for all requests."""

    def __init__(self, engine: Engine, vocabulary: Vocabulary, max_queue: int):
        """`max_queue` requests may wait beside those that have a row."""

    def submit(self, generation: Generation, say: Callable[[Event], None]) -> Callable[[], None]:
        """Queue a request; return a function that cancels it, from any thread, at any time.

        `say` is called from the scheduler's thread with each Piece, then once with Done or Failed, and must return at once.
        After a cancellation it is called no more. Raises Busy.
        """

    def close(self, patience_s: float) -> None:
        """Take no more requests, and end: those that are being generated have `patience_s` seconds to finish."""

"""Reads the rows of the next step on a thread while this step is computed."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from kindling.data.shards import Batch, TrainingRows


class Prefetch:
    """Reads the rows of the next step on a thread while this step is computed.

    A row depends on its row index alone, so it does not matter when it is read.
    """

    def __init__(self, batches: TrainingRows):
        self._batches = batches
        self._thread = ThreadPoolExecutor(1)
        self._next: tuple[range, Future[Batch]] | None = None

    def take(self, rows: range, then: range) -> Batch:
        """Return the rows with these row indices, and begin to read the rows `then`, which the next call asks for."""
        if self._next is not None and self._next[0] == rows:
            batch = self._next[1].result()
        else:
            batch = self._thread.submit(self._batches.rows, rows.start, len(rows)).result()
        self._next = then, self._thread.submit(self._batches.rows, then.start, len(then))
        return batch

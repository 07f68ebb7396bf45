"""Rows of the next step, read on a thread while this step is computed."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from kindling.data.shards import Batch, Batches


class Prefetch:
    """Reads the rows of the next step on a thread while this step is computed.

    Rows are a function of their position alone, so nothing depends on when they are read.
    """

    def __init__(self, batches: Batches):
        self._batches = batches
        self._thread = ThreadPoolExecutor(1)
        self._next: tuple[range, Future[Batch]] | None = None

    def take(self, rows: range, then: range) -> Batch:
        """Return the rows at these positions, and begin to read those that are wanted `then`."""
        if self._next is not None and self._next[0] == rows:
            batch = self._next[1].result()
        else:
            batch = self._thread.submit(self._batches.rows, rows.start, len(rows)).result()
        self._next = then, self._thread.submit(self._batches.rows, then.start, len(then))
        return batch

"""Many requests, one model: what comes together is decoded together, and each joins and leaves between two tokens."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable

from kindling.errors import KindlingError, one_line
from kindling.serving.batch import Batch, Job
from kindling.serving.counters import Counters
from kindling.serving.engine import Engine, Vocabulary
from kindling.serving.generation import Event, Generation, Refused

LONGEST_RETRY_S = 60.0
STOPPING = "the server is stopping"
NO_PLACE = "the model was busy with other requests until the time limit"


class Busy(KindlingError):
    """There is no place for a request. `retry_after_s` says when to ask again."""

    def __init__(self, retry_after_s: float, why: str = "the server has as many requests as it takes"):
        super().__init__(f"{why}; ask again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class Scheduler:
    """A thread that runs an engine for all requests."""

    def __init__(
        self, engine: Engine, vocabulary: Vocabulary, max_queue: int, clock: Callable[[], float] = time.monotonic
    ):
        """`max_queue` requests may wait beside those that have a row."""
        self.counters = Counters(n_rows=engine.n_rows)
        self._vocabulary, self._clock = vocabulary, clock
        self._block_size = engine.block_size
        self._most = engine.n_rows + max_queue
        self._batch = Batch(engine, vocabulary, self.counters, clock)
        self._changed = threading.Condition()  # guards what follows
        self._waiting: list[Job] = []
        self._stop_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def submit(self, generation: Generation, say: Callable[[Event], None]) -> Callable[[], None]:
        """Queue a request; return a function that cancels it, from any thread, at any time.

        `say` is called from the scheduler's thread with each Piece, then once with Done or Failed, or only with Refused. It must
        return at once. After a cancellation it is called no more. Raises Busy, and ValueError for a prompt that leaves no room
        in the context.
        """
        if not 0 < len(generation.ids) < self._block_size:
            raise ValueError(
                f"a prompt must have from 1 to {self._block_size - 1} tokens, but has {len(generation.ids)}; crop it"
            )
        job = Job(generation, self._vocabulary, say, self._clock())
        with self._changed:
            if self._stop_at is not None:
                raise Busy(1.0, STOPPING)
            if len(self._waiting) + len(self._batch.jobs) >= self._most:
                self.counters.requests["refused"] += 1
                raise Busy(self._retry_after_s())
            self._waiting.append(job)
            self.counters.n_waiting = len(self._waiting)
            self._changed.notify()

        def cancel() -> None:
            job.cancel()
            with self._changed:
                if job in self._waiting:
                    self._drop(job, "cancelled")

        return cancel

    def close(self, patience_s: float) -> None:
        """Take no more requests, and end: those that are being generated have `patience_s` seconds to finish."""
        with self._changed:
            stop_at = self._clock() + patience_s
            self._stop_at = stop_at if self._stop_at is None else min(stop_at, self._stop_at)
            self._changed.notify()
        self._thread.join()

    def _retry_after_s(self) -> float:
        """Return when a request that is refused now may find a place: after the mean time in which a row becomes free."""
        ages = [self._clock() - job.began for job in list(self._batch.jobs)]
        held = max([self._batch.held_s or 0.0, *ages])
        wait = held * (1 + len(self._waiting)) / self.counters.n_rows
        return min(LONGEST_RETRY_S, float(max(1, math.ceil(wait))))

    def _drop(self, job: Job, ending: str) -> None:
        self._waiting.remove(job)
        self.counters.requests[ending] += 1
        self.counters.n_waiting = len(self._waiting)

    def _run(self) -> None:
        while self._begin_round():
            try:
                self._batch.step()
            except Exception as e:  # of our own: the server must go on
                print(f"error: the scheduler failed ({one_line(e)})", file=sys.stderr)
                self._batch.fail_all(f"the server failed ({one_line(e)})")
            self.counters.n_running = len(self._batch.jobs)

    def _begin_round(self) -> bool:
        """Wait for something to do, and let requests join; return False when all is done and the scheduler is to end."""
        with self._changed:
            while not (self._waiting or self._batch.jobs):
                if self._stop_at is not None:
                    return False
                self._changed.wait()
            now = self._clock()
            ended: list[tuple[Job, Event]] = []
            for job in list(self._waiting):
                if self._stop_at is not None:
                    self._drop(job, "refused")
                    ended.append((job, Refused(STOPPING, 1.0)))
                elif now >= job.deadline:
                    self._drop(job, "refused")
                    ended.append((job, Refused(NO_PLACE, self._retry_after_s())))
            self._batch.admit(self._waiting)
            self.counters.n_waiting, self.counters.n_running = len(self._waiting), len(self._batch.jobs)
        for job, event in ended:
            job.say(event)
        if self._stop_at is not None and now >= self._stop_at:
            self._batch.fail_all(STOPPING)
        return True

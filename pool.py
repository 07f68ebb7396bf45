"""Processes that do small jobs on strangers' data, and survive what the data do to them.

    for result in map_jobs(function, jobs, n_workers=2, limit_s=30):
        ...

A job that kills its process, or takes too long, gives a `Lost` in place of its result, and only that one. Results come in
the order of the jobs, whatever the number of workers. Used for jobs of milliseconds; the data pipeline's own workers, which
share what is costly to start with, are in workers.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

from config import KindlingError

MEMORY_BYTES = 2**30  # of each worker's address space
START_S = 60.0


class PoolError(KindlingError):
    """Workers that cannot start."""


@dataclass(frozen=True)
class Lost:
    """What there is of a job that has no result: `timeout` or `crash`, or the error that it raised."""

    reason: str


def _work(pipe: Connection, slot: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no resource
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    pipe.send(os.getpid())
    while True:
        try:
            function, job = pipe.recv()
        except EOFError:  # the parent is gone, or done
            return
        try:
            result = function(job, slot)
        except Exception as e:
            result = Lost(f"{type(e).__name__}: {e}")
        pipe.send(result)


class _Worker:
    """One process, and the job that it is at."""

    def __init__(self, slot: int):
        self.slot = slot
        context = get_context("spawn")  # a fork would copy this process's threads and memory, torch's among them
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, slot), daemon=True)
        self.process.start()
        other.close()
        self.number: int | None = None
        self.deadline = 0.0

    def ready(self) -> None:
        """Wait until it has started."""
        try:
            started = self.pipe.poll(START_S)
            started = started and bool(self.pipe.recv())
        except EOFError:
            started = False
        if not started:
            raise PoolError("worker processes must be able to start, but die at once; see that memory is free")

    def take(self, number: int, function: Callable[[Any, int], Any], job: Any, limit_s: float) -> None:
        self.number, self.deadline = number, time.monotonic() + limit_s
        with contextlib.suppress(ConnectionError):  # if it has died, its pipe is at an end, which is seen next
            self.pipe.send((function, job))

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def map_jobs(function: Callable[[Any, int], Any], jobs: Iterable[Any], n_workers: int, limit_s: float) -> Iterator[Any]:
    """Yield `function(job, slot)` of each job in order, or a Lost; `slot` tells the workers apart.

    The function is one of a module, so that a fresh process finds it. Raises PoolError if no worker can start.
    """
    queue = enumerate(jobs)
    done: dict[int, Any] = {}
    workers = [_Worker(slot) for slot in range(n_workers)]
    following = 0
    try:
        for worker in workers:
            worker.ready()
        more = True
        while more or any(w.number is not None for w in workers):
            for worker in workers:
                if worker.number is None and more:
                    if (item := next(queue, None)) is None:
                        more = False
                    else:
                        worker.take(item[0], function, item[1], limit_s)
            busy = [w for w in workers if w.number is not None]
            left = min((w.deadline for w in busy), default=0.0) - time.monotonic()
            heard = wait([w.pipe for w in busy], max(0.0, left)) if busy else []
            for worker in busy:
                assert worker.number is not None
                if worker.pipe in heard:
                    try:
                        done[worker.number] = worker.pipe.recv()
                        worker.number = None
                        continue
                    except (EOFError, ConnectionError):
                        reason = "crash"
                elif time.monotonic() >= worker.deadline:
                    reason = "timeout"
                else:
                    continue
                done[worker.number] = Lost(reason)
                worker.end()
                workers[worker.slot] = fresh = _Worker(worker.slot)
                fresh.ready()
            while following in done:
                yield done.pop(following)
                following += 1
    finally:
        for worker in workers:
            worker.end()

"""A pool of processes for small jobs on untrusted data, which a job cannot take down.

    for result in map_jobs(function, jobs, n_workers=2, limit_s=30):
        ...

A job that kills its process, or takes too long, gives a `FailedJob` instead of a result; the other jobs are not affected.
Results come in the order of the jobs, with any number of workers. Made for jobs of milliseconds. The workers of the data
pipeline, which share what is slow to load, are in data/workers.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from kindling.errors import KindlingError

MEMORY_BYTES = 2**30  # that a job may use
START_S = 60.0


class PoolError(KindlingError):
    """Workers that cannot start."""


@dataclass(frozen=True)
class FailedJob:
    """A job without a result, and the reason: `timeout`, `crash`, or the error that it raised."""

    reason: str


def _work(pipe: Connection, slot: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(ImportError, ValueError, OSError):  # not every system has both
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        # the hard limit stays, so a process that the job starts can set a higher limit
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, hard))
    pipe.send(os.getpid())
    while True:
        try:
            function, job = pipe.recv()
        except (EOFError, OSError):  # the parent has ended, or is done
            return
        try:
            result = ForkingPickler.dumps(function(job, slot))
        except Exception as e:
            result = ForkingPickler.dumps(FailedJob(f"{type(e).__name__}: {e}"))
        pipe.send_bytes(result)


def _end_with_parent() -> None:
    """Wait until the parent ends for any reason, then end this process, even in the middle of a job."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def sigint_blocked() -> Iterator[None]:
    """Hold back Ctrl-C, so that a process that starts here does not get it before it ignores it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # else the first process would start it, which unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker:
    """One process and its current job."""

    def __init__(self, slot: int):
        context = get_context(
            "spawn"
        )  # a fork would copy this process's memory and locks, also those of torch's threads
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, slot), daemon=True)
        self.process.start()
        other.close()
        self.number: int | None = None
        self.deadline = 0.0

    def ready(self) -> None:
        """Wait until the process has started; raises PoolError if it does not."""
        try:
            started = self.pipe.poll(START_S) and bool(self.pipe.recv())
        except (EOFError, OSError):
            started = False
        if not started:
            raise PoolError("worker processes must be able to start, but die at once; see that memory is free")

    def take(self, number: int, function: Callable[[Any, int], Any], job: Any, limit_s: float) -> None:
        self.number, self.deadline = number, time.monotonic() + limit_s
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `result` then finds the pipe closed
            self.pipe.send((function, job))

    def result(self) -> Any:
        """Return the result that the process has sent, or a FailedJob."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.end()
            return FailedJob("crash")
        except Exception as e:  # a result that cannot be unpickled
            return FailedJob(f"{type(e).__name__}: {e}")

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _start_worker(slot: int, workers: dict[int, _Worker]) -> None:
    with sigint_blocked():  # else Ctrl-C could reach a process that does not ignore it yet, or is not in `workers`
        workers[slot] = _Worker(slot)


def map_jobs(
    function: Callable[[Any, int], Any], jobs: Iterable[Any], n_workers: int, limit_s: float
) -> Generator[Any, None, None]:
    """Yield `function(job, slot)` for each job in order, or a FailedJob; `slot` is the number of the worker.

    A new process must be able to import the function. Raises PoolError if a worker cannot start.
    """
    queue = enumerate(jobs)
    done: dict[int, Any] = {}
    workers: dict[int, _Worker] = {}

    following, more = 0, True
    try:
        for slot in range(n_workers):
            _start_worker(slot, workers)
        for worker in workers.values():
            worker.ready()
        while more or any(w.number is not None for w in workers.values()):
            for slot in workers:
                if workers[slot].number is None and more:
                    if (item := next(queue, None)) is None:
                        more = False
                        break
                    if not workers[slot].process.is_alive():
                        workers[slot].end()
                        _start_worker(slot, workers)
                        workers[slot].ready()
                    workers[slot].take(item[0], function, item[1], limit_s)
            busy = [w for w in workers.values() if w.number is not None]
            left = min((w.deadline for w in busy), default=0.0) - time.monotonic()
            heard = wait([w.pipe for w in busy], max(0.0, left)) if busy else []
            now = time.monotonic()
            for worker in busy:
                assert worker.number is not None
                if worker.pipe in heard:
                    done[worker.number] = worker.result()
                elif now >= worker.deadline:
                    worker.end()
                    done[worker.number] = FailedJob("timeout")
                else:
                    continue
                worker.number = None
            while following in done:
                yield done.pop(following)
                following += 1
    finally:
        for worker in workers.values():
            worker.end()

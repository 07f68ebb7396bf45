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

MEMORY_BYTES = 2**30  # that a job may take
START_S = 60.0


class PoolError(KindlingError):
    """Workers that cannot start."""


@dataclass(frozen=True)
class Lost:
    """What there is of a job that has no result: `timeout` or `crash`, or the error that it raised."""

    reason: str


def _work(pipe: Connection, slot: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(ImportError, ValueError, OSError):  # neither is everywhere
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        # the hard limit stays: what the job starts may have a higher limit of its own
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, hard))
    pipe.send(os.getpid())
    while True:
        try:
            function, job = pipe.recv()
        except (EOFError, OSError):  # the parent is gone, or done
            return
        try:
            result = ForkingPickler.dumps(function(job, slot))
        except Exception as e:
            result = ForkingPickler.dumps(Lost(f"{type(e).__name__}: {e}"))
        pipe.send_bytes(result)


def _end_with_parent() -> None:
    """Wait for the end of the parent, however it comes, and end this process although it is at a job."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def sigint_blocked() -> Iterator[None]:
    """Keep Ctrl-C waiting, so that a process that starts here does not meet it before it ignores it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # the first process that starts would start it, and that unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker:
    """One process, and the job that it is at."""

    def __init__(self, slot: int):
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
            started = self.pipe.poll(START_S) and bool(self.pipe.recv())
        except (EOFError, OSError):
            started = False
        if not started:
            raise PoolError("worker processes must be able to start, but die at once; see that memory is free")

    def take(self, number: int, function: Callable[[Any, int], Any], job: Any, limit_s: float) -> None:
        self.number, self.deadline = number, time.monotonic() + limit_s
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # which the end of its pipe tells, too
            self.pipe.send((function, job))

    def result(self) -> Any:
        """Return what it has sent, or a Lost."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.end()
            return Lost("crash")
        except Exception as e:  # a result that cannot be made again from its bytes
            return Lost(f"{type(e).__name__}: {e}")

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def map_jobs(
    function: Callable[[Any, int], Any], jobs: Iterable[Any], n_workers: int, limit_s: float
) -> Generator[Any, None, None]:
    """Yield `function(job, slot)` of each job in order, or a Lost; `slot` tells the workers apart.

    The function is one of a module, so that a fresh process finds it. Raises PoolError if no worker can start.
    """
    queue = enumerate(jobs)
    done: dict[int, Any] = {}
    workers: dict[int, _Worker] = {}

    def start(slot: int) -> None:
        with sigint_blocked():  # Ctrl-C must meet no process that does not ignore it yet, or is not known here
            workers[slot] = _Worker(slot)

    following, more = 0, True
    try:
        for slot in range(n_workers):
            start(slot)
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
                        start(slot)
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
                    done[worker.number] = Lost("timeout")
                else:
                    continue
                worker.number = None
            while following in done:
                yield done.pop(following)
                following += 1
    finally:
        for worker in workers.values():
            worker.end()

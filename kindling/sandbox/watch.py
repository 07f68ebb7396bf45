"""Watches the process that judges: what it does with an answer that holds itself must end.

An answer may be a ring. A test that walks along a list until it ends would then never end itself.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

TICK_S = 0.1  # so that a test which catches the error is stopped again


class Watch:
    """A limit of this process's CPU time, from the first answer on that may be without end."""

    def __init__(self, limit_s: float, fail: Callable[[str, str], None]):
        self._limit_s, self._fail = limit_s, fail
        self._end: float | None = None
        self._before: Any = None

    def start(self) -> None:
        """Begin to watch, if nothing is watched yet. Raises ValueError where it cannot."""
        if self._end is not None:
            return
        if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
            raise ValueError("an answer that may be without end can be watched in a main thread only")
        self._end = time.process_time() + self._limit_s
        self._before = signal.signal(signal.SIGVTALRM, self._tick)
        signal.setitimer(signal.ITIMER_VIRTUAL, TICK_S, TICK_S)

    def _tick(self, *_: object) -> None:
        if self._end is not None and time.process_time() > self._end:
            self._fail("timeout", f"a test of its answers took more than {self._limit_s:g} s of CPU time")

    def stop(self) -> None:
        """Stop watching."""
        if self._end is not None:
            self._end = None
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, self._before)

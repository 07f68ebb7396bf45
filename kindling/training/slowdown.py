"""Notices that a run has become much slower than it was, and says what else the machine is doing.

    slowdown = Slowdown(clocks)
    if note := slowdown.add(n_tokens, seconds): print(note)     # after each step

Steps are gathered into spans of SPAN_S seconds at least. If the speed stays under half of the median of the spans before for
LONG_S seconds, the note is returned, once in a session. Only the time of steps counts, not that of evaluating and saving.

Limit: the load and the share of other processes are known where /proc is, as on Linux. In a container /proc/stat is the whole
machine's.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

SPAN_S = 1.0
LONG_S = 30.0
KNOWN_SPANS = 10  # spans that the median needs
KEPT_SPANS = 3600
IDLE, IOWAIT, STEAL = 3, 4, 7  # columns of /proc/stat; what comes after them is in the columns before


class Clocks(NamedTuple):
    """Seconds of CPU time, summed over all cores: of this process, of everything that runs, and of all there was."""

    own_s: float
    busy_s: float
    total_s: float


def cpu_times() -> list[int]:
    """Return the time that all cores together spent in each state, in ticks; nothing where /proc/stat is not there."""
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
    except OSError:
        return []
    return [int(column) for column in first.split()[1:]]


def read_clocks() -> Clocks | None:
    """Return the CPU times until now; None where they are not known."""
    ticks = cpu_times()[: STEAL + 1]
    if len(ticks) <= IOWAIT:
        return None
    per_s, own, total = os.sysconf("SC_CLK_TCK"), os.times(), sum(ticks)
    return Clocks(own.user + own.system, (total - ticks[IDLE] - ticks[IOWAIT]) / per_s, total / per_s)


def share_of_others(before: Clocks | None, after: Clocks | None) -> float | None:
    """Return the share of all CPU time between two readings that other processes had; None if it is not known."""
    if before is None or after is None or after.total_s <= before.total_s:
        return None
    others_s = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
    return max(0.0, min(1.0, others_s / (after.total_s - before.total_s)))


class Slowdown:
    """Follows the speed of a run."""

    def __init__(
        self, clocks: Callable[[], Clocks | None] = read_clocks, load: Callable[[], float | None] | None = None
    ):
        """`clocks` and `load` (the load average) are read when the run becomes slow, and again for the note."""
        self._clocks, self._load = clocks, load or load_average
        self._rates: deque[float] = deque(maxlen=KEPT_SPANS)  # tokens a second of each span that was not slow
        self._tokens, self._seconds = 0, 0.0  # of the span that is being gathered
        self._slow: list[tuple[int, float]] = []  # tokens and seconds of the slow spans since the last one that was not
        self._before: Clocks | None = None  # when they began
        self._said = False

    def add(self, tokens: int, seconds: float) -> str:
        """Add a step. Return the note if it is time for it, else an empty text."""
        self._tokens += tokens
        self._seconds += seconds
        if self._said or self._seconds < SPAN_S:
            return ""
        span, self._tokens, self._seconds = (self._tokens, self._seconds), 0, 0.0
        usual = median(self._rates) if len(self._rates) >= KNOWN_SPANS else 0.0
        if span[0] / span[1] >= usual / 2:
            self._rates += [tokens / seconds for tokens, seconds in self._slow]  # a short break is part of the speed
            self._rates.append(span[0] / span[1])
            self._slow = []
            return ""
        if not self._slow:
            self._before = self._clocks()
        self._slow.append(span)
        slow_tokens, slow_s = map(sum, zip(*self._slow))
        if slow_s < LONG_S:
            return ""
        self._said = True
        return self._note(slow_tokens / slow_s, usual, slow_s)

    def _note(self, rate: float, usual: float, seconds: float) -> str:
        others, load, cores = share_of_others(self._before, self._clocks()), self._load(), os.cpu_count() or 1
        known = [] if load is None else [f"the load average is {load:.1f} on {cores} cores"]
        known += [] if others is None else [f"other processes use {others:.0%} of the CPU"]
        why = f" ({', '.join(known)})" if known else ""
        return (
            f"note: training has slowed down: {rate:,.0f} tokens/s in the last {seconds:.0f} s, {usual:,.0f} before{why}; "
            f"it goes on"
        )


def load_average() -> float | None:
    """Return the load average of the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None

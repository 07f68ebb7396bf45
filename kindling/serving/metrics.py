"""Counts what the server does, and writes it in Prometheus' text format."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter

from kindling.serving.generation import Done

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # bounds of the histograms
HELP = {
    "requests": "Requests, by path and status.",
    "refused": "Connections and requests that were refused before they were read, by reason.",
    "prompt_tokens": "Tokens of prompts.",
    "cached_tokens": "Tokens of prompts whose keys and values were there already.",
    "new_tokens": "Tokens that were sampled.",
    "answers": "Answers that were generated to their end, by what ended them.",
    "cancelled": "Requests whose client went away.",
}


class Metrics:
    """Counters since the start of the server. Only the event loop's thread may use them."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._seconds = {name: [0] * (len(SECONDS) + 1) for name in ("first_token", "answer")}
        self._sums: Counter[str] = Counter()
        self.running = 0
        """Requests that are being answered."""
        self.started = time.time()

    def count(self, name: str, labels: str = "", n: int = 1) -> None:
        """Add `n` to a counter of HELP. `labels` is what stands inside the braces."""
        assert name in HELP, name
        self._counts[name, labels] += n

    def observe(self, first_s: float, all_s: float) -> None:
        """Count the times of a request: to its first event, and to its last."""
        for name, seconds in (("first_token", first_s), ("answer", all_s)):
            self._seconds[name][bisect_left(SECONDS, seconds)] += 1
            self._sums[name] += seconds  # type: ignore[assignment]  # a Counter adds floats too

    def done(self, done: Done) -> None:
        """Count a finished answer."""
        self.count("answers", f'ended_by="{done.ended_by}"')
        self.count("prompt_tokens", n=done.n_prompt)
        self.count("cached_tokens", n=done.n_cached)
        self.count("new_tokens", n=done.n_new)

    def value(self, name: str, labels: str = "") -> int:
        """Return a counter."""
        return self._counts[name, labels]

    def text(self) -> str:
        """Return all figures in the text format, version 0.0.4."""
        lines = []
        for name, said in HELP.items():
            full = f"kindling_{name}_total"
            lines += [f"# HELP {full} {said}", f"# TYPE {full} counter"]
            found = {labels: n for (of, labels), n in self._counts.items() if of == name} or {"": 0}
            lines += [f"{full}{{{labels}}} {n}" if labels else f"{full} {n}" for labels, n in sorted(found.items())]
        for name, counts in self._seconds.items():
            full = f"kindling_{name}_seconds"
            lines += [
                f"# HELP {full} Seconds from a request to its {name.replace('_', ' ')}.",
                f"# TYPE {full} histogram",
            ]
            below = 0
            for bound, n in zip((*map(str, SECONDS), "+Inf"), counts):
                below += n
                lines.append(f'{full}_bucket{{le="{bound}"}} {below}')
            lines += [f"{full}_sum {self._sums[name]:.6f}", f"{full}_count {below}"]
        for name, said, value in (
            ("running_requests", "Requests that are being answered.", self.running),
            ("start_time_seconds", "When the server started, in seconds since 1970.", round(self.started, 3)),
        ):
            lines += [f"# HELP kindling_{name} {said}", f"# TYPE kindling_{name} gauge", f"kindling_{name} {value}"]
        return "\n".join(lines) + "\n"

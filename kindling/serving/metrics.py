"""Counts what the server answers and refuses, and writes that and the scheduler's figures in Prometheus' text format."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

from kindling.serving.counters import SECONDS, Counters, Histogram


class Metrics:
    """What came in since the start of the server. Only the event loop's thread changes it."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        """By path and status."""
        self.refused: Counter[str] = Counter()
        """What was refused before it was a request, by reason."""
        self.n_left = 0
        """Clients that closed their connection before the end of the answer."""
        self.n_open = 0
        """Requests that are being read or answered."""
        self.started = time.time()

    def text(self, counters: Counters) -> str:
        """Return all figures in the text format, version 0.0.4."""
        return "".join(f"{line}\n" for line in (*self._http(), *_scheduler(counters)))

    def _http(self) -> Iterator[str]:
        by_path = {f'path="{path}",status="{status}"': n for (path, status), n in self.requests.items()}
        yield from _figure("http_requests_total", "Answers, by path and status.", by_path)
        reasons = {f'reason="{reason}"': n for reason, n in self.refused.items()}
        yield from _figure("refused_connections_total", "What was refused before it was a request.", reasons)
        yield from _figure("clients_left_total", "Clients that left before the end of an answer.", {"": self.n_left})
        yield from _figure("open_requests", "Requests that are being read or answered.", {"": self.n_open})
        started = round(self.started, 3)
        yield from _figure("start_time_seconds", "When the server started, in seconds since 1970.", {"": started})


def _scheduler(counters: Counters) -> Iterator[str]:
    ended = {f'ended_by="{ending}"': n for ending, n in counters.requests.items()}
    yield from _figure("generations_total", "Texts, by what ended them.", ended)
    for name, said, value in (
        ("prompt_tokens_total", "Tokens of prompts.", counters.prompt_tokens),
        ("cached_tokens_total", "Tokens of prompts that did not have to be run.", counters.cached_tokens),
        ("new_tokens_total", "Tokens that were sampled.", counters.new_tokens),
        ("waiting", "Texts that wait for a row.", counters.n_waiting),
        ("running", "Texts that are being generated.", counters.n_running),
        ("rows", "Texts that can be generated at once.", counters.n_rows),
    ):
        yield from _figure(name, said, {"": value})
    yield from _histogram("first_token_seconds", "From a request to its first token.", counters.first_token_s)
    yield from _histogram("token_seconds", "From a token of a text to its next one.", counters.token_s)


def _figure(name: str, said: str, values: dict[str, int] | dict[str, float]) -> Iterator[str]:
    """Yield the lines of a figure, by what stands in its braces."""
    kind = "counter" if name.endswith("_total") else "gauge"
    yield from (f"# HELP kindling_{name} {said}", f"# TYPE kindling_{name} {kind}")
    for labels, value in sorted(values.items()):
        yield f"kindling_{name}{{{labels}}} {value}" if labels else f"kindling_{name} {value}"


def _histogram(name: str, said: str, histogram: Histogram) -> Iterator[str]:
    yield from (f"# HELP kindling_{name} {said}", f"# TYPE kindling_{name} histogram")
    below = 0
    for bound, n in zip((*map(str, SECONDS), "+Inf"), histogram.counts):
        below += n
        yield f'kindling_{name}_bucket{{le="{bound}"}} {below}'
    yield from (f"kindling_{name}_sum {histogram.total:.6f}", f"kindling_{name}_count {below}")

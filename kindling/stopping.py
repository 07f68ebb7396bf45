"""Signals that end a run without losing any of it."""

from __future__ import annotations

import os
import signal
import sys


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a request to stop after the step; a second one ends the process at once.

    Not so under torchrun, which gives its ranks a time to end (--shutdown-timeout).
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> StopRequest:
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for s, handler in self._previous.items():
            signal.signal(s, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.signal is not None:
            if (
                "TORCHELASTIC_RUN_ID" in os.environ
            ):  # torchrun passes on what a scheduler may have sent to all, and kills later
                return
            os._exit(128 + number)
        self.signal = number
        os.write(2, b"\nstopping after this step, then saving; once more to stop at once, without saving\n")

    @property
    def exit_code(self) -> int:
        """128 and the signal's number, as a shell would report it; 0 without a signal."""
        return 0 if self.signal is None else 128 + self.signal


def exit_on_terminate() -> None:
    """Turn SIGTERM into SystemExit, so that a script that is told to stop cleans up behind it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

"""Signals that stop a run without losing work."""

from __future__ import annotations

import os
import signal
import sys


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a request to stop, such as after a step. A second signal ends the process at once.

    Under torchrun a second signal does nothing, because torchrun itself kills ranks after --shutdown-timeout.
    """

    def __init__(self, said: str = "stopping after this step, then saving; once more to stop at once, without saving"):
        """`said` is printed at the first signal."""
        self.signal: int | None = None
        self._said = said

    def __enter__(self) -> StopRequest:
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for s, handler in self._previous.items():
            signal.signal(s, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.signal is not None:
            # a scheduler may signal all processes, and torchrun passes its own signal on: that is no second request
            if "TORCHELASTIC_RUN_ID" in os.environ:
                return
            os._exit(128 + number)
        self.signal = number
        os.write(2, f"\n{self._said}\n".encode())

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as a shell reports it; 0 if there was no signal."""
        return 0 if self.signal is None else 128 + self.signal


def exit_on_sigterm() -> None:
    """Turn SIGTERM into SystemExit, so that a script cleans up before it ends."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

"""A process that answers requests, each in a line of JSON: to measure one way at a time, in memory of its own.

child = Child([sys.executable, "worker.py"], Path("log.txt"))
about = child.answer()                  # what it says when it is ready
found = child.ask({"seconds": 2.0}, limit_s=60)
child.close()
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

MOST = 200  # characters of a reason
REST_S = 1.0  # to read what a process that has ended has printed
ERROR = re.compile(r"error: |[\w.]*(Error|Exception|Exit)\b")


def short(text: str) -> str:
    """Return a text in one line of at most MOST characters: of a longer one, what the last error in it says."""
    whole = " ".join(text.split())
    if len(whole) <= MOST:
        return whole
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return ([line for line in lines if ERROR.match(line)] or lines)[-1][:MOST].strip()


class ChildError(Exception):
    """A process ended, or did not answer in time."""


class Child:
    """A process that reads lines of JSON from standard input, and answers each with a line of JSON."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str] | None = None):
        """Start it. What it prints to standard error goes to the file `log`."""
        self._log = log
        with open(log, "w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=env,
                start_new_session=True,  # so that its processes end with it: they hold its standard output open
            )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        threading.Thread(target=self._watch, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # other lines are what libraries print
                self._lines.put(line)

    def _watch(self) -> None:
        """Say that there are no more answers, even if a process that it started still holds its standard output."""
        self.process.wait()
        self._reader.join(REST_S)
        self._lines.put(None)

    def answer(self, limit_s: float | None = None) -> dict[str, Any]:
        """Return its next answer. Raises ChildError if it ends first, or after `limit_s` seconds."""
        try:
            line = self._lines.get(timeout=None if limit_s is None else max(0.0, limit_s))
        except queue.Empty:
            self._kill()  # or its late answer would be taken for the next one
            raise ChildError(f"no answer within {limit_s:.0f} s") from None
        if line is None:
            code = self.process.wait()
            raise ChildError(
                f"it ended with code {code}: {short(self._log.read_text(encoding='utf-8', errors='replace'))}"
            )
        return json.loads(line)

    def ask(self, request: Any, limit_s: float | None = None) -> dict[str, Any]:
        """Send a request, and return the answer. Raises ChildError as `answer` does."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except OSError:  # it has ended; `answer` says why
            pass
        return self.answer(limit_s)

    def kill(self) -> None:
        """End it and its processes at once. Who waits for an answer gets a ChildError."""
        self._kill()
        self.close()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self, patience_s: float = 30.0) -> None:
        """End it: it may finish its work for `patience_s` seconds, then it is killed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._kill()
            self.process.wait()

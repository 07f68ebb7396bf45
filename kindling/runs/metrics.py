"""The log of a run: `metrics.jsonl`, one JSON object a line, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
import math
import sys
import threading
from pathlib import Path
from typing import Any

from kindling.errors import KindlingError
from kindling.files import append_line, write_atomic


class MetricsLog:
    """Appends to `metrics.jsonl` and TensorBoard. If the disk is full, lines are lost, with one warning; the run continues."""

    def __init__(self, folder: Path, step: int):
        """Open the log at `step`. Later lines, from a run that was killed after its last checkpoint, are removed.

        Raises KindlingError if the folder cannot be written.
        """
        self.path = folder / "metrics.jsonl"
        self._warned = False
        self._hook = threading.excepthook
        try:
            self._open(step)
        except OSError as e:
            raise KindlingError(
                f"{self.path} must be writable, but is not ({e}); free some space or correct its permissions"
            ) from None
        # TensorBoard writes in a thread; hide its traceback, since we get the same error and print a warning
        threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else self._hook(args)

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        kept = [line for line in read_metrics(self.path) if line["step"] <= step > 0]
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._board = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=step + 1)

    def rewind(self, step: int) -> None:
        """Remove the lines after `step`, where the run continues."""
        try:
            self._board.close()
            self._open(step)
        except OSError as e:
            self._warn(e)

    def write(self, step: int, **values: float) -> None:
        """Append one line, and the same values to TensorBoard. In the line, numbers that are not finite become null."""
        line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            append_line(self.path, json.dumps(line))
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        except OSError as e:
            self._warn(e)

    def close(self) -> None:
        """Flush TensorBoard's file."""
        try:
            self._board.close()
        except OSError as e:
            self._warn(e)
        finally:
            threading.excepthook = self._hook

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            print(f"warning: metrics cannot be written ({error}); the run goes on without them", file=sys.stderr)
        self._warned = True


class NoLog:
    """Stands for the log on ranks that do not write one."""

    def rewind(self, step: int) -> None:
        """Do nothing."""

    def write(self, step: int, **values: float) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a `metrics.jsonl`. Lines that are not valid, such as one cut off by a kill, are left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines

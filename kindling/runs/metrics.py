"""The log of a run: `metrics.jsonl`, one JSON object a line; the same numbers as a table and for TensorBoard; samples.

`metrics.csv` has a row for each line of `metrics.jsonl`, and a column for each name in it. A line with a new name rewrites the
table, and so does each start. So after a crash the table is as good as the lines, once the run goes on.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kindling.errors import KindlingError
from kindling.files import append_line, write_atomic

SAMPLES = "training_samples.jsonl"  # with a step, a prompt and the text after it in each line


class Table:
    """`metrics.csv`: the lines of `metrics.jsonl` as rows. What a line does not have is an empty cell."""

    def __init__(self, path: Path):
        self.path = path
        self._columns: list[str] = []

    def write(self, lines: list[dict[str, Any]]) -> None:
        """Replace the table by these lines. Raises OSError if it cannot be written."""
        self._columns = []  # of a table that is not whole yet
        columns = list(dict.fromkeys(name for line in lines for name in line))
        write_atomic(self.path, "".join(_csv_row(row) + "\n" for row in (columns, *_cells(lines, columns)) if row))
        self._columns = columns

    def append(self, line: dict[str, Any], metrics: Path) -> None:
        """Append the newest line of the file `metrics`. If it has a new column, write the whole table anew."""
        if line.keys() <= set(self._columns):
            (row,) = _cells([line], self._columns)
            try:
                append_line(self.path, _csv_row(row))
            except OSError:
                self._columns = []  # the next line writes the table anew, with this one
                raise
        else:
            self.write(read_metrics(metrics))


def _cells(lines: list[dict[str, Any]], columns: list[str]) -> list[list[Any]]:
    return [[line.get(name) for name in columns] for line in lines]


def _csv_row(cells: list[Any]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="").writerow(cells)
    return out.getvalue()


class MetricsLog:
    """Appends to `metrics.jsonl`, its table, and TensorBoard.

    If the disk is full, lines are lost, with one warning; the run continues.
    """

    def __init__(self, folder: Path, step: int):
        """Open the log at `step`. Later lines, from a run that was killed after its last checkpoint, are removed.

        Raises KindlingError if the folder cannot be written.
        """
        self.path, self.samples = folder / "metrics.jsonl", folder / SAMPLES
        self.table = Table(folder / "metrics.csv")
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
        self.table.write(kept)
        if self.samples.is_file():
            shown = [line for line in read_metrics(self.samples) if line["step"] <= step > 0]
            write_atomic(self.samples, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in shown))
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
            self.table.append(line, self.path)
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        except OSError as e:
            self._warn(e)

    def write_samples(self, step: int, samples: Iterable[tuple[str, str]]) -> None:
        """Append a line to SAMPLES for each prompt and the text after it, and show them in TensorBoard."""
        try:
            for number, (prompt, text) in enumerate(samples, 1):
                line = {"step": step, "prompt": prompt, "text": text}
                append_line(self.samples, json.dumps(line, ensure_ascii=False))
                # four spaces begin a block of code in Markdown, in which nothing else is a command
                self._board.add_text(f"sample {number}", "    " + (prompt + text).replace("\n", "\n    "), step)
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

    def write_samples(self, step: int, samples: Iterable[tuple[str, str]]) -> None:
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

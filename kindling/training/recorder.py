"""The flight recorder: which files were in the batch of a step that was skipped.

    recorder = FlightRecorder(run.path, batches)
    recorder.record(step=7, first_row=192, n_rows=32, loss=math.nan, grad_norm=math.inf, limit=9.1)

appends a line to `skipped.jsonl` of the run:

    {"step": 7, "first_row": 192, "n_rows": 32, "loss": "nan", "grad_norm": "inf", "limit": 9.1, "documents": [
      {"row": 192, "at": "train:51200", "tokens": 318, "key": "lib/a.py", "source": "files", "language": "python"}, ...]}

`row` is the row's position in the run, `at` and `tokens` say which part of the document is in the row: what
`data_pipeline.py --locate train:51200` finds, and `--explain lib/a.py` tells more of. A number that JSON has no form for
is a string, "nan", "inf" or "-inf".

A run that is resumed appends to the file, so a step that is done again may be in it twice. Limits: each line reads the data
folder's log of documents, which takes seconds for each million of them; the log must still be there.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kindling.data.ledger import documents_within
from kindling.errors import one_line
from kindling.files import append_line

if TYPE_CHECKING:
    from kindling.data.shards import Batches

SKIPPED = "skipped.jsonl"


class FlightRecorder:
    """Writes down what was in a skipped step. It costs nothing until then, and whatever fails in it costs no run."""

    def __init__(self, run_path: Path, batches: Batches):
        """Rows that are not traceable, as those of a test, are recorded without their documents."""
        self.path, self.batches = run_path / SKIPPED, batches

    def record(self, *, step: int, first_row: int, n_rows: int, loss: float, grad_norm: float, limit: float) -> None:
        """Append the line of a step, whose rows are at first_row to first_row + n_rows - 1 of the run.

        Where the documents are not to be found, `documents` has the positions alone, or nothing, and `note` says why. A line
        that cannot be written is a warning.
        """
        numbers = {"loss": loss, "grad_norm": grad_norm, "limit": limit}
        line: dict[str, Any] = {"step": step, "first_row": first_row, "n_rows": n_rows}
        line |= {name: value if math.isfinite(value) else str(float(value)) for name, value in numbers.items()}
        try:
            line |= self._documents(range(first_row, first_row + n_rows))
            append_line(self.path, json.dumps(line, allow_nan=False))
        except OSError as e:
            print(f"warning: the skipped step {step} cannot be recorded ({e}); the run goes on", file=sys.stderr)

    def _documents(self, rows: range) -> dict[str, Any]:
        """Return the part of a line that says what was in these rows."""
        parts: list[tuple[int, range]] = []
        note = {}
        try:
            parts = [(row, tokens) for row in rows for tokens in self.batches.tokens_of(row)]
            split = self.batches.dataset.split
            found = documents_within(self.batches.dataset.folder, split, [tokens for _, tokens in parts])
            if not all(found):
                note = {"note": "the log of documents has none at some of these positions"}
        except Exception as e:  # whatever it is, it must not end the run
            split, found = "train", [[] for _ in parts]
            note = {"note": f"the documents are not known: {one_line(e)}"}
        return {
            "documents": [d for (row, tokens), lines in zip(parts, found) for d in _cut(row, split, tokens, lines)]
        } | note


def _cut(row: int, split: str, tokens: range, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the documents of one range of a row, as far as they are in it; without documents, the range itself."""
    out = []
    for line in lines or [{"start": tokens.start, "tokens": len(tokens)}]:
        start, stop = max(tokens.start, line["start"]), min(tokens.stop, line["start"] + line["tokens"])
        names = {name: line[name] for name in ("key", "source", "language") if name in line}
        out.append({"row": row, "at": f"{split}:{start}", "tokens": stop - start, **names})
    return out

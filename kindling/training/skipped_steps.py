"""Records which documents were in the batch of a skipped step.

    recorder = SkippedStepRecorder(run.path, batches)
    recorder.record(step=7, first_row=192, n_rows=32, loss=math.nan, grad_norm=math.inf, limit=9.1)

appends a line to `skipped.jsonl` of the run:

    {"step": 7, "first_row": 192, "n_rows": 32, "loss": "nan", "grad_norm": "inf", "limit": 9.1, "documents": [
      {"row": 192, "at": "train:51200", "tokens": 318, "key": "lib/a.py", "source": "files", "language": "python"}, ...]}

`row` is the row index. `at` and `tokens` say which part of the document is in the row: its first token in the split, and
the number of tokens. `data_pipeline.py --locate train:51200` finds the document of a token, `--explain lib/a.py` says more
about a document. Numbers that JSON cannot hold are strings: "nan", "inf" or "-inf".

A resumed run appends to the file, so a step that is done again may be in it twice. Limits: each line reads the data
folder's log of documents, which must still exist and takes seconds per million documents.
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
    from kindling.data.shards import TrainingRows

SKIPPED = "skipped.jsonl"


class SkippedStepRecorder:
    """Records what was in a skipped step. It costs nothing until then, and an error in it never ends the run."""

    def __init__(self, run_path: Path, batches: TrainingRows):
        """Rows that are not traceable, as those of a test, are recorded without their documents."""
        self.path, self.batches = run_path / SKIPPED, batches

    def record(self, *, step: int, first_row: int, n_rows: int, loss: float, grad_norm: float, limit: float) -> None:
        """Append the line of a step. Its rows have the row indices first_row to first_row + n_rows - 1.

        If documents cannot be found, `documents` has their positions only, or is empty, and `note` says why. If the line
        cannot be written, print a warning.
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
        note: dict[str, str] = {}
        try:
            parts = [(row, tokens) for row in rows for tokens in self.batches.tokens_of(row)]
            split = self.batches.dataset.split
            found = documents_within(self.batches.dataset.folder, split, [tokens for _, tokens in parts])
            if not all(found):
                note = {"note": "the log of documents has none at some of these positions"}
        except Exception as e:  # no error in here may end the run
            split, found = "train", [[] for _ in parts]
            note = {"note": f"the documents are not known: {one_line(e)}"}
        documents = [d for (row, tokens), lines in zip(parts, found) for d in _cut(row, split, tokens, lines)]
        return {"documents": documents, **note}


def _cut(row: int, split: str, tokens: range, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the documents of one range of a row, cut to the range. Without documents, return the range itself."""
    out = []
    for line in lines or [{"start": tokens.start, "tokens": len(tokens)}]:
        start, stop = max(tokens.start, line["start"]), min(tokens.stop, line["start"] + line["tokens"])
        names: dict[str, Any] = {name: line[name] for name in ("key", "source", "language") if name in line}
        out.append({"row": row, "at": f"{split}:{start}", "tokens": stop - start, **names})
    return out

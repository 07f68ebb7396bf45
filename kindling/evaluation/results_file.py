"""Reads the results that an earlier evaluation saved in a run.

results, losses = read_results(Path("runs/demo"))
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from kindling.evaluation.report import FORMAT, Losses, ReportError, Results, file_name


def read_results(run: Path, split: str = "val") -> tuple[Results, Losses]:
    """Return the content of a run's eval.json, and of its losses.jsonl if there is one.

    Raises ReportError if the run was not evaluated, was evaluated by an older version, or has damaged results.
    """
    again = f"evaluate again with `python evaluate.py {run}`"
    file = run / file_name("eval.json", split)
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReportError(
            f"{run} must be an evaluated run, but holds no {file.name}; evaluate it with `python evaluate.py {run}`"
        ) from None
    except (OSError, ValueError) as e:
        raise ReportError(f"{file} must be whole JSON, but cannot be read ({e}); {again}") from None
    if not isinstance(results, dict):
        raise ReportError(f"{file} must hold an object, but holds a {type(results).__name__}; {again}")
    if results.get("format") != FORMAT:
        given = f"format {results['format']}" if "format" in results else "the old format"
        raise ReportError(f"{file} must be of format {FORMAT}, but is of {given}; {again}")
    if "losses_sha256" not in results:
        return results, []
    return results, _read_losses(run / file_name("losses.jsonl", split), results["losses_sha256"], again)


def _read_losses(path: Path, sha256: str, again: str) -> Losses:
    """Read losses.jsonl, which must be the file that was saved together with eval.json."""
    try:
        content = path.read_bytes()
    except OSError as e:
        raise ReportError(f"{path} must be there, as eval.json says, but cannot be read ({e}); {again}") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ReportError(f"{path} must be the file that eval.json was saved with, but has changed; {again}")
    return [json.loads(line) for line in content.splitlines()]

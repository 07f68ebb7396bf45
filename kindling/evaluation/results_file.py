"""Saves the results of an evaluation in a run, and reads them again.

    save_results(Path("runs/demo"), results, losses)
    results, losses = read_results(Path("runs/demo"))

`results` is the content of eval.json. `losses` are the lines of losses.jsonl, one for each held-out document: {"document": 3,
"language": "python", "source": "local-python", "tokens": 512, "bytes": 1700, "nll": 690.1}, with nll in nats.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from kindling.errors import KindlingError
from kindling.evaluation.intervals import LossLines
from kindling.evaluation.report import HEADINGS, Results, markdown
from kindling.files import UNENCODABLE, write_atomic

FORMAT = 2  # of eval.json


class ResultsError(KindlingError):
    """Results cannot be written, read or compared."""


def read_results(run: Path, split: str = "val") -> tuple[Results, LossLines]:
    """Return the content of a run's eval.json, and of its losses.jsonl if there is one.

    Raises ResultsError if the run was not evaluated, was evaluated by an older version, or has damaged results.
    """
    again = f"evaluate again with `python evaluate.py {run}`"
    file = run / file_name("eval.json", split)
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResultsError(
            f"{run} must be an evaluated run, but holds no {file.name}; evaluate it with `python evaluate.py {run}`"
        ) from None
    except (OSError, ValueError) as e:
        raise ResultsError(f"{file} must be whole JSON, but cannot be read ({e}); {again}") from None
    if not isinstance(results, dict):
        raise ResultsError(f"{file} must hold an object, but holds a {type(results).__name__}; {again}")
    if results.get("format") != FORMAT:
        given = f"format {results['format']}" if "format" in results else "the old format"
        raise ResultsError(f"{file} must be of format {FORMAT}, but is of {given}; {again}")
    if "losses_sha256" not in results:
        return results, []
    return results, _read_losses(run / file_name("losses.jsonl", split), results["losses_sha256"], again)


def _read_losses(path: Path, sha256: str, again: str) -> LossLines:
    """Read losses.jsonl, which must be the file that was saved together with eval.json."""
    try:
        content = path.read_bytes()
    except OSError as e:
        raise ResultsError(f"{path} must be there, as eval.json says, but cannot be read ({e}); {again}") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ResultsError(f"{path} must be the file that eval.json was saved with, but has changed; {again}")
    return [json.loads(line) for line in content.splitlines()]


def file_name(name: str, split: str) -> str:
    """Return the name of a file of results. For another split than the validation split, it contains the split's name."""
    stem, _, suffix = name.partition(".")
    return name if split == "val" else f"{stem}-{split}.{suffix}"


def save_results(run_path: Path, results: Results, losses: LossLines | None = None) -> list[str]:
    """Write eval.json, eval.md and losses.jsonl into a run, each as a whole or not at all; return their names.

    eval.json is written last and contains the hash of losses.jsonl, to show that both belong together. Without losses, the
    losses.jsonl of an earlier evaluation is removed. Numbers that are not finite become null. Another split than the validation
    split has its own files. Raises ResultsError if the folder cannot be written.
    """
    split = results.get("split", "val")
    names = [file_name(name, split) for name in ("losses.jsonl", "eval.md", "eval.json")]
    name = names[0]
    lines = "".join(_json(line) + "\n" for line in losses or [])
    try:
        if lines:
            write_atomic(run_path / name, lines)
            results = {**results, "losses_sha256": hashlib.sha256(lines.encode("utf-8", UNENCODABLE)).hexdigest()}
        else:
            (run_path / name).unlink(missing_ok=True)
        name = names[1]
        write_atomic(run_path / name, markdown(results, losses))
        name = names[2]
        write_atomic(run_path / name, _json(results, indent=1) + "\n")
    except OSError as e:
        raise ResultsError(
            f"{run_path} must be writable for {name}, but is not ({e}); free some space or fix its permissions"
        ) from None
    return names[::-1] if lines else names[:0:-1]


def with_earlier(results: Results, run_path: Path) -> Results:
    """Return the results, with the parts that only an earlier evaluation of the same weights and split has."""
    try:
        path = run_path / file_name("eval.json", results["split"])
        earlier = json.loads(path.read_text(encoding="utf-8"))
        same = all(earlier[key] == results[key] for key in ("format", "weights_sha256", "split"))
    except (OSError, ValueError, KeyError, TypeError):
        return results
    kept = [name for name in HEADINGS if name in earlier and name not in results] if same else []
    return results | {name: earlier[name] for name in kept} | ({"kept": kept} if kept else {})


def _json(content: Any, indent: int | None = None) -> str:
    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): finite(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(content), indent=indent, allow_nan=False)

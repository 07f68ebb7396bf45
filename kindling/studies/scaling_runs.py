"""The runs of a scaling study: what each one says to the law, from its config.yaml, metrics.jsonl and data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from kindling.errors import CheckpointError, ConfigError
from kindling.runs.checkpoint import RunDirectory
from kindling.runs.metrics import read_metrics
from kindling.studies.scaling import RUNS, Plan, matmul_parameters, run_name


@dataclass(frozen=True)
class RunFigures:
    """What a run says to the law."""

    name: str
    parameters: int  # of blocks and head
    tokens: int
    bits_per_byte: float
    seconds: float  # of its training steps
    passes: float  # over its training split

    @property
    def flop(self) -> float:
        """6 N D."""
        return 6.0 * self.parameters * self.tokens


def read_run(folder: Path) -> RunFigures | None:
    """Return the figures of a finished run; None if it is not there, not finished, or has no finite loss."""
    run = RunDirectory(folder)
    try:
        cfg = run.config()
        train = json.loads((run.data / "manifest.json").read_text(encoding="utf-8"))["splits"]["train"]["tokens"]
    except (CheckpointError, ConfigError, OSError, ValueError, KeyError):
        return None
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["step"] == cfg.train.max_steps]
    losses = [line["val_bits_per_byte"] for line in lines if line.get("val_bits_per_byte") is not None]
    if not losses:
        return None
    seconds = max((line.get("elapsed_s") or 0.0 for line in lines), default=0.0)
    # the last one is of the whole split
    return RunFigures(folder.name, matmul_parameters(cfg.model), cfg.tokens, losses[-1], seconds, cfg.tokens / train)


def read_runs(folder: Path, plan: Plan) -> tuple[list[RunFigures], RunFigures | None, list[str]]:
    """Return the runs to fit, the held-out run if it is there, and the names of the runs that are missing."""
    names = [run_name(*run) for run in plan.fitted]
    found = [read_run(folder / RUNS / name) for name in names]
    held_out = read_run(folder / RUNS / run_name(*plan.held_out))
    return [run for run in found if run is not None], held_out, [n for n, run in zip(names, found) if run is None]


def metrics_file(run: str) -> str:
    """Return the file of a run's losses, as tables show it."""
    return f"{RUNS}/{run}/metrics.jsonl"

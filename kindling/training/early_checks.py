"""Refuses, before torch is imported, a training that could not start: importing torch takes seconds.

check_inputs(cfg, run, resuming, tokenizer)     # in main.py and sft_train.py; stage.py checks what else must hold

KEEPS_EVERY_BIT and MAY_CHANGE are the settings that a resumed run may change.
"""

from __future__ import annotations

import os
from pathlib import Path

from config import Config
from kindling.config_io import changed_fields
from kindling.data.build import require_inputs
from kindling.errors import CheckpointError, KindlingError
from kindling.paths import expand_home, holds_hub_model
from kindling.runs.checkpoint import RunDirectory
from kindling.runs.loading import find_run
from kindling.tokenization.tokenizer import Tokenizer

# settings that a resumed run may change. These keep every bit of the result
KEEPS_EVERY_BIT = {"data.workers"} | {
    f"train.{field}"
    for field in (
        "sample_prompts",
        "sample_every",
        "held_out_answers",
        "log_every",
        "eval_every",
        "save_every",
        "keep_checkpoints",
        "activation_checkpointing",
    )
}
# the others may change the result, and print a note
MAY_CHANGE = KEEPS_EVERY_BIT | {
    f"train.{field}"
    for field in (
        *("max_steps", "epochs", "max_minutes", "threads", "device", "precision", "compile", "micro_batch_size"),
        *("deterministic", "spike_ratio", "max_skipped_steps"),
    )
}


def check_inputs(cfg: Config, run: RunDirectory, resuming: bool, tokenizer: Tokenizer | None = None) -> None:
    """Raise KindlingError if a run cannot be resumed with `cfg`, or if what a new run starts from is missing.

    `tokenizer` as in `build.prepare`. Under torchrun, nothing is checked here: only the main rank may ask for the data.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return
    if resuming:
        config_changes(run.config(), cfg, run)
        return
    if cfg.train.init_from is not None and not holds_hub_model(path := init_path(cfg.train.init_from)):
        run_with_checkpoint(path)
    require_inputs(cfg, tokenizer)


def config_changes(saved: Config, given: Config, run: RunDirectory) -> dict[str, str]:
    """Return the settings that differ from the saved ones, as texts. Raises KindlingError if one of them must not change."""
    changes = changed_fields(saved, given)
    changes.pop("name", None)
    said = {field: f"{field} {old!r} -> {new!r}" for field, (old, new) in changes.items()}
    refused = [text for field, text in said.items() if field not in MAY_CHANGE]
    if refused:
        raise KindlingError(
            f"{run.path} must be resumed with the config that it was started with, but these differ: {'; '.join(refused)}; "
            f"undo these changes, or use another --name, or start over with --fresh"
        )
    return said


def init_path(source: str) -> Path:
    """Return the folder that `train.init_from` names."""
    return expand_home(source, "--train.init-from")


def run_with_checkpoint(source: Path) -> RunDirectory:
    """Return the run that `train.init_from` names. Raises CheckpointError if there is none, or it has no checkpoint."""
    run = find_run(source)
    if not run.checkpoints():
        raise CheckpointError(
            f"train.init_from must name a run with a checkpoint, but {run.path} has none; train it first"
        )
    return run

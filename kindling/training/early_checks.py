"""Refuses, before torch is imported, a training that could not start: importing torch takes seconds.

check_inputs(cfg, run, resuming, tokenizer)     # in main.py and sft_train.py; stage.py checks what else must hold

KEEPS_EVERY_BIT and MAY_CHANGE are the settings that a resumed run may change; one that extends another, SCHEDULE too.
"""

from __future__ import annotations

import os
from pathlib import Path

from config import Config, TrainConfig
from kindling.config_io import changed_fields
from kindling.data.build import require_inputs
from kindling.errors import CheckpointError, ConfigError, KindlingError
from kindling.paths import expand_home, holds_hub_model
from kindling.runs.checkpoint import RunDirectory
from kindling.runs.loading import find_run
from kindling.tokenization.tokenizer import Tokenizer
from kindling.training.schedule import has_stable_part

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
# what a run that extends another may change, too: the part of the schedule after the branch
SCHEDULE = {
    f"train.{field}" for field in ("max_steps", "epochs", "max_minutes", "schedule", "decay_fraction", "min_lr_ratio")
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
    if cfg.train.extend is not None:
        run_to_extend(cfg, run)
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


def run_to_extend(cfg: Config, run: RunDirectory) -> RunDirectory:
    """Return the run that `train.extend` names. Raises KindlingError if `run`, with `cfg`, cannot go on from it."""
    assert cfg.train.extend is not None
    origin = find_run(expand_home(cfg.train.extend, "--train.extend"))
    if origin.path.resolve() == run.path.resolve():
        raise ConfigError(
            f"name must differ from that of the run that is extended, but is {cfg.run_name!r}; choose another --name"
        )
    began = origin.config()
    for whose, train in ((f"{origin.path} had", began.train), ("this run has", cfg.train)):
        if not has_stable_part(train):
            raise ConfigError(
                f"train.extend needs a learning rate that stays at its peak before it decays, but {whose} schedule "
                f"{train.schedule} and decay_fraction {train.decay_fraction:g}; set --train.decay-fraction 0.2 in both runs, or "
                f"start from the last weights with --train.init-from {origin.path}"
            )
    changes = changed_fields(began, cfg)
    if refused := sorted(changes.keys() - MAY_CHANGE - SCHEDULE - {"name", "train.extend"}):
        said = "; ".join(f"{field} {changes[field][0]!r} -> {changes[field][1]!r}" for field in refused)
        raise ConfigError(
            f"train.extend must keep the settings of {origin.path} but for the end and the decay, but these differ: {said}; undo "
            f"these changes, or start from its weights with --train.init-from {origin.path}"
        )
    if _plan(cfg.train) == _plan(began.train):
        minutes = cfg.train.max_minutes is not None
        raise ConfigError(
            f"train.extend must come with another end or decay than {origin.path} has, but both are the same; set "
            f"--train.{'max-minutes' if minutes else 'max-steps'}"
        )
    return origin


def _plan(train: TrainConfig) -> tuple[object, ...]:
    """Return the end of a run and its decay."""
    end = (train.max_steps, None if train.max_steps else train.epochs)  # not read in a run by minutes
    return train.max_minutes or end, train.schedule, train.decay_fraction, train.min_lr_ratio


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

"""Goes on with a run as a new run with another end, from the last checkpoint before the learning rate decays.

    python main.py --train.extend runs/demo --train.max-steps 3000 --name longer

The new run begins as a copy of that checkpoint and is then resumed. So it ends with the same bits as a run that was planned for
its end from the start. early_checks.py says what may not differ from the run that is extended.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from config import Config, TrainConfig
from kindling.data.examples import training_rows
from kindling.data.shards import TokenDataset
from kindling.distributed import World
from kindling.errors import CheckpointError, ConfigError
from kindling.runs.checkpoint import RunDirectory, load_state, verify
from kindling.runs.metrics import SAMPLES
from kindling.tokenization.tokenizer import Tokenizer
from kindling.training.early_checks import run_to_extend
from kindling.training.schedule import decay_scale, fraction_done
from kindling.training.skipped_steps import SKIPPED
from kindling.training.start_or_resume import data_of_run

RECORDS = ("metrics.jsonl", SAMPLES, SKIPPED)  # a resumed run removes the lines of metrics and samples after its step


def begin_extension(cfg: Config, run: RunDirectory, tokenizer: Tokenizer | None, world: World) -> TokenDataset:
    """Create `run` with the newest checkpoint of `train.extend` that is before both decays: its own and that of `cfg`.

    Return the training data of both. `tokenizer` as in `build.prepare`. An old run of this name is kept. Every rank of `world`
    must call it. Raises KindlingError if there is no such checkpoint.
    """
    origin = world.on_main(lambda: run_to_extend(cfg, run))
    dataset = world.main_first(lambda: data_of_run(cfg, origin, tokenizer))
    world.on_main(lambda: _copy_of(cfg, run, origin, dataset))
    return dataset


def _copy_of(cfg: Config, run: RunDirectory, origin: RunDirectory, dataset: TokenDataset) -> None:
    """Create `run` with a checkpoint of `origin`."""
    folder, state = branch(origin, cfg.with_steps(training_rows(cfg, dataset).n_rows).train)
    if run.exists() or run.checkpoints():
        print(f"the old run is kept as {run.keep_as_old()}")
    # the best checkpoint so far is not in the new run's folder
    run.copy_checkpoint(folder, {**state, "best": None, "extended_from": state["step"]})
    for name in RECORDS:
        if (origin.path / name).is_file():
            shutil.copyfile(origin.path / name, run.path / name)
    run.create(cfg, dataset.folder)  # last: now the folder is a run
    print(f"{run.path} goes on from step {state['step']} of {origin.path}")


def branch(origin: RunDirectory, train: TrainConfig) -> tuple[Path, dict[str, Any]]:
    """Return the newest checkpoint before the decay of `origin` and before that of `train`, and its training state.

    `train` must have its number of steps. Raises ConfigError if its end is too early for all checkpoints before the decay,
    CheckpointError if there are none.
    """
    state = None
    for folder, state in _before_decay(origin):
        if _fits(state, train):
            return folder, state
    if state is None:
        raise CheckpointError(
            f"{origin.path} must have a checkpoint from before its learning rate decays, but has none, as runs of earlier "
            f"versions; train it again, or start from its last weights with --train.init-from {origin.path}"
        )
    given: float | None
    least: float
    if train.max_minutes is not None:
        flag, given, least = "max-minutes", train.max_minutes, _least_minutes(state, train)
    else:
        flag, given, least = "max-steps", train.max_steps, _least_steps(state, train)
    raise ConfigError(
        f"--train.{flag} must be at least {least}, so that the run ends and decays after step {state['step']}, "
        f"from where it goes on with {origin.path}, but is {given}; choose a later end, or a smaller --train.decay-fraction"
    )


def _before_decay(origin: RunDirectory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the whole checkpoints from before the decay and their training states, the newest first."""
    for folder in reversed(origin.checkpoints()):
        try:
            verify(folder)
            state = load_state(folder)
        except CheckpointError as e:
            print(f"warning: {e}; looking for one before it", file=sys.stderr)
            continue
        if state.get("decay_step", 0) is None:  # a run of an earlier version did not note it
            yield folder, state


def _fits(state: dict[str, Any], train: TrainConfig) -> bool:
    """Return whether the steps that a checkpoint has done are before the decay of `train`, and its end is later."""
    step, elapsed_s = state["step"], state["elapsed_s"]
    return decay_scale(step - 1, elapsed_s, train) == 1 and fraction_done(step, elapsed_s, train) < 1


def _least_steps(state: dict[str, Any], train: TrainConfig) -> int:
    steps = state["step"] + 1
    while not _fits(state, replace(train, max_steps=steps)):
        steps += 1
    return steps


def _least_minutes(state: dict[str, Any], train: TrainConfig) -> float:
    share = 1.0 if train.schedule == "constant" else 1 - train.decay_fraction
    return math.ceil(10 * state["elapsed_s"] / 60 / share) / 10

"""Going back to an older checkpoint after too many skipped steps in a row.

A single bad step is skipped (guard.py). Many in a row mean that the weights or the data are bad. The run then goes back to
the newest checkpoint from before the first of them, and leaves their rows out. If this happens more than MAX_ROLLBACKS times,
the run ends.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from config import TrainConfig
from kindling.distributed import World
from kindling.errors import KindlingError
from kindling.runs.checkpoint import RunDirectory
from kindling.training.state import TrainingState

MAX_ROLLBACKS = 3


class TrainingError(KindlingError):
    """A run cannot continue."""


class Rollback(NamedTuple):
    """A series of skipped steps that is long enough for the run to go back."""

    n_steps: int
    first_step: int
    first_row: int
    end_row: int  # of the rows to leave out


def rollback_after(state: TrainingState, train: TrainConfig, row: int) -> Rollback | None:
    """Return the rollback that is due after the step whose batch begins at `row`, or None."""
    if state.skipped_in_a_row < train.max_skipped_steps:
        return None
    return Rollback(state.skipped_in_a_row, *state.streak, state.next_row(row, train.batch_size))


def checkpoint_before(
    rollback: Rollback, run: RunDirectory, state: TrainingState, train: TrainConfig, world: World
) -> Path:
    """Return the newest checkpoint from before the skipped steps, and rename later ones. Every rank must call it.

    Raises TrainingError if there is none, or after MAX_ROLLBACKS rollbacks.
    """
    folder = None
    if state.rollbacks < MAX_ROLLBACKS:
        folder = world.on_main(lambda: run.roll_back_to(rollback.first_step))
    if folder is None:
        again = f" after {state.rollbacks} rollbacks" if state.rollbacks else ""
        raise TrainingError(
            f"training must skip fewer than {train.max_skipped_steps} steps in a row, but skipped {rollback.n_steps}{again} "
            f"(loss or gradient not finite, or a gradient spike); resume with --train.precision fp32 or --train.spike-ratio 0, "
            f"or start over with --fresh and a lower --train.lr or --train.eps 1e-5"
        )
    return folder


def after_rollback(
    loaded: TrainingState, before: TrainingState, rollback: Rollback, train: TrainConfig
) -> TrainingState:
    """Return the state to continue from: the checkpoint's, with the bad rows excluded and the counts kept.

    `loaded` is the state in the checkpoint, `before` the state at the time of the rollback.
    """
    state = replace(
        loaded,
        skipped=before.skipped,
        elapsed_s=before.elapsed_s,
        evaluation_s=before.evaluation_s,
        excluded_rows=[*before.excluded_rows, (rollback.first_row, rollback.end_row)],
        rollbacks=before.rollbacks + 1,
        skipped_in_a_row=0,
    )
    # the row that came next may be excluded now, so compute it again
    state.row_index = state.next_row(state.row_index - train.batch_size, train.batch_size)
    return state

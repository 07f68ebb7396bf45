"""Going back to an older checkpoint after too many skipped steps in a row.

A single bad step is skipped (guard.py). Many in a row mean that the weights or the data are bad. The run then goes back to
the newest checkpoint from before the first of them, and leaves their rows out. If this happens more than MAX_ROLLBACKS times, or
there is no such checkpoint, the run ends; but if losses and gradients were finite and are clipped, it goes on with them.
"""

from __future__ import annotations

from dataclasses import replace

from kindling.errors import KindlingError
from kindling.runs.checkpoint import load_state
from kindling.training.trainer import Trainer

MAX_ROLLBACKS = 3


class TrainingError(KindlingError):
    """A run cannot continue."""


def roll_back(trainer: Trainer) -> bool:
    """Restore the newest checkpoint from before the skipped steps. Their rows are left out from now on.

    It is called when the last of them is finished, and none is in flight. If there is no such checkpoint, or after MAX_ROLLBACKS
    rollbacks, larger gradients that are finite and are clipped count as usual from now on. Every rank must call it. Return
    whether the run went back. Raises TrainingError if nothing helps.
    """
    before, train, on_main = trainer.state, trainer.train, trainer.world.on_main
    n_steps, (first_step, first_row), end_row = before.skipped_in_a_row, before.streak, before.row_index
    folder = None
    if before.rollbacks < MAX_ROLLBACKS:
        folder = on_main(lambda: trainer.run.newest(before=first_step))
    if folder is None and train.grad_clip and trainer.guard.accept_new_level():
        before.skipped_in_a_row = 0
        why = "no checkpoint is from before them"
        if before.rollbacks:
            why = f"the run has gone back {before.rollbacks} time{'s' * (before.rollbacks > 1)} already"
        trainer.say(
            f"warning: {n_steps} steps in a row were skipped for gradients over {train.spike_ratio:g} times the usual, "
            f"and {why}: from here on they are clipped to {train.grad_clip:g} and count as usual"
        )
        return False
    if folder is None:
        again = f" after {before.rollbacks} rollbacks" if before.rollbacks else ""
        raise TrainingError(
            f"training must skip fewer than {train.max_skipped_steps} steps in a row, but skipped {n_steps}{again} "
            f"(loss or gradient not finite, or a gradient spike); resume with --train.precision fp32 or --train.spike-ratio 0, "
            f"or start over with --fresh and a lower --train.lr or --train.eps 1e-5"
        )
    on_main(lambda: trainer.run.abandon_from(first_step))
    trainer.resume(folder, load_state(folder))
    # the checkpoint's state, with the bad rows excluded and the counts kept
    state = trainer.state = replace(
        trainer.state,
        skipped=before.skipped,
        elapsed_s=before.elapsed_s,
        evaluation_s=before.evaluation_s,
        excluded_rows=[*before.excluded_rows, (first_row, end_row)],
        rollbacks=before.rollbacks + 1,
        skipped_in_a_row=0,
    )
    # the row that came next may be excluded now, so compute it again
    state.row_index = state.next_row(state.row_index - train.batch_size, train.batch_size)
    trainer.say(
        f"warning: {n_steps} steps in a row were skipped: back to step {state.step}, without the "
        f"{end_row - first_row:,} rows of those steps"
    )
    return True

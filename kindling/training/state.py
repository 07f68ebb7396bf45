"""What is saved of a run besides its weights, optimisers and random state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

# fields with another name in the file, the name that earlier versions of the code gave them
NAMES_IN_FILE = {"row_index": "position", "excluded_rows": "avoided"}
# fields that files of earlier versions may lack
NEWER = {"first_eval", "last_eval_step", "initial_sha256", "streak", "excluded_rows", "rollbacks"}
NEWER |= {"validation_rows", "last_point", "evaluation_s", "decay_step", "extended_from"}


@dataclass
class TrainingState:
    """The progress of a run. With weights, optimisers, random state, config and data, it determines every later step."""

    step: int = 0
    """Optimiser steps done, skipped ones included."""
    row_index: int = 0
    """The row of the data at which the next batch begins."""
    elapsed_s: float = 0.0
    """Seconds spent on steps and on compiling, in all sessions. Evaluating and saving do not count."""
    best: dict[str, float] | None = None
    """`step` and `val_loss` of the best checkpoint that is on disk."""
    first_eval: dict[str, float] = field(default_factory=dict)
    """The evaluation before the first step."""
    last_point: dict[str, float] = field(default_factory=dict)
    """The newest evaluation on the same rows as `first_eval`."""
    last_eval: dict[str, float] = field(default_factory=dict)
    """The newest evaluation: at the end of a run, of the whole split if there was time."""
    last_eval_step: int | None = None
    """The step of the newest evaluation."""
    validation_rows: int | None = None
    """The rows of the validation split that every evaluation during the run reads. None: all."""
    evaluation_s: float = 0.0
    """Seconds spent on evaluations and samples, in all sessions."""
    initial_sha256: str | None = None
    """sha256 of the weights that the run started from, if they come from another run."""
    skipped: int = 0
    """Steps that were skipped: the loss or the gradient was not finite, or the gradient norm was an outlier."""
    skipped_in_a_row: int = 0
    """Skipped steps since the last good one."""
    streak: tuple[int, int] = (0, 0)
    """The first step of the current series of skipped steps: its number and its first row."""
    excluded_rows: list[tuple[int, int]] = field(default_factory=list)
    """Ranges of rows (first, end) that a rollback left out."""
    rollbacks: int = 0
    """How often the run went back to an older checkpoint."""
    decay_step: int | None = None
    """The steps done when the learning rate began to decay. None: not yet. 0: unknown, in a run of an earlier version."""
    extended_from: int | None = None
    """The step at which the run went on from another one (`train.extend`)."""

    @property
    def whole_is_evaluated(self) -> bool:
        """Whether `last_eval` is of the whole validation split."""
        return self.validation_rows is None or self.last_eval != self.last_point

    def next_row(self, row: int, batch_size: int) -> int:
        """Return the row at which the batch after the one at `row` begins. Excluded rows are left out."""
        row += batch_size
        for first, end in sorted(self.excluded_rows):
            if first <= row < end:
                row = end
        return row

    def to_dict(self) -> dict[str, Any]:
        """Return the state as plain values, under the names in the file."""
        return {NAMES_IN_FILE.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> TrainingState:
        """Return the state that `to_dict` saved. Files of earlier versions of the code may lack some fields."""
        keys = {name: NAMES_IN_FILE.get(name, name) for name in cls.__dataclass_fields__}
        state = cls(**{name: saved[key] for name, key in keys.items() if key in saved or name not in NEWER})
        state.streak = (state.streak[0], state.streak[1])
        if "last_eval_step" not in saved:
            state.last_eval_step = state.step
        if "decay_step" not in saved:
            state.decay_step = 0
        return state

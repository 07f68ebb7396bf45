"""When a run is evaluated, on how much of its validation split, and when it shows samples.

    evaluations = Evaluations(trainer, log, bar)
    evaluations.begin()                         # before the first step: the untrained model
    if evaluations.due(): improved = evaluations.evaluate()
    evaluations.sample()                        # if a sample is due

A run is evaluated before its first step and at ten points at least. If the whole split takes more than WHOLE_SHARE of the run,
these evaluations read a part of its rows, always the same, so that they can be compared; the best checkpoint is chosen by
them. The end reads the whole split once more. A run by steps computes the size of the part from its config, so it does not
depend on the machine. A run by minutes measures the speed first.

In a run by minutes, evaluations that would take more than POINTS_LIMIT of the minutes are left out, and so is the whole split at
the end beyond TOTAL_LIMIT. So a run of a minute ends within a minute and a half on a slow machine too. Saving, answers and
samples after the end are not part of this.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from tqdm import tqdm

from config import Config, TrainConfig
from kindling.runs.fsdp import is_sharded
from kindling.runs.metrics import MetricsLog, NoLog
from kindling.training.progress import ProgressBar
from kindling.training.samples import draw_samples
from kindling.training.trainer import Trainer
from model import LanguageModel

POINTS = 10  # evaluations in a run, if train.eval_every is None
LONGEST_INTERVAL = 1000  # steps
WHOLE_SHARE = 0.02  # of the run: a whole split that takes longer is evaluated in part
PART_SHARE = 0.002  # of the run, for a part
PART_TOKENS = 16_384  # of a part, at least: fewer say too little
FORWARD_SHARE = 1 / 3  # of a step: a backward pass computes twice as much as a forward pass
POINTS_LIMIT, TOTAL_LIMIT = 0.2, 0.4  # of train.max_minutes
SAMPLE_TOKENS = 64


def steps_between(train: TrainConfig) -> int | None:
    """Return the steps from one evaluation to the next. None: at each tenth of the minutes of the run."""
    if train.eval_every is not None or train.max_minutes is not None:
        return train.eval_every
    assert train.max_steps is not None, "Config.with_steps sets it"
    return max(1, min(LONGEST_INTERVAL, train.max_steps // POINTS))


def part_of_split(cfg: Config, n_rows: int, row_s: float | None = None) -> int | None:
    """Return how many of `n_rows` rows the evaluations during a run read; None: all.

    `row_s` is the measured time of a row, for a run by minutes. A run by steps does not need it.
    """
    train = cfg.train
    if train.max_minutes is not None:
        assert row_s is not None
        affordable = 60 * train.max_minutes / row_s  # rows in the time of the whole run
    else:
        assert train.max_steps is not None, "Config.with_steps sets it"
        affordable = train.max_steps * train.batch_size / FORWARD_SHARE
    most = WHOLE_SHARE * affordable
    if n_rows <= most:
        return None
    least = math.ceil(PART_TOKENS / cfg.model.block_size)
    if train.max_minutes is not None:
        least = min(least, int(most))
    part = max(1, least, int(PART_SHARE * affordable))
    return part if part < n_rows else None


class Evaluations:
    """The evaluations and samples of one session of training. Neither changes a bit of it."""

    def __init__(self, trainer: Trainer, log: MetricsLog | NoLog, bar: ProgressBar):
        assert trainer.validation is not None, "a trainer without one is only measured"
        self.trainer, self.train, self.log, self.bar = trainer, trainer.train, log, bar
        self.validation = trainer.validation
        self.every = steps_between(trainer.train)
        self._tenths = self._tenths_done()
        self._last_s = 0.0  # that the newest evaluation took
        self._said = False

    def begin(self) -> None:
        """Evaluate the model of a new run, before its first step."""
        trainer, state, validation = self.trainer, self.trainer.state, self.validation
        if self.train.sample_every and is_sharded(trainer.model):
            trainer.say("note: a model that is sharded (fsdp) shows its samples at the end of the run only")
        if state.step:
            return
        n_rows, row_s, started = validation.n_rows_of_split(trainer.model), None, time.perf_counter()
        if self.train.max_minutes is not None:
            row_s = validation.row_s(trainer.model)
            self._count(started)
        state.validation_rows = validation.part = part_of_split(trainer.cfg, n_rows, row_s)
        state.first_eval = state.last_point = self._run(validation)

    def due(self) -> bool:
        """Return whether to evaluate after the newest step."""
        if self.trainer.share() >= 1:
            return True
        return self._tenths_done() > self._tenths if self.every is None else self.trainer.state.step % self.every == 0

    def evaluate(self) -> bool:
        """Evaluate, and return whether the loss is the best so far. If it is, set `state.best` to this step.

        At the end of the run, evaluate the whole split too.
        """
        state, finished = self.trainer.state, self.trainer.share() >= 1
        self._tenths = self._tenths_done()
        if not finished and not self._fits(self._last_s, POINTS_LIMIT):
            self._say_once("some evaluations are left out")
            return False
        state.last_point, state.last_eval_step = self._run(self.validation), state.step
        state.last_eval = state.last_point
        loss = state.last_point["val_loss"]
        improved = math.isfinite(loss) and (state.best is None or loss < state.best["val_loss"])
        if improved:
            state.best = {"step": state.step, "val_loss": loss}
        if finished and state.validation_rows is not None:
            n_rows = self.validation.n_rows_of_split(self.trainer.model)
            if self._fits(self._last_s * n_rows / state.validation_rows, TOTAL_LIMIT):
                state.last_eval = self._run(self.validation.whole, whole=True)
            else:
                self._say_once(f"the last validation is of {state.validation_rows:,} of {n_rows:,} rows")
        return improved

    def sample(self) -> None:
        """Draw, print and record samples, if they are due after the newest step."""
        trainer, every = self.trainer, self.train.sample_every
        if not every or trainer.state.step % every or not self._fits(0.0, POINTS_LIMIT) or is_sharded(trainer.model):
            return
        started, finished = time.perf_counter(), trainer.share() >= 1
        if trainer.world.main:
            samples = draw_samples(trainer, SAMPLE_TOKENS)
            self.log.write_samples(trainer.state.step, samples)
            for prompt, text in () if finished else samples:  # the script shows longer ones at the end
                before = "" if trainer.cfg.data.instructions else prompt  # as at the end
                tqdm.write(f"--- step {trainer.state.step}, from {prompt!r}\n{(before + text).rstrip()}")
            self.bar.refresh()
        self._count(started)

    def _run(self, evaluate: Callable[[LanguageModel], dict[str, float]], whole: bool = False) -> dict[str, float]:
        """Evaluate; log, print and return the figures. `whole`: the other points are of a part of the split."""
        step, started = self.trainer.state.step, time.perf_counter()
        result = evaluate(self.trainer.model)
        self._last_s = self._count(started)
        self.log.write(step, **result)
        named = {name.replace("_", " "): value for name, value in result.items() if name != "val_tokens"}
        figures = ", ".join(f"{name} {value:.4f}" for name, value in named.items())
        of = (
            f" (on {result['val_tokens']:,} tokens{', the whole split' if whole else ''})"
            if "val_tokens" in result
            else ""
        )
        tqdm.write(f"step {step}: {figures}{of}")
        self.bar.refresh()
        return result

    def _count(self, started: float) -> float:
        """Add the seconds since `started`, of the slowest rank, to the time of evaluations, and return them."""
        (seconds,) = self.trainer.world.max([time.perf_counter() - started])
        self.trainer.state.evaluation_s += seconds
        return seconds

    def _tenths_done(self) -> int:
        return int(POINTS * self.trainer.share())

    def _fits(self, seconds: float, limit: float) -> bool:
        """Return whether so many seconds more are within this share of the minutes. In a run by steps everything is."""
        minutes = self.train.max_minutes
        return minutes is None or self.trainer.state.evaluation_s + seconds <= limit * 60 * minutes

    def _say_once(self, what: str) -> None:
        if not self._said or self.trainer.share() >= 1:
            self.trainer.say(
                f"note: evaluating is too slow for train.max_minutes {self.train.max_minutes:g}, so {what}"
            )
        self._said = True

"""The training loop, for pre-training and fine-tuning: step, log, evaluate, save, until the end of the run or a signal.

exit_code = fit(trainer)
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from dataclasses import dataclass, field

from kindling import device
from kindling.runs.metrics import MetricsLog, NoLog
from kindling.stopping import StopRequest
from kindling.training.compilation import wants_compile
from kindling.training.evaluations import Evaluations
from kindling.training.out_of_memory import out_of_memory
from kindling.training.progress import ProgressBar
from kindling.training.rollback import roll_back
from kindling.training.schedule import decay_scale, has_stable_part
from kindling.training.slowdown import Slowdown
from kindling.training.trainer import LaunchedStep, Trainer


@dataclass
class Window:
    """The steps since the last line of the log: those not finished yet, and sums over the finished ones."""

    launched: deque[LaunchedStep] = field(default_factory=deque)
    loss: float = 0.0  # nats
    n_targets: int = 0
    seconds: float = 0.0
    norm: float = 0.0  # of the newest step


def fit(trainer: Trainer) -> int:
    """Train to `max_steps`, or for `max_minutes`; return 0, or 130 / 143 after a signal. The run is saved in each case.

    Raises TrainingError if too many steps in a row are skipped and nothing of rollback.py helps, CheckpointError if the last
    save fails, OutOfMemoryError if a step does not fit into the memory of the device.
    """
    state, main = trainer.state, trainer.world.main
    trainer.model.train()
    try:
        with device.deterministic_kernels(trainer.train.deterministic, trainer.runtime):
            compile_and_prepare(trainer)
            with (
                StopRequest() as stop,
                contextlib.closing(MetricsLog(trainer.run.path, state.step) if main else NoLog()) as log,
                ProgressBar(trainer.train, state.step, state.elapsed_s, shown=main) as bar,
            ):
                TrainingLoop(trainer, stop, log, bar).run()
        return stop.exit_code
    except RuntimeError as e:
        if not device.is_out_of_memory(e):
            raise
    raise out_of_memory(trainer)


def compile_and_prepare(trainer: Trainer) -> None:
    """Compile if it pays, run one pass for DDP, and print what changed in the environment of a resumed run."""
    wanted = wants_compile(trainer.cfg, trainer.model, trainer.runtime, trainer.state.elapsed_s)
    if not trainer.world.max([float(not wanted)])[0]:  # only if all ranks want it: a machine may have no compiler
        print("compiling the model (once; a quarter of a minute) ...", flush=True)
        trainer.compile()
    if trainer.world.size > 1:
        with trainer.preserve_state():
            trainer.forward_backward()  # after its first pass DDP fixes the order in which gradients are exchanged
    now = trainer.environment()
    for name, was in trainer.resumed_environment.items():
        if now[name] != was:
            trainer.say(
                f"note: {name} was {was} and is {now[name]}: the run goes on, but not bit for bit as it would have"
            )


class TrainingLoop:
    """One session of training: from the trainer's step to the end of the run, or to a signal."""

    def __init__(self, trainer: Trainer, stop: StopRequest, log: MetricsLog | NoLog, bar: ProgressBar):
        self.trainer, self.train, self.stop, self.log, self.bar = trainer, trainer.train, stop, log, bar
        self.evaluations = Evaluations(trainer, log, bar)
        self.window, self.slowdown = Window(), Slowdown()
        self.first_step = trainer.state.step
        self.saved_step = trainer.state.step or None  # at step 0 nothing is saved yet

    def run(self) -> None:
        """Take rows, forward and backward, guard, step; then log, evaluate and save when they are due."""
        trainer = self.trainer
        self.evaluations.begin()
        stopping = self.sync_signal_and_clock()  # for the elapsed time: compiling takes longer on some ranks
        while self.has_next_step() and not stopping:
            self.save_before_decay()
            seconds = self.step()
            stopping = self.sync_signal_and_clock()
            self.bar.advance(seconds)
            if self.evaluations.due() or stopping:
                self.finish_launched()
            # a run that is out of time keeps the weights from before the bad steps
            out_of_time = self.finished() and self.train.max_minutes is not None
            too_many_skipped = trainer.state.skipped_in_a_row >= self.train.max_skipped_steps
            if too_many_skipped and not out_of_time and roll_back(trainer):
                self.log.rewind(trainer.state.step)
                self.bar.go_back(trainer.state.step)
                self.window, self.saved_step = Window(), trainer.state.step
                continue
            if self.due(self.train.log_every):
                self.write_log()
            best_on_disk = trainer.state.best
            improved = self.evaluations.due() and self.evaluations.evaluate()
            self.evaluations.sample()
            if self.should_save(improved) and trainer.save(required=self.finished()):
                self.saved_step = trainer.state.step
            else:  # if saving failed, restore the old best, or pruning deletes it
                trainer.state.best = best_on_disk
        if stopping and self.saved_step != trainer.state.step:
            trainer.save(required=True)
        self.stop.signal = self.sync_signal_and_clock() or None  # a signal may have arrived meanwhile

    # -- decisions ----------------------------------------------------------------------------------------------------

    def finished(self) -> bool:
        """Return whether all steps are done, or all minutes are over."""
        return self.trainer.share() >= 1

    def has_next_step(self) -> bool:
        """Return whether to do another step. With `max_minutes` a session does at least one, to end annealed and saved."""
        overdue = self.train.max_minutes is not None and self.trainer.state.step == self.first_step
        return not self.finished() or overdue

    def due(self, every: int) -> bool:
        """Return whether the step is a multiple of `every`, or the run is finished."""
        return self.finished() or self.trainer.state.step % every == 0

    def should_save(self, improved: bool) -> bool:
        """Return whether to save. Not during a bad streak, because a rollback needs an older checkpoint."""
        wanted = self.due(self.train.save_every) or improved
        return self.finished() or (wanted and not self.trainer.state.skipped_in_a_row)

    def sync_signal_and_clock(self) -> int:
        """Return the signal that any rank has received, or 0. Set the elapsed time of all ranks to the main rank's."""
        world, state = self.trainer.world, self.trainer.state
        number, elapsed_s = world.max([self.stop.signal or 0, state.elapsed_s if world.main else 0.0])
        state.elapsed_s = elapsed_s
        return int(number)

    # -- actions ------------------------------------------------------------------------------------------------------

    def step(self) -> float:
        """Launch a step; finish the steps before it, or all if their results are needed now. Return the seconds."""
        trainer, train = self.trainer, self.train
        started = time.perf_counter()
        self.window.launched.append(launched := trainer.launch_step())
        step = trainer.state.step
        wanted = step == train.max_steps or any(step % n == 0 for n in (train.log_every, train.save_every))
        # a GPU computes this step while the one before is finished
        self.finish_launched(keep=1 if trainer.runtime.asynchronous and not wanted else 0)
        # so that none is in flight when the run goes back
        if trainer.state.skipped_in_a_row >= train.max_skipped_steps - 1:
            self.finish_launched()
        seconds = time.perf_counter() - started
        trainer.state.elapsed_s += seconds
        self.window.seconds += seconds
        if note := self.slowdown.add(launched.n_targets, seconds):
            trainer.say(note)
        return seconds

    def finish_launched(self, keep: int = 0) -> None:
        """Finish the launched steps except the newest `keep`. Report and record the skipped ones."""
        trainer, window = self.trainer, self.window
        while len(window.launched) > keep:
            step = window.launched.popleft()
            loss, window.norm, good = trainer.finish_step(step)
            if good:
                window.loss += loss * step.n_targets
                window.n_targets += step.n_targets
                continue
            outlier = f", over {step.norm_limit:.3g}" if window.norm > step.norm_limit else ""
            trainer.say(f"warning: step {step.number} skipped: loss {loss}, gradient norm {window.norm}{outlier}")
            if trainer.world.main:
                trainer.recorder.record(
                    step=step.number,
                    first_row=step.first_row,
                    n_rows=self.train.batch_size,
                    loss=loss,
                    grad_norm=window.norm,
                    limit=step.norm_limit,
                )

    def save_before_decay(self) -> None:
        """If the decay of the learning rate begins with the next step, note it, and save what another run can extend.

        That is for a schedule with a stable part before it. Between skipped steps nothing is saved, as in `should_save`.
        """
        trainer, state = self.trainer, self.trainer.state
        if state.decay_step is not None or decay_scale(state.step, state.elapsed_s, self.train) == 1:
            return
        if has_stable_part(self.train) and state.step and self.saved_step != state.step:
            self.finish_launched()
            if not state.skipped_in_a_row and trainer.save():
                self.saved_step = state.step
        state.decay_step = state.step

    def write_log(self) -> None:
        """Log the averages of the window and begin a new window. Do nothing if all its steps were skipped."""
        trainer, state, window = self.trainer, self.trainer.state, self.window
        if not window.n_targets:
            return
        mean, rate = window.loss / window.n_targets, window.n_targets / window.seconds
        self.log.write(
            state.step,
            tokens=state.step * self.train.batch_size * trainer.cfg.model.block_size,
            loss=mean,
            lr=self.train.lr * trainer.lr_scale,
            grad_norm=window.norm,
            tokens_per_s=rate,
            elapsed_s=state.elapsed_s,
            skipped_steps=state.skipped,
            rollbacks=state.rollbacks,
        )
        self.bar.show(state.step, mean, rate)
        self.window = Window()

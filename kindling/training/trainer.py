"""The one training loop, used by every script that trains, in one process or in several (`distributed.py`).

A run is a pure function of its config and data: the learning rate of the step, the batch of the position in the data
(one integer), dropout of a random state that is saved. So on a CPU a run that was stopped and resumed ends in the same
bits as one that was not, with the same number of threads and of ranks (a GPU's kernels may add in another order). Losses are
sums and are divided once, by the supervised tokens of the whole step over all ranks, so that neither accumulation nor the number
of ranks changes anything but the rounding.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from config import IGNORE, Config
from kindling import device
from kindling.data.shards import rows_of_rank
from kindling.device import Runtime
from kindling.distributed import MainFailed, replicated
from kindling.errors import KindlingError, require
from kindling.runs.checkpoint import (
    CheckpointError,
    RunDirectory,
    in_parts,
    load_model,
    load_sharded,
    load_state,
    load_weights,
)
from kindling.runs.fsdp import digest, is_sharded, shard, synchronize_gradients, whole
from kindling.runs.metrics import MetricsLog, NoLog
from kindling.stopping import StopRequest
from kindling.training.guard import SpikeGuard
from kindling.training.optim import make_optimizers
from kindling.training.prefetch import Batches, Prefetch
from kindling.training.recorder import FlightRecorder
from kindling.training.schedule import learning_rate_scale, share_done
from kindling.training.validation import summed_loss
from model import LanguageModel

COMPILE_FLOPS = 2e13  # about a minute and a half of a small CPU: a shorter run ends before compiling has paid
COMPILE_MINUTES = 1.5
MAX_ROLLBACKS = 3


class TrainingError(KindlingError):
    """A run that cannot go on."""


class Step(NamedTuple):
    """What a step came to, still on the device: reading it waits for the device."""

    loss: Tensor  # mean over the step's supervised tokens
    norm: Tensor  # of the gradient
    n_targets: int
    number: int  # from 1
    first_row: int
    limit: float  # a norm above it is an outlier


@dataclass
class Window:
    """The steps since the last line of the log: those not yet read, and sums over those that are."""

    launched: deque[Step] = field(default_factory=deque)
    loss: float = 0.0  # nats
    n_targets: int = 0
    seconds: float = 0.0
    norm: float = 0.0  # of the newest


def wants_compile(cfg: Config, model: LanguageModel, runtime: Runtime, elapsed_s: float = 0.0) -> bool:
    """Return whether compiling pays for this run, of which `elapsed_s` are over, or is asked for."""
    if cfg.train.compile != "auto":
        return cfg.train.compile == "on"
    if cfg.train.max_minutes is not None:
        long = cfg.train.max_minutes - elapsed_s / 60 >= COMPILE_MINUTES
    else:
        long = 6 * model.n_multiplied() * cfg.tokens >= COMPILE_FLOPS
    if not long:
        return False
    if not device.has_compiler(runtime.device.type):
        if runtime.world.main:
            print(
                f"warning: no compiler for {runtime.device.type} was found, so training goes on uncompiled, which is slower"
                + ("; install g++" if runtime.device.type == "cpu" else ""),
                file=sys.stderr,
            )
        return False
    return True


def require_shareable(cfg: Config, runtime: Runtime) -> None:
    """Raise ConfigError for a run that the ranks cannot share: one whose batch they do not divide, or fp16 in parts."""
    ranks, train = runtime.world.size, cfg.train
    must = f"a multiple of the {ranks} ranks"
    mend = "set --train.batch-size, or start another number of ranks"
    require(train.batch_size % ranks == 0, "train.batch_size", must, train.batch_size, mend)
    halves = ranks > 1 and train.parallel == "fsdp" and runtime.precision == "fp16"
    require(not halves, "train.precision", "bf16 or fp32 with --train.parallel fsdp", "fp16", "set --train.precision")


class Trainer:
    """A run in progress: model, optimisers, position in the data, and the folder that they are saved to."""

    def __init__(
        self,
        cfg: Config,
        run: RunDirectory,
        model: LanguageModel,
        batches: Batches,
        evaluate: Callable[[LanguageModel], dict[str, float]],
        runtime: Runtime,
    ):
        """`cfg` has its number of steps; where `train.epochs` says how many they are, `cfg.with_steps` gives it.

        Raises ConfigError for what `require_shareable` refuses.
        """
        self.cfg, self.train, self.run, self.runtime, self.world = cfg, cfg.train, run, runtime, runtime.world
        self.model, self.batches, self.evaluate = model, batches, evaluate
        require_shareable(cfg, runtime)
        ranks = self.world.size
        self.rows = cfg.train.batch_size // ranks  # of a step, on each rank
        self.micro_batch = max(n for n in range(1, min(cfg.train.micro_batch, self.rows) + 1) if self.rows % n == 0)
        model.checkpoint_activations = cfg.train.activation_checkpointing
        if sharded := ranks > 1 and cfg.train.parallel == "fsdp":
            shard(model, ranks, torch.bfloat16 if runtime.precision == "bf16" else None)
        self.optimizers = make_optimizers(model, cfg.train, runtime.product_dtype)
        # what is called for the gradients: DDP averages them over the ranks, FSDP adds them up
        self.engine = model if ranks == 1 or sharded else replicated(model, runtime.device)
        self.loss_scale = 1 if ranks == 1 or sharded else ranks
        self.prefetch = Prefetch(batches)
        self.scaler = runtime.grad_scaler()
        self.guard = SpikeGuard(cfg.train.spike_ratio)
        self.recorder = FlightRecorder(run.path, batches)
        self.step = 0  # optimiser steps done, skipped ones included
        self.position = 0  # rows consumed
        self.avoided: list[tuple[int, int]] = []  # positions from, to: rows that are passed over after a roll-back
        self.rollbacks = 0
        self.skipped = 0  # steps whose loss or gradient was not finite, or whose gradient was an outlier
        self.skipped_in_a_row = 0
        self.streak = 0, 0  # the first of these steps, and its first row
        # steps, the first of them, and their rows from, to: too many in a row, so that the run is to go back; what was launched
        # before that was read does not matter
        self.lost: tuple[int, int, int, int] | None = None
        self.rate_scale = 0.0  # of the newest step, on the peak learning rates
        self.elapsed_s = 0.0  # time in steps and in compiling, over all sessions of the run
        self.best: dict[str, float] | None = None
        self.first_eval: dict[str, float] = {}  # of the weights that it starts from, where those are another run's
        self.last_eval: dict[str, float] = {}
        self.last_eval_step: int | None = None
        self.initial_sha256: str | None = None  # of those weights
        self.compiled = False
        self.resumed_environment: dict[str, Any] = {}

    # -- state --------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return all that the rest of the run depends on besides weights, config and data; every rank must call it."""
        return {
            "step": self.step,
            "position": self.position,
            "avoided": self.avoided,
            "rollbacks": self.rollbacks,
            "guard": self.guard.state_dict(),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "streak": self.streak,
            "elapsed_s": self.elapsed_s,
            "best": self.best,
            "first_eval": self.first_eval,
            "last_eval": self.last_eval,
            "last_eval_step": self.last_eval_step,
            "initial_sha256": self.initial_sha256,
            # with fsdp they are saved beside the weights, each rank's part
            "optimizers": [] if self.train.parallel == "fsdp" else [o.state_dict() for o in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "rng": self.world.gather(device.rng_state(self.runtime)),
            "environment": self.environment(),
        }

    def resume(self, folder: Path, state: dict[str, Any]) -> None:
        """Take up the run where a verified checkpoint left it."""
        if in_parts(folder):
            load_sharded(folder, self.model, self.optimizers)
        else:
            load_weights(folder, self.model)
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        if state["scaler"]:  # empty unless the run was in fp16
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.position = state["step"], state["position"]
        self.avoided, self.rollbacks = state.get("avoided", []), state.get("rollbacks", 0)
        if "guard" in state:
            self.guard.load_state_dict(state["guard"])
        elif self.train.spike_ratio:
            self._say(
                f"note: from here on a gradient of {self.train.spike_ratio:g} times the median of those before is skipped"
            )
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self.streak = tuple(state.get("streak", (0, 0)))
        self.elapsed_s, self.best, self.last_eval = state["elapsed_s"], state["best"], state["last_eval"]
        self.last_eval_step = state.get("last_eval_step", self.step)
        self.first_eval, self.initial_sha256 = state.get("first_eval", {}), state.get("initial_sha256")
        rngs = state["rng"] if isinstance(state["rng"], list) else [state["rng"]]
        if self.world.rank < len(rngs):
            device.set_rng_state(rngs[self.world.rank])
        else:
            device.seed_rank(self.train.seed, self.step, self.world.rank)
        self.resumed_environment = state["environment"]

    def environment(self) -> dict[str, Any]:
        """Return what the run's bits depend on besides config and data."""
        return {**self.runtime.describe(), "compiled": self.compiled}

    def save(self, required: bool = False) -> bool:
        """Save a checkpoint, prune the old ones, return True. A failure is a warning and False, unless `required`.

        Every rank must call it; the main one writes.
        """
        state, failure = self.state(), None
        try:
            if self.train.parallel == "fsdp":
                self.run.save_sharded(self.step, self.model, self.optimizers, state, self.world)
            elif self.world.main:
                self.run.save(self.step, self.model, state)
        except CheckpointError as e:
            failure = e
        if self.world.max([float(failure is not None)])[0]:
            if required:
                raise failure or MainFailed
            self._say(f"warning: {failure}; the run goes on and tries again at the next checkpoint")
            return False
        if self.world.main:
            best_step = None if self.best is None else int(self.best["step"])
            self.run.prune(self.train.keep_checkpoints, best_step, self.step)
        return True

    def whole_model(self) -> LanguageModel:
        """Return the model for all that is not training: itself, or if it is in parts a copy from the newest checkpoint."""
        return load_model(self.run, self.runtime.device)[0] if is_sharded(self.model) else self.model

    def _say(self, text: str) -> None:
        """Write a line for the user, once for all ranks."""
        if self.world.main:
            tqdm.write(text, file=sys.stderr)

    def digest(self) -> str:
        """Return the sha256 of weights and optimiser state; every rank must call it."""
        return digest(self.model, self.optimizers)

    # -- one step -----------------------------------------------------------------------------------------------------

    def share(self) -> float:
        """Return which share of the run is done, 0 to 1."""
        return share_done(self.step, self.elapsed_s, self.train)

    def positions_of(self, position: int) -> range:
        """Return this rank's rows of the step whose batch begins at `position`."""
        return rows_of_rank(position, self.train.batch_size, self.world.rank, self.world.size)

    def after(self, position: int) -> int:
        """Return where the next step's batch begins, after one at `position`: past the rows that are avoided."""
        position += self.train.batch_size
        for start, stop in sorted(self.avoided):
            if start <= position < stop:
                position = stop
        return position

    def forward_backward(self, synchronized: bool = True) -> tuple[Tensor, int]:
        """Accumulate the gradients of the step's mean loss; return that loss (a tensor) and the supervised tokens, of all ranks.

        The ranks exchange gradients once, in the backward pass of the last micro-batch. Without `synchronized` each is on its
        own, unless the model is sharded.
        """
        batch = self.prefetch.take(self.positions_of(self.position), self.positions_of(self.after(self.position)))
        n_targets = int((batch.targets != IGNORE).sum())
        if synchronized:
            n_targets = int(self.world.sum([n_targets])[0])
        total = torch.zeros((), device=self.runtime.device)
        for start in range(0, self.rows, self.micro_batch):
            micro = batch.part(slice(start, start + self.micro_batch))
            last = start + self.micro_batch >= self.rows
            with self._exchange(last and synchronized):
                loss, _ = summed_loss(self.engine, micro, self.runtime)
                loss = loss / max(1, n_targets)
                self.scaler.scale(loss * self.loss_scale).backward()
            total += loss.detach()
        if synchronized:
            self.world.add_up(total)
        return total, n_targets

    def _exchange(self, wanted: bool) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a pass after which the ranks exchange gradients, or of one that only accumulates them."""
        synchronize_gradients(self.model, wanted)  # where it is sharded
        replicas = self.engine is not self.model
        return self.engine.no_sync() if replicas and not wanted else contextlib.nullcontext()

    def launch_step(self) -> Step:
        """Do one optimiser step without waiting for the device; `read` says how it went.

        A loss or gradient norm that is not finite, and a norm that is an outlier, leave weights and optimisers as they are,
        which the device decides.
        """
        self.rate_scale = learning_rate_scale(self.step, self.elapsed_s, self.train)
        loss, n_targets = self.forward_backward()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.train.grad_clip or math.inf))
        limit = self.guard.limit(self.step + 1)
        bad = (~(torch.isfinite(loss) & torch.isfinite(norm) & (norm <= limit))).float()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * self.rate_scale
            # what GradScaler.step does for optimisers that support it, but one word for both of them, and in every precision
            optimizer.found_inf = bad
            if self.runtime.skips_steps or not bad.item():
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()  # also after a skip: it lowers the scale, and the next unscale_ needs it
        self.step += 1
        step = Step(loss, norm, n_targets, self.step, self.position, limit)
        self.position = self.after(self.position)
        return step

    def read(self, step: Step) -> tuple[float, float, bool]:
        """Wait for a launched step; return its loss and gradient norm, and whether it was done. Count it if it was skipped."""
        loss, norm = torch.stack((step.loss, step.norm)).tolist()
        good = math.isfinite(loss) and math.isfinite(norm) and norm <= step.limit
        self.guard.add(step.number, norm, good)
        if not good and self.skipped_in_a_row == 0:
            self.streak = step.number, step.first_row
        self.skipped_in_a_row = 0 if good else self.skipped_in_a_row + 1
        if self.lost is None and self.skipped_in_a_row >= self.train.max_skipped_steps:
            self.lost = (self.skipped_in_a_row, *self.streak, self.after(step.first_row))
        self.skipped += not good
        return loss, norm, good

    def train_step(self) -> tuple[float, float, int]:
        """Do one optimiser step and wait for it; return its loss, gradient norm and supervised tokens."""
        started = time.perf_counter()
        step = self.launch_step()
        loss, norm, _ = self.read(step)
        self.elapsed_s += time.perf_counter() - started
        return loss, norm, step.n_targets

    @contextlib.contextmanager
    def _rehearsal(self) -> Iterator[None]:
        """Let what happens within leave no trace in the run but the time that it takes."""
        started, rng = time.perf_counter(), device.rng_state(self.runtime)
        try:
            yield
        finally:
            self.model.zero_grad(set_to_none=True)
            device.set_rng_state(rng)
            self.elapsed_s += time.perf_counter() - started

    def compile(self) -> bool:
        """Compile the model and run one batch through it, leaving no trace in the run; on failure warn and stay eager."""
        reason = ""
        with self._rehearsal():
            try:
                device.trust_compiler()
                self.model.compile_parts()
                self.forward_backward(synchronized=False)  # so that a rank that fails does not leave the others waiting
            except Exception as e:  # a compiler's failures have no common class
                reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        reasons = [said for said in self.world.gather(reason) if said]
        if reasons:
            self.model.decompile_parts()
            self._say(f"warning: torch.compile failed ({reasons[0]}); training goes on uncompiled")
            return False
        self.compiled = True
        return True

    # -- the loop -----------------------------------------------------------------------------------------------------

    def fit(self) -> int:
        """Train to `max_steps`, or for `max_minutes`; return 0, or 130 / 143 after a signal. The run is saved in each case.

        Raises TrainingError where `max_skipped_steps` bad steps in a row come again and again, CheckpointError if the last save
        fails.
        """
        self.model.train()
        wanted = wants_compile(self.cfg, self.model, self.runtime, self.elapsed_s)
        if not self.world.max([float(not wanted)])[0]:  # not all machines need have a compiler
            print("compiling the model (once; a quarter of a minute) ...", flush=True)
            self.compile()
        if self.world.size > 1:
            with self._rehearsal():
                self.forward_backward()  # after its first pass DDP fixes the order in which gradients are exchanged
        now = self.environment()
        for name, was in self.resumed_environment.items():
            if now[name] != was:
                self._say(
                    f"note: {name} was {was} and is {now[name]}: the run goes on, but not bit for bit as it would have"
                )
        with StopRequest() as stop, contextlib.closing(self._open_log()) as log, self._progress_bar() as bar:
            self._loop(stop, log, bar)
        return stop.exit_code

    def _open_log(self) -> MetricsLog | NoLog:
        return MetricsLog(self.run.path, self.step) if self.world.main else NoLog()

    def _progress_bar(self) -> tqdm:
        how = dict(dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 15, disable=not self.world.main)
        if self.train.max_minutes is None:
            return tqdm(total=self.train.max_steps, initial=self.step, unit="step", **how)
        form = "{l_bar}{bar}| {n:.0f} of {total:.0f} s{postfix}"
        total = 60 * self.train.max_minutes
        done = min(self.elapsed_s, total)  # tqdm forgets a total that it is past
        return tqdm(total=total, initial=done, bar_format=form, **how)

    def _loop(self, stop: StopRequest, log: MetricsLog | NoLog, bar: tqdm) -> None:
        if self.step == 0 and self.train.init_from is not None:
            self.first_eval = self._evaluate(log, bar)
        window = Window()
        began, saved_step = self.step, self.step or None  # at step 0 nothing is saved yet
        stopped = self._agree(stop)  # compiling takes each rank its own time
        # a run by the clock does a step all the same if compiling took what was left: it then ends annealed, and saved
        overdue = self.train.max_minutes is not None
        while (self.share() < 1 or (overdue and self.step == began)) and not stopped:
            started = time.perf_counter()
            window.launched.append(self.launch_step())
            every = self.train.log_every, self.train.eval_every, self.train.save_every
            due = self.step == self.train.max_steps or any(self.step % n == 0 for n in every)
            self._read_all(window, but=1 if self.runtime.asynchronous and not due else 0)
            seconds = time.perf_counter() - started
            self.elapsed_s += seconds
            window.seconds += seconds
            stopped = self._agree(stop)
            bar.update(1 if self.train.max_minutes is None else max(0.0, min(seconds, bar.total - bar.n)))
            last = self.share() >= 1
            log_due, eval_due, save_due = (last or self.step % n == 0 for n in every)
            if last or stopped or self.lost is not None:
                self._read_all(window)
            # when the time is over there is none to do the steps again; the weights are those of before the skipped ones
            if self.lost is not None and not (last and self.train.max_minutes is not None):
                self.roll_back()
                log.rewind(self.step)
                bar.update(min(0, self.step - bar.n) if self.train.max_minutes is None else 0)
                window, saved_step = Window(), self.step
                continue
            if log_due and window.n_targets:
                self._log(window, log, bar)
                window = Window()
            improved, best_on_disk = False, self.best
            if eval_due:
                self.last_eval, self.last_eval_step = self._evaluate(log, bar), self.step
                loss = self.last_eval["val_loss"]
                improved = math.isfinite(loss) and (self.best is None or loss < self.best["val_loss"])
                if improved:
                    self.best = {"step": self.step, "val_loss": loss}
            # between steps that are skipped in a row nothing is saved: it is what `roll_back` must get behind
            if (last or ((save_due or improved) and not self.skipped_in_a_row)) and self.save(required=last):
                saved_step, best_on_disk = self.step, self.best
            self.best = best_on_disk  # or the next save would delete it in favour of one that is not there
        if stopped and saved_step != self.step:
            self.save(required=True)
        stop.signal = self._agree(stop) or None  # of one that came to some rank since, too

    def _agree(self, stop: StopRequest) -> int:
        """Return the signal that any rank has got, or 0, and take over the main rank's clock."""
        number, elapsed_s = self.world.max([stop.signal or 0, self.elapsed_s if self.world.main else 0.0])
        self.elapsed_s = elapsed_s
        return int(number)

    def roll_back(self) -> None:
        """Go back to the newest checkpoint from before the steps that were skipped in a row; their rows are left out from now on.

        Raises TrainingError if that was done too often, or there is no such checkpoint.
        """
        assert self.lost is not None
        n, step, row, stop = self.lost
        folder = None if self.rollbacks >= MAX_ROLLBACKS else self.world.on_main(lambda: self.run.back_to(step))
        if folder is None:
            again = f" after {self.rollbacks} roll-backs" if self.rollbacks else ""
            raise TrainingError(
                f"fewer than {self.train.max_skipped_steps} steps in a row may be skipped for a loss or gradient that is not "
                f"finite or an outlier, but {n} were{again}; go on with --train.precision fp32 or --train.spike-ratio 0, or "
                f"start over with --fresh and a lower --train.lr or --train.eps 1e-5"
            )
        kept = {name: getattr(self, name) for name in ("skipped", "elapsed_s", "resumed_environment")}
        avoided, rollbacks = [*self.avoided, (row, stop)], self.rollbacks + 1
        self.resume(folder, load_state(folder))
        for name, value in kept.items():
            setattr(self, name, value)
        self.avoided, self.rollbacks, self.skipped_in_a_row, self.lost = avoided, rollbacks, 0, None
        self.position = self.after(self.position - self.train.batch_size)  # which the avoided rows may begin at
        self._say(
            f"warning: {n} steps in a row were skipped: back to step {self.step}, without the {stop - row:,} rows of those steps"
        )

    def _read_all(self, window: Window, but: int = 0) -> None:
        """Read the launched steps, save for the newest `but`; say which were skipped, and record what was in them."""
        while len(window.launched) > but:
            step = window.launched.popleft()
            loss, window.norm, good = self.read(step)
            if good:
                window.loss += loss * step.n_targets
                window.n_targets += step.n_targets
                continue
            outlier = f", over {step.limit:.3g}" if window.norm > step.limit else ""
            self._say(f"warning: step {step.number} skipped: loss {loss}, gradient norm {window.norm}{outlier}")
            if self.world.main:
                self.recorder.record(
                    step=step.number,
                    first_row=step.first_row,
                    n_rows=self.train.batch_size,
                    loss=loss,
                    grad_norm=window.norm,
                    limit=step.limit,
                )

    def _log(self, window: Window, log: MetricsLog, bar: tqdm) -> None:
        mean, rate = window.loss / window.n_targets, window.n_targets / window.seconds
        log.write(
            self.step,
            tokens=self.step * self.train.batch_size * self.cfg.model.block_size,
            loss=mean,
            lr=self.train.lr * self.rate_scale,
            grad_norm=window.norm,
            tokens_per_s=rate,
            elapsed_s=self.elapsed_s,
            skipped_steps=self.skipped,
            rollbacks=self.rollbacks,
        )
        step = "" if self.train.max_minutes is None else f"step {self.step:,}, "
        bar.set_postfix_str(f"{step}loss {mean:.3f}, {rate:,.0f} tokens/s", refresh=False)

    def _evaluate(self, log: MetricsLog, bar: tqdm) -> dict[str, float]:
        """Evaluate, log, say and return what came out."""
        result = self.evaluate(self.model)
        log.write(self.step, **result)
        tqdm.write(f"step {self.step}: " + ", ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in result.items()))
        bar.refresh()
        return result

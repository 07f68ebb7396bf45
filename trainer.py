"""The one training loop, used by every script that trains.

A run is a pure function of its config and data: the learning rate of the step, the batch of the position in the data
(one integer), dropout of a random state that is saved. So on a CPU a run that was stopped and resumed ends in the same
bits as one that was not, with the same number of threads (a GPU's kernels may add in another order). Losses are sums
and are divided once, by the supervised tokens of the whole step, so that accumulation changes nothing but the rounding.

Limit: one process.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

import device
from checkpoint import CheckpointError, RunDirectory, load_weights, state_digest
from config import IGNORE, Config
from device import Runtime
from errors import KindlingError
from metrics import MetricsLog
from model import LanguageModel
from optim import make_optimizers
from schedule import learning_rate_scale, share_done
from shards import Batch, TokenDataset, rows_of_rank

COMPILE_FLOPS = 2e13  # about a minute and a half of a small CPU: a shorter run ends before compiling has paid
COMPILE_MINUTES = 1.5
VALIDATION_ROWS = 16


class TrainingError(KindlingError):
    """A run that cannot go on."""


class Batches(Protocol):
    """Training rows, addressed by their position in the run. `n_rows` are an epoch."""

    n_rows: int

    def rows(self, first: int, count: int) -> Batch:
        """Return the rows at positions first, first + 1, ..."""
        ...


class Prefetch:
    """Reads the rows of the next step on a thread while this step is computed.

    Rows are a function of their position alone, so nothing depends on when they are read.
    """

    def __init__(self, batches: Batches):
        self._batches = batches
        self._thread = ThreadPoolExecutor(1)
        self._next: tuple[range, Future[Batch]] | None = None

    def take(self, rows: range, then: range) -> Batch:
        """Return the rows at these positions, and begin to read those that are wanted `then`."""
        if self._next is not None and self._next[0] == rows:
            batch = self._next[1].result()
        else:
            batch = self._thread.submit(self._batches.rows, rows.start, len(rows)).result()
        self._next = then, self._thread.submit(self._batches.rows, then.start, len(then))
        return batch


class Step(NamedTuple):
    """What a step came to, still on the device: reading it waits for the device."""

    loss: Tensor  # mean over the step's supervised tokens
    norm: Tensor  # of the gradient
    n_targets: int


@dataclass
class Window:
    """The steps since the last line of the log: those not yet read, and sums over those that are."""

    launched: deque[Step] = field(default_factory=deque)
    loss: float = 0.0  # nats
    n_targets: int = 0
    seconds: float = 0.0
    norm: float = 0.0  # of the newest


def summed_loss(model: LanguageModel, batch: Batch, runtime: Runtime) -> tuple[Tensor, Tensor]:
    """Return the summed loss of a batch, and its number of supervised tokens; all of training and validation comes here."""
    idx, targets, positions = (
        None if rows is None else device.to_device(rows, runtime) for rows in batch
    )  # (B, T) each
    with runtime.autocast():
        return model(idx, targets, positions)


@torch.no_grad()
def mean_loss(model: LanguageModel, batches: Iterable[Batch], runtime: Runtime) -> tuple[float, int]:
    """Return the mean loss in nats over all supervised tokens of `batches`, and their number."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in tqdm(batches, desc="evaluating", unit="batch", leave=False, disable=None):
        loss, n = summed_loss(model, batch, runtime)
        total, count = total + float(loss), count + int(n)
    model.train(was_training)
    return total / max(1, count), count


def validate(model: LanguageModel, dataset: TokenDataset, runtime: Runtime) -> dict[str, float]:
    """Return loss (nats a token), perplexity and bits per byte over the whole of one split.

    Bits per byte counts every supervised token, end-of-text too, over the UTF-8 bytes of the documents (of examples: of the
    responses), and so compares across tokenizers.
    """
    loss, count = mean_loss(model, dataset.in_order(model.cfg, VALIDATION_ROWS), runtime)
    bits_per_byte = loss * count / math.log(2) / dataset.info.bytes
    return {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700.0)), "val_bits_per_byte": bits_per_byte}


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
        print(
            f"warning: no compiler for {runtime.device.type} was found, so training goes on uncompiled, which is slower"
            + ("; install g++" if runtime.device.type == "cpu" else ""),
            file=sys.stderr,
        )
        return False
    return True


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a request to stop after the step; a second one ends the process at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> StopRequest:
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for s, handler in self._previous.items():
            signal.signal(s, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        os.write(2, b"\nstopping after this step, then saving; once more to stop at once, without saving\n")

    @property
    def exit_code(self) -> int:
        """128 and the signal's number, as a shell would report it; 0 without a signal."""
        return 0 if self.signal is None else 128 + self.signal


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
        """`cfg` has its number of steps; where `train.epochs` says how many they are, `cfg.with_steps` gives it."""
        self.cfg, self.train, self.run, self.runtime = cfg, cfg.train, run, runtime
        self.model, self.batches, self.evaluate = model, batches, evaluate
        self.optimizers = make_optimizers(model, cfg.train, runtime.product_dtype)
        self.prefetch = Prefetch(batches)
        self.scaler = runtime.grad_scaler()
        self.step = 0  # optimiser steps done, skipped ones included
        self.position = 0  # rows consumed
        self.skipped = 0  # steps whose loss or gradient was not finite
        self.skipped_in_a_row = 0
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
        """Return all that the rest of the run depends on besides weights, config and data."""
        return {
            "step": self.step,
            "position": self.position,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "elapsed_s": self.elapsed_s,
            "best": self.best,
            "first_eval": self.first_eval,
            "last_eval": self.last_eval,
            "last_eval_step": self.last_eval_step,
            "initial_sha256": self.initial_sha256,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "rng": device.rng_state(self.runtime),
            "environment": self.environment(),
        }

    def resume(self, folder: Path, state: dict[str, Any]) -> None:
        """Take up the run where a verified checkpoint left it."""
        load_weights(folder, self.model)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if state["scaler"]:  # empty unless the run was in fp16
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.position = state["step"], state["position"]
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self.elapsed_s, self.best, self.last_eval = state["elapsed_s"], state["best"], state["last_eval"]
        self.last_eval_step = state.get("last_eval_step", self.step)
        self.first_eval, self.initial_sha256 = state.get("first_eval", {}), state.get("initial_sha256")
        device.set_rng_state(state["rng"])
        self.resumed_environment = state["environment"]

    def environment(self) -> dict[str, Any]:
        """Return what the run's bits depend on besides config and data."""
        return {**self.runtime.describe(), "compiled": self.compiled}

    def save(self, required: bool = False) -> bool:
        """Save a checkpoint, prune the old ones, return True. A failure is a warning and False, unless `required`."""
        try:
            self.run.save(self.step, self.model, self.state())
        except CheckpointError as e:
            if required:
                raise
            tqdm.write(f"warning: {e}; the run goes on and tries again at the next checkpoint", file=sys.stderr)
            return False
        best_step = None if self.best is None else int(self.best["step"])
        self.run.prune(self.train.keep_checkpoints, best_step, self.step)
        return True

    def digest(self) -> str:
        """Return the sha256 of weights and optimiser state."""
        return state_digest(self.model, self.optimizers)

    # -- one step -----------------------------------------------------------------------------------------------------

    def share(self) -> float:
        """Return which share of the run is done, 0 to 1."""
        return share_done(self.step, self.elapsed_s, self.train)

    def forward_backward(self) -> tuple[Tensor, int]:
        """Accumulate the gradients of the step's mean loss; return that loss (a tensor) and the supervised tokens."""
        size = self.train.batch_size
        batch = self.prefetch.take(rows_of_rank(self.position, size), rows_of_rank(self.position + size, size))
        n_targets = int((batch.targets != IGNORE).sum())
        total = torch.zeros((), device=self.runtime.device)
        for start in range(0, size, self.train.micro_batch):
            micro = batch.part(slice(start, start + self.train.micro_batch))
            loss, _ = summed_loss(self.model, micro, self.runtime)
            loss = loss / max(1, n_targets)
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total, n_targets

    def launch_step(self) -> Step:
        """Do one optimiser step without waiting for the device; `read` says how it went.

        A loss or gradient norm that is not finite leaves weights and optimisers as they are, which the device decides.
        """
        self.rate_scale = learning_rate_scale(self.step, self.elapsed_s, self.train)
        loss, n_targets = self.forward_backward()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.train.grad_clip or math.inf)
        bad = (~(torch.isfinite(loss) & torch.isfinite(norm))).float()
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
        self.position += self.train.batch_size
        return Step(loss, norm, n_targets)

    def read(self, step: Step) -> tuple[float, float]:
        """Return loss and gradient norm of a launched step, waiting for it; count it if it was skipped."""
        loss, norm = torch.stack((step.loss, step.norm)).tolist()
        finite = math.isfinite(loss) and math.isfinite(norm)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.skipped += not finite
        return loss, norm

    def train_step(self) -> tuple[float, float, int]:
        """Do one optimiser step and wait for it; return its loss, gradient norm and supervised tokens."""
        started = time.perf_counter()
        step = self.launch_step()
        loss, norm = self.read(step)
        self.elapsed_s += time.perf_counter() - started
        return loss, norm, step.n_targets

    def compile(self) -> bool:
        """Compile the model and run one batch through it, leaving no trace in the run; on failure warn and stay eager."""
        started = time.perf_counter()
        rng = device.rng_state(self.runtime)
        self.model.compile_parts()
        try:
            self.forward_backward()
        except Exception as e:  # a compiler's failures have no common class
            self.model.decompile_parts()
            reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
            print(f"warning: torch.compile failed ({reason}); training goes on uncompiled", file=sys.stderr)
            return False
        finally:
            self.model.zero_grad(set_to_none=True)
            device.set_rng_state(rng)
            self.elapsed_s += time.perf_counter() - started
        self.compiled = True
        return True

    # -- the loop -----------------------------------------------------------------------------------------------------

    def fit(self) -> int:
        """Train to `max_steps`, or for `max_minutes`; return 0, or 130 / 143 after a signal. The run is saved in each case.

        Raises TrainingError after `max_skipped_steps` bad steps in a row, CheckpointError if the last save fails.
        """
        self.model.train()
        if wants_compile(self.cfg, self.model, self.runtime, self.elapsed_s):
            print("compiling the model (once; a quarter of a minute) ...", flush=True)
            self.compile()
        for name, was in self.resumed_environment.items():
            if (now := self.environment()[name]) != was:
                print(
                    f"note: {name} was {was} and is {now}: the run goes on, but not bit for bit as it would have",
                    file=sys.stderr,
                )
        with StopRequest() as stop:
            log = MetricsLog(self.run.path, self.step)
            bar = self._progress_bar()
            try:
                self._loop(stop, log, bar)
            finally:
                bar.close()
                log.close()
        return stop.exit_code

    def _progress_bar(self) -> tqdm:
        how = dict(dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 15)
        if self.train.max_minutes is None:
            return tqdm(total=self.train.max_steps, initial=self.step, unit="step", **how)
        form = "{l_bar}{bar}| {n:.0f} of {total:.0f} s{postfix}"
        total = 60 * self.train.max_minutes
        done = min(self.elapsed_s, total)  # tqdm forgets a total that it is past
        return tqdm(total=total, initial=done, bar_format=form, **how)

    def _loop(self, stop: StopRequest, log: MetricsLog, bar: tqdm) -> None:
        if self.step == 0 and self.train.init_from is not None:
            self.first_eval = self._evaluate(log, bar)
        window = Window()
        began, saved_step = self.step, self.step or None  # at step 0 nothing is saved yet
        # a run by the clock does a step all the same if compiling took what was left: it then ends annealed, and saved
        overdue = self.train.max_minutes is not None
        while (self.share() < 1 or (overdue and self.step == began)) and stop.signal is None:
            started = time.perf_counter()
            window.launched.append(self.launch_step())
            every = self.train.log_every, self.train.eval_every, self.train.save_every
            due = stop.signal is not None or self.step == self.train.max_steps or any(self.step % n == 0 for n in every)
            self._read_all(window, but=1 if self.runtime.asynchronous and not due else 0)
            seconds = time.perf_counter() - started
            self.elapsed_s += seconds
            window.seconds += seconds
            bar.update(1 if self.train.max_minutes is None else min(seconds, bar.total - bar.n))
            last = self.share() >= 1
            log_due, eval_due, save_due = (last or self.step % n == 0 for n in every)
            if last or stop.signal is not None:
                self._read_all(window)
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
            if save_due or improved:
                if self.save(required=last):
                    saved_step = self.step
                else:
                    self.best = best_on_disk  # or the next save would delete it in favour of one that is not there
            if self.skipped_in_a_row >= self.train.max_skipped_steps:
                raise TrainingError(
                    f"fewer than {self.train.max_skipped_steps} steps in a row may be skipped for a loss or gradient "
                    f"that is not finite, but {self.skipped_in_a_row} were; go on with --train.precision fp32, or start over "
                    f"with --fresh and a lower --train.lr or --train.eps 1e-5"
                )
        self._read_all(window)  # of a signal that came since
        if stop.signal is not None and saved_step != self.step:
            self.save(required=True)

    def _read_all(self, window: Window, but: int = 0) -> None:
        """Read the launched steps, save for the newest `but`; say which were skipped."""
        while len(window.launched) > but:
            step = window.launched.popleft()
            loss, window.norm = self.read(step)
            if math.isfinite(loss) and math.isfinite(window.norm):
                window.loss += loss * step.n_targets
                window.n_targets += step.n_targets
            else:
                number = self.step - len(window.launched)
                tqdm.write(f"warning: step {number} skipped: loss {loss}, gradient norm {window.norm}", file=sys.stderr)

    def _log(self, window: Window, log: MetricsLog, bar: tqdm) -> None:
        mean, rate = window.loss / window.n_targets, window.n_targets / window.seconds
        log.write(
            self.step,
            tokens=self.position * self.cfg.model.block_size,
            loss=mean,
            lr=self.train.lr * self.rate_scale,
            grad_norm=window.norm,
            tokens_per_s=rate,
            elapsed_s=self.elapsed_s,
            skipped_steps=self.skipped,
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

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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import device
from checkpoint import CheckpointError, RunDirectory, load_weights, state_digest
from config import IGNORE, Config, TrainConfig
from device import Runtime
from errors import KindlingError
from metrics import MetricsLog
from model import LanguageModel
from shards import Batch, TokenDataset, rows_of_rank

COMPILE_FLOPS = 2e13  # about a minute of a small CPU: a shorter run ends before compiling has paid
VALIDATION_ROWS = 16


class TrainingError(KindlingError):
    """A run that cannot go on."""


class Batches(Protocol):
    """Training rows, addressed by their position in the run. `n_rows` are an epoch."""

    n_rows: int

    def rows(self, first: int, count: int) -> Batch:
        """Return the rows at positions first, first + 1, ..."""
        ...


def learning_rate_scale(step: int, cfg: TrainConfig) -> float:
    """Return the factor on the peak learning rate at `step` (from 0): linear warmup, then decay to `min_lr_ratio`."""
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    progress = min(1.0, (step - cfg.warmup_steps + 1) / max(1, cfg.max_steps - cfg.warmup_steps))
    if cfg.schedule == "cosine":
        decay = 0.5 * (1 + math.cos(math.pi * progress))
    elif cfg.schedule == "linear":
        decay = 1 - progress
    else:
        return 1.0
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * decay


def make_optimizers(model: LanguageModel, cfg: TrainConfig) -> list[torch.optim.Optimizer]:
    """Return AdamW over all parameters, or Muon over the blocks' matrices and AdamW over the rest.

    Weight decay touches matrices only. Each group keeps its peak rate as `peak_lr`. Muon: Jordan et al. 2024.
    """
    inside = {id(p) for part in model.compilable() for p in part.parameters()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    hidden = [p for p in parameters if cfg.optimizer == "muon" and id(p) in inside and p.ndim == 2]
    taken = {id(p) for p in hidden}
    rest = [p for p in parameters if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True
        )
    ]
    if hidden:
        optimizers.append(torch.optim.Muon(hidden, lr=cfg.muon_lr, weight_decay=cfg.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def to_device(rows: np.ndarray, runtime: Runtime) -> Tensor:
    """Copy rows of token ids to the device as int64."""
    return torch.from_numpy(np.ascontiguousarray(rows)).to(runtime.device)


def summed_loss(model: LanguageModel, batch: Batch, runtime: Runtime) -> tuple[Tensor, Tensor]:
    """Return the summed loss of a batch, and its number of supervised tokens; all of training and validation comes here."""
    idx, targets, positions = (None if rows is None else to_device(rows, runtime) for rows in batch)  # (B, T) each
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


def wants_compile(cfg: Config, model: LanguageModel, runtime: Runtime) -> bool:
    """Return whether compiling pays for this run, or is asked for."""
    if cfg.train.compile != "auto":
        return cfg.train.compile == "on"
    if 6 * model.n_parameters() * cfg.tokens < COMPILE_FLOPS:
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
        self.optimizers = make_optimizers(model, cfg.train)
        self.scaler = runtime.grad_scaler()
        self.step = 0  # optimiser steps done, skipped ones included
        self.position = 0  # rows consumed
        self.skipped = 0  # steps whose loss or gradient was not finite
        self.skipped_in_a_row = 0
        self.elapsed_s = 0.0  # time in steps, over all sessions of the run
        self.best: dict[str, float] | None = None
        self.first_eval: dict[str, float] = {}  # of the weights that it starts from, where those are another run's
        self.last_eval: dict[str, float] = {}
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

    def forward_backward(self) -> tuple[Tensor, int]:
        """Accumulate the gradients of the step's mean loss; return that loss (a tensor) and the supervised tokens."""
        rows = rows_of_rank(self.position, self.train.batch_size)
        batch = self.batches.rows(rows.start, len(rows))
        n_targets = int((batch.targets != IGNORE).sum())
        total = torch.zeros((), device=self.runtime.device)
        for start in range(0, len(rows), self.train.micro_batch):
            micro = batch.part(slice(start, start + self.train.micro_batch))
            loss, _ = summed_loss(self.model, micro, self.runtime)
            loss = loss / max(1, n_targets)
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total, n_targets

    def train_step(self) -> tuple[float, float, int]:
        """Do one optimiser step; return its loss, gradient norm and tokens. A loss or norm that is not finite skips it."""
        scale = learning_rate_scale(self.step, self.train)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * scale
        loss, n_targets = self.forward_backward()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.train.grad_clip or math.inf)
        finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
        if finite:
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        self.scaler.update()  # also after a skip: it lowers the scale, and the next unscale_ needs it
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.skipped += not finite
        self.step += 1
        self.position += self.train.batch_size
        return float(loss), float(norm), n_targets

    def compile(self) -> bool:
        """Compile the model and run one batch through it, leaving no trace in the run; on failure warn and stay eager."""
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
        self.compiled = True
        return True

    # -- the loop -----------------------------------------------------------------------------------------------------

    def fit(self) -> int:
        """Train to `max_steps`; return 0, or 130 / 143 after a signal. The run is saved in each case.

        Raises TrainingError after `max_skipped_steps` bad steps in a row, CheckpointError if the last save fails.
        """
        self.model.train()
        if wants_compile(self.cfg, self.model, self.runtime):
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
            bar = tqdm(
                total=self.train.max_steps,
                initial=self.step,
                unit="step",
                dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 15,
            )
            try:
                self._loop(stop, log, bar)
            finally:
                bar.close()
                log.close()
        return stop.exit_code

    def _loop(self, stop: StopRequest, log: MetricsLog, bar: tqdm) -> None:
        if self.step == 0 and self.train.init_from is not None:
            self.first_eval = self._evaluate(log, bar)
        window_loss, window_tokens, window_s = 0.0, 0, 0.0
        saved_step = self.step or None  # at step 0 nothing is saved yet
        while self.step < self.train.max_steps and stop.signal is None:
            started = time.perf_counter()
            loss, norm, tokens = self.train_step()
            seconds = time.perf_counter() - started
            self.elapsed_s += seconds
            bar.update(1)
            if math.isfinite(loss) and math.isfinite(norm):
                window_loss += loss * tokens
                window_tokens += tokens
                window_s += seconds
            else:
                tqdm.write(f"warning: step {self.step} skipped: loss {loss}, gradient norm {norm}", file=sys.stderr)
            last = self.step == self.train.max_steps
            if window_tokens and (self.step % self.train.log_every == 0 or last):
                rate = window_tokens / window_s
                log.write(
                    self.step,
                    tokens=self.position * self.cfg.model.block_size,
                    loss=window_loss / window_tokens,
                    lr=self.optimizers[0].param_groups[0]["lr"],
                    grad_norm=norm,
                    tokens_per_s=rate,
                    elapsed_s=self.elapsed_s,
                    skipped_steps=self.skipped,
                )
                bar.set_postfix_str(f"loss {window_loss / window_tokens:.3f}, {rate:,.0f} tokens/s", refresh=False)
                window_loss, window_tokens, window_s = 0.0, 0, 0.0
            improved, best_on_disk = False, self.best
            if self.step % self.train.eval_every == 0 or last:
                self.last_eval = self._evaluate(log, bar)
                loss = self.last_eval["val_loss"]
                improved = math.isfinite(loss) and (self.best is None or loss < self.best["val_loss"])
                if improved:
                    self.best = {"step": self.step, "val_loss": loss}
            if self.step % self.train.save_every == 0 or improved or last:
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
        if stop.signal is not None and saved_step != self.step:
            self.save(required=True)

    def _evaluate(self, log: MetricsLog, bar: tqdm) -> dict[str, float]:
        """Evaluate, log, say and return what came out."""
        result = self.evaluate(self.model)
        log.write(self.step, **result)
        tqdm.write(f"step {self.step}: " + ", ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in result.items()))
        bar.refresh()
        return result

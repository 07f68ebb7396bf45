"""A run in progress: one optimiser step, saving, resuming, rolling back. The loop over steps is in loop.py.

A run is a pure function of its config and data: the learning rate follows from the step, the batch from one integer (the
index of its first row), dropout from a random state that is saved. So on a CPU, with the same number of threads and ranks,
a run that was stopped and resumed ends with the same bits as one that was not. (A GPU's kernels may add in another order.)
Losses are sums. They are divided once, by the number of supervised tokens of the whole step on all ranks. So accumulation
and the number of ranks change nothing but rounding.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from config import IGNORE, Config
from kindling import device
from kindling.allocator import keep_freed_memory
from kindling.data.shards import rank_rows
from kindling.device import Runtime
from kindling.distributed import MainRankFailed, wrap_ddp
from kindling.runs.checkpoint import (
    CheckpointError,
    RunDirectory,
    is_sharded_checkpoint,
    load_sharded_checkpoint,
    load_weights,
)
from kindling.runs.fsdp import full_tensor, is_sharded, shard, state_digest, synchronize_gradients
from kindling.runs.loading import load_model
from kindling.training.compilation import mark_compiled
from kindling.training.guard import SpikeGuard
from kindling.training.optim import make_optimizers
from kindling.training.prefetch import Prefetch, TrainingRows
from kindling.training.schedule import fraction_done, has_stable_part, learning_rate_scale
from kindling.training.skipped_steps import SkippedStepRecorder
from kindling.training.state import TrainingState
from kindling.training.validation import Validation, summed_loss
from model import LanguageModel


class LaunchedStep(NamedTuple):
    """One optimiser step. Its results are still on the device: reading them waits for the device."""

    loss: Tensor  # mean over the step's supervised tokens
    norm: Tensor  # of the gradient
    n_targets: int
    number: int  # from 1
    first_row: int
    norm_limit: float  # a larger norm is an outlier


class Trainer:
    """A run in progress: model, optimisers, state, and the folder that they are saved to."""

    def __init__(
        self,
        cfg: Config,
        run: RunDirectory,
        model: LanguageModel,
        batches: TrainingRows,
        validation: Validation | None,
        runtime: Runtime,
    ):
        """`cfg` must have its number of steps (`Config.with_steps`), and a batch that the ranks can divide.

        A trainer without `validation` cannot run the loop: only its steps are measured. On a CPU, the process keeps freed memory
        from here on (kindling/allocator.py).
        """
        if runtime.device.type == "cpu":
            keep_freed_memory()
        self.cfg, self.train, self.run, self.runtime, self.world = cfg, cfg.train, run, runtime, runtime.world
        self.model, self.batches, self.validation = model, batches, validation
        ranks = self.world.size
        assert cfg.train.batch_size % ranks == 0, "start_or_resume.require_divisible_batch checks it"
        self.rows_per_rank = cfg.train.batch_size // ranks  # rows of a step on each rank
        largest = min(cfg.train.micro_batch, self.rows_per_rank)
        self.micro_batch = max(n for n in range(1, largest + 1) if self.rows_per_rank % n == 0)
        model.checkpoint_activations = cfg.train.activation_checkpointing
        if sharded := ranks > 1 and cfg.train.parallel == "fsdp":
            shard(model, ranks, torch.bfloat16 if runtime.precision == "bf16" else None)
        self.optimizers = make_optimizers(model, cfg.train, runtime.matmul_dtype)
        # DDP averages gradients over the ranks, FSDP sums them: with this scale both give the sum
        self.ddp_model = model if ranks == 1 or sharded else wrap_ddp(model, runtime.device)
        self.loss_scale = 1 if ranks == 1 or sharded else ranks
        self.prefetch = Prefetch(batches)
        self.scaler = runtime.grad_scaler()
        self.guard = SpikeGuard(cfg.train.spike_ratio)
        self.recorder = SkippedStepRecorder(run.path, batches)
        self.state = TrainingState()
        self.lr_scale = 0.0  # factor on the peak learning rates at the newest step
        self.compiled = False
        self.resumed_environment: dict[str, Any] = {}

    # -- saving and resuming ------------------------------------------------------------------------------------------

    def saved_state(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides the weights. Every rank must call it."""
        return {
            **self.state.to_dict(),
            "guard": self.guard.state_dict(),
            # with FSDP each rank saves its part of the optimisers beside the weights
            "optimizers": [] if self.train.parallel == "fsdp" else [o.state_dict() for o in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "rng": self.world.gather(device.rng_state(self.runtime)),
            "environment": self.environment(),
        }

    def save(self, required: bool = False) -> bool:
        """Save a checkpoint, delete old ones, and return True. If saving fails, warn and return False; raise if `required`.

        Every rank must call it. Without FSDP only the main rank writes.
        """
        step, contents, failure = self.state.step, self.saved_state(), None
        try:
            if self.train.parallel == "fsdp":
                self.run.save_sharded(step, self.model, self.optimizers, contents, self.world)
            elif self.world.main:
                self.run.save(step, self.model, contents)
        except CheckpointError as e:
            failure = e
        if self.world.max([float(failure is not None)])[0]:
            if required:
                raise failure or MainRankFailed
            self.say(f"warning: {failure}; the run goes on and tries again at the next checkpoint")
            return False
        if self.world.main:
            best_step = None if self.state.best is None else int(self.state.best["step"])
            decay_step = self.state.decay_step or 0 if has_stable_part(self.train) else 0
            self.run.prune(self.train.keep_checkpoints, best_step, step, decay_step)
        return True

    def resume(self, folder: Path, saved: dict[str, Any]) -> None:
        """Restore a verified checkpoint; `saved` is its training state (`load_state`). Every rank must call it."""
        if is_sharded_checkpoint(folder):
            load_sharded_checkpoint(folder, self.model, self.optimizers)
        else:
            load_weights(folder, self.model)
            for optimizer, its_state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(its_state)
        if saved["scaler"]:  # empty unless the run was in fp16
            self.scaler.load_state_dict(saved["scaler"])
        self.state = TrainingState.from_dict(saved)
        if self.validation is not None:
            self.validation.part = self.state.validation_rows
        if "guard" in saved:
            self.guard.load_state_dict(saved["guard"])
        elif self.train.spike_ratio:  # a run of an earlier version of the code
            self.say(
                f"note: from here on a gradient {self.train.spike_ratio:g} times the median of those before is skipped"
            )
        rng_states = saved["rng"] if isinstance(saved["rng"], list) else [saved["rng"]]
        if self.world.rank < len(rng_states):
            device.set_rng_state(rng_states[self.world.rank])
        else:
            device.seed_rank(self.train.seed, self.state.step, self.world.rank)
        self.resumed_environment = saved["environment"]

    def environment(self) -> dict[str, Any]:
        """Return what else the exact bits of the run depend on, besides config and data."""
        return {**self.runtime.describe(), "compiled": self.compiled}

    def unsharded_model(self) -> LanguageModel:
        """Return a model for anything but training: this one, or if it is sharded, a whole one from the newest checkpoint."""
        return load_model(self.run, self.runtime.device)[0] if is_sharded(self.model) else self.model

    def digest(self) -> str:
        """Return the sha256 of weights and optimiser state. Every rank must call it."""
        return state_digest(self.model, self.optimizers)

    def say(self, text: str) -> None:
        """Print a line for the user, once for all ranks, beside the progress bar."""
        if self.world.main:
            tqdm.write(text, file=sys.stderr)

    # -- one step -----------------------------------------------------------------------------------------------------

    def share(self) -> float:
        """Return the fraction of the run that is done, 0 to 1."""
        return fraction_done(self.state.step, self.state.elapsed_s, self.train)

    def _rank_range(self, row: int) -> range:
        """Return this rank's rows of the batch that begins at `row`."""
        return rank_rows(row, self.train.batch_size, self.world.rank, self.world.size)

    def forward_backward(self, synchronized: bool = True) -> tuple[Tensor, int]:
        """Accumulate the gradients of the step's mean loss; return this loss (a tensor) and the supervised tokens of all ranks.

        The ranks exchange gradients once, in the backward pass of the last micro-batch. Without `synchronized` they exchange
        nothing, unless the model is sharded, and the figures are those of this rank.
        """
        row = self.state.row_index
        next_row = self.state.next_row(row, self.train.batch_size)
        batch = self.prefetch.take(self._rank_range(row), self._rank_range(next_row))
        n_targets = int((batch.targets != IGNORE).sum())
        if synchronized:
            n_targets = int(self.world.sum([n_targets])[0])
        total = torch.zeros((), device=self.runtime.device)
        for start in range(0, self.rows_per_rank, self.micro_batch):
            micro = batch.part(slice(start, start + self.micro_batch))
            last = start + self.micro_batch >= self.rows_per_rank
            with self._gradient_exchange(last and synchronized):
                loss, _ = summed_loss(self.ddp_model, micro, self.runtime)
                loss = loss / max(1, n_targets)
                self.scaler.scale(loss * self.loss_scale).backward()
            total += loss.detach()
        if synchronized:
            self.world.all_reduce_sum(total)
        return total, n_targets

    def _gradient_exchange(self, wanted: bool) -> contextlib.AbstractContextManager[Any]:
        """Return the context for a backward pass that exchanges gradients between ranks, or only accumulates them."""
        synchronize_gradients(self.model, wanted)  # no effect on a model that is not sharded
        if isinstance(self.ddp_model, DistributedDataParallel) and not wanted:
            return self.ddp_model.no_sync()
        return contextlib.nullcontext()

    def launch_step(self) -> LaunchedStep:
        """Do one optimiser step without waiting for the device; `finish_step` reads its results.

        If the loss or the gradient norm is not finite, or the norm is an outlier, weights and optimisers do not change. The
        device itself checks this: an optimiser whose `found_inf` is not 0 changes nothing.
        """
        state = self.state
        self.lr_scale = learning_rate_scale(state.step, state.elapsed_s, self.train)
        loss, n_targets = self.forward_backward()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = full_tensor(nn.utils.clip_grad_norm_(self.model.parameters(), self.train.grad_clip or math.inf))
        norm_limit = self.guard.limit(state.step + 1)  # `spike_ratio` times the median of the norms before it
        bad = (~(torch.isfinite(loss) & torch.isfinite(norm) & (norm <= norm_limit))).float()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * self.lr_scale
            # as GradScaler.step does, but in every precision, and with one value for both optimisers
            optimizer.found_inf = bad  # type: ignore[attr-defined]  # AdamW reads it without declaring it
            if self.runtime.supports_found_inf or not bad.item():
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()  # after a skipped step too: it lowers the scale, and the next unscale_ needs it
        state.step += 1
        step = LaunchedStep(loss, norm, n_targets, state.step, state.row_index, norm_limit)
        state.row_index = state.next_row(state.row_index, self.train.batch_size)
        return step

    def finish_step(self, step: LaunchedStep) -> tuple[float, float, bool]:
        """Wait for a launched step; return its loss, gradient norm, and whether it was done; else it counts as skipped."""
        state = self.state
        loss, norm = torch.stack((step.loss, step.norm)).tolist()
        finite = math.isfinite(loss) and math.isfinite(norm)
        good = finite and norm <= step.norm_limit
        self.guard.add(step.number, norm, good, finite)  # a bad one does not change later limits
        if good:
            state.skipped_in_a_row = 0
            return loss, norm, good
        if state.skipped_in_a_row == 0:
            state.streak = step.number, step.first_row
        state.skipped_in_a_row += 1
        state.skipped += 1
        return loss, norm, good

    def train_step(self) -> tuple[float, float, int]:
        """Do one optimiser step and wait for it; return its loss, gradient norm and supervised tokens."""
        started = time.perf_counter()
        step = self.launch_step()
        loss, norm, _ = self.finish_step(step)
        self.state.elapsed_s += time.perf_counter() - started
        return loss, norm, step.n_targets

    # -- compiling ----------------------------------------------------------------------------------------------------

    def compile(self) -> bool:
        """Compile the model and try it on one batch. If that fails, warn and go on uncompiled. Return whether it worked."""
        reason = ""
        with self.preserve_state():
            try:
                device.skip_vector_isa_test()
                self.model.enable_compile(self.runtime.prefers_blockwise_attention)
                self.forward_backward(synchronized=False)  # a rank that fails must not leave the others waiting
            except Exception as e:  # compiler errors have no common class
                if device.is_out_of_memory(e):
                    raise
                reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        reasons = [said for said in self.world.gather(reason) if said]
        if reasons:
            self.model.disable_compile()
            self.say(f"warning: torch.compile failed ({reasons[0]}); training goes on uncompiled")
            return False
        self.compiled = True
        if self.world.main:
            mark_compiled(self.cfg, self.runtime)
        return True

    @contextlib.contextmanager
    def preserve_state(self) -> Iterator[None]:
        """Run code without changing the run; only its time counts."""
        started, rng = time.perf_counter(), device.rng_state(self.runtime)
        try:
            yield
        finally:
            self.model.zero_grad(set_to_none=True)
            device.set_rng_state(rng)
            self.state.elapsed_s += time.perf_counter() - started

"""Measures the time and memory of a run, and its fastest micro-batch, without files: `python main.py --dry-run`.

The batch of a step stays the same. The micro-batches that divide it are tried, the smallest first, until memory or time runs
out. On a CPU a process that takes too much memory is killed, so the need of the next size is estimated from the two sizes
before it. Limit: the tokens are random, so the figures do not include reading real tokens from a slow disk.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import Config, ModelConfig
from kindling import device
from kindling.data.shards import Batch, TokenDataset, document_position_ids
from kindling.device import Runtime
from kindling.errors import KindlingError
from kindling.runs.checkpoint import RunDirectory
from kindling.training.compilation import wants_compile
from kindling.training.trainer import Trainer
from model import LanguageModel

LIMIT_S = 25.0  # for all sizes together
COMPILED_LIMIT_S = 120.0  # if each size is compiled
PASSES, MEASURED_S = 3, 0.3  # at least, for each size; the first pass allocates memory and does not count
HEADROOM = 0.9  # fraction of the free memory that may be used
TIE = 0.03  # a smaller gain may be noise: do not advise a change
NO_TIME, NO_MEMORY, UNKNOWN = "time is out", "memory is out", "how much memory is free is not known here"


class DryRunError(KindlingError):
    """A model is too large for the machine."""


@dataclass(frozen=True)
class Measurement:
    """What was measured of the forward and backward pass of one micro-batch."""

    micro_batch: int
    pass_s: float
    peak_bytes: int
    """Peak memory: of the process, or on a GPU of its tensors. 0 if unknown."""


@dataclass(frozen=True)
class Sweep:
    """The measurements of the micro-batches of a run."""

    batch_size: int
    measured: list[Measurement]
    untried: dict[int, str]
    """The sizes that were not measured, each with the reason."""
    update_s: float
    """Time of a step beside its passes: gradient clipping and the optimisers."""
    update_bytes: int
    """Peak memory of this."""

    def step_s(self, m: Measurement) -> float:
        """Return the time of an optimiser step in micro-batches of this size."""
        return self.batch_size // m.micro_batch * m.pass_s + self.update_s

    def of(self, micro_batch: int) -> Measurement:
        """Return the measurement of this size. If there is none, return that of the fastest."""
        return next((m for m in self.measured if m.micro_batch == micro_batch), self.fastest())

    def fastest(self) -> Measurement:
        """Return the size whose steps are fastest."""
        return min(self.measured, key=self.step_s)


class RandomRows:
    """Rows of random tokens."""

    n_rows = 1

    def __init__(self, cfg: ModelConfig):
        self.cfg = cfg

    def rows(self, first: int, count: int) -> Batch:
        """Return `count` random rows, a function of `first`."""
        rows = np.random.default_rng(first).integers(0, self.cfg.vocab_size, (count, self.cfg.block_size + 1))
        idx = rows[:, :-1]
        # any token can be the end of text: the document mask costs the same wherever documents end
        return Batch(idx, rows[:, 1:], document_position_ids(idx, 0) if self.cfg.document_mask else None)

    @property
    def dataset(self) -> TokenDataset:
        """Raise: random tokens are in no data set."""
        raise NotImplementedError

    def tokens_of(self, position: int) -> list[range]:
        """Return no tokens: random ones are in no data set."""
        return []


def trainer_of(micro_batch: int, cfg: Config, model: LanguageModel, runtime: Runtime) -> Trainer:
    """Return a trainer on random tokens. Its step is one micro-batch, and it writes nothing."""
    cfg = replace(cfg, train=replace(cfg.train, batch_size=micro_batch, micro_batch_size=None))
    return Trainer(cfg, RunDirectory(Path(os.devnull)), model, RandomRows(cfg.model), None, runtime)


def seconds_of(work: Callable[[], Any], runtime: Runtime, deadline: float) -> float:
    """Return the median time of some calls of `work`. The first call counts only if there is no time for more.

    `deadline` is a value of time.perf_counter.
    """
    seconds: list[float] = []
    while len(seconds) <= PASSES or sum(seconds[1:]) < MEASURED_S:
        device.synchronize(runtime)
        started = time.perf_counter()
        work()
        device.synchronize(runtime)
        seconds.append(time.perf_counter() - started)
        if time.perf_counter() + seconds[-1] > deadline:
            break
    return statistics.median(seconds[1:] or seconds)


def grow(
    smallest: Measurement,
    sizes: list[int],
    own: int,
    measure: Callable[[int], Measurement],
    resident_bytes: int,
    room: Callable[[], float | None],
    deadline: float,
) -> tuple[list[Measurement], dict[int, str]]:
    """Measure ascending `sizes`, all above `smallest`, until memory runs out. Leave out slow sizes, but never `own`.

    `own` is the micro-batch of the run. A line through the peaks of the last two sizes gives the memory of the next one; at
    first, through `resident_bytes` at size 0 and the peak of `smallest`. A size that needs more than `room()` is not measured.
    If `room()` is None, no size above `own` is measured.
    Return the measurements, `smallest` first, and the other sizes with the reason.
    """
    measured = [smallest]
    untried: dict[int, str] = {}
    known = [(0, resident_bytes), (smallest.micro_batch, smallest.peak_bytes)]
    for i, size in enumerate(sizes):
        (n0, bytes0), (n1, bytes1) = known[-2:]
        most, last = room(), measured[-1]
        if most is None and size > own:
            untried |= dict.fromkeys(sizes[i:], UNKNOWN)
            break
        if most is not None and bytes1 + (size - n1) * max(0, bytes1 - bytes0) / (n1 - n0) > most:
            untried |= dict.fromkeys(sizes[i:], NO_MEMORY)
            break
        if size != own and time.perf_counter() + 2 * last.pass_s * size / last.micro_batch > deadline:
            untried[size] = NO_TIME
            continue
        try:
            measured.append(measure(size))
        except RuntimeError as e:
            if not device.is_out_of_memory(e):
                raise
            untried |= dict.fromkeys(sizes[i:], NO_MEMORY)
            break
        known.append((size, measured[-1].peak_bytes))
    return measured, untried


def sweep(first: Trainer, cfg: Config, compiled: bool, limit_s: float) -> Sweep:
    """Measure the micro-batches that divide the batch, the smallest with the trainer `first`.

    `compiled` says that the model is compiled; then each size is compiled on its own, within `limit_s`. Raises DryRunError if
    not even the smallest fits.
    """
    model, runtime, deadline = first.model, first.runtime, time.perf_counter() + limit_s
    weights = nbytes(model.parameters())
    free = device.available_memory_bytes(runtime)
    if free is not None and 3 * weights > free:  # gradients and two moments
        raise too_large(weights)

    def measure(micro_batch: int) -> Measurement:
        if compiled:
            torch.compiler.reset()  # or after some shapes it stops compiling and runs uncompiled
        trainer = first if micro_batch == 1 else trainer_of(micro_batch, cfg, model, runtime)
        device.reset_peak_memory(runtime)
        pass_s = seconds_of(trainer.forward_backward, runtime, deadline)
        return Measurement(micro_batch, pass_s, device.peak_memory_bytes(runtime))

    def room() -> float | None:
        counts, free = device.reset_peak_memory(runtime), device.available_memory_bytes(runtime)
        return device.peak_memory_bytes(runtime) + HEADROOM * free if counts and free is not None else None

    try:
        first.train_step()  # allocates the optimisers' state, as in a run
        device.reset_peak_memory(runtime)
        resident = device.peak_memory_bytes(runtime) + weights  # with the gradients
        step_s = seconds_of(first.train_step, runtime, deadline)
        update_bytes = device.peak_memory_bytes(runtime)
        smallest = measure(1)
    except RuntimeError as e:
        if not device.is_out_of_memory(e):
            raise
        raise too_large(weights) from None
    sizes = [n for n in range(2, cfg.train.batch_size + 1) if cfg.train.batch_size % n == 0]
    measured, untried = grow(smallest, sizes, cfg.train.micro_batch, measure, resident, room, deadline)
    update_s = max(0.0, step_s - smallest.pass_s)
    return Sweep(cfg.train.batch_size, measured, untried, update_s, update_bytes)


def too_large(weights: int) -> DryRunError:
    """Return the error for a model that does not fit with even one row. `weights` is their size in bytes."""
    return DryRunError(
        f"the memory must have room for gradients and optimiser state, {3 * weights / 1e9:.1f} GB, and for one row's "
        f"activations, but does not; choose a smaller model, or a lower --model.block-size"
    )


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the size of all tensors in bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class Pace:
    """The speed of a run with one size of micro-batch, compiled or not as in training."""

    micro_batch: int
    step_s: float
    compile_s: float
    compiled: bool


def pace_of(cfg: Config, model: LanguageModel, runtime: Runtime, swept: Sweep, compile_s: float | None) -> Pace:
    """Return the speed of the run with its own micro-batch, or with the fastest if its own does not fit.

    `compile_s` is the time of compiling if the measured passes were compiled, else None. If they were not, but the run would
    be, the passes are measured again with a compiled model.
    """
    own = swept.of(cfg.train.micro_batch)
    if compile_s is not None or not wants_compile(cfg, model, runtime):
        return Pace(own.micro_batch, swept.step_s(own), compile_s or 0.0, compile_s is not None)
    trainer = trainer_of(own.micro_batch, cfg, model, runtime)
    compiled = trainer.compile()
    compile_s = trainer.state.elapsed_s
    pass_s = seconds_of(trainer.forward_backward, runtime, time.perf_counter() + LIMIT_S)
    return Pace(own.micro_batch, swept.step_s(replace(own, pass_s=pass_s)), compile_s, compiled)


def length_of(cfg: Config, pace: Pace, done: int) -> str:
    """Return the rest of a run after `done` steps as a text: its time, or with `max_minutes` what fits into all of them."""
    if cfg.train.max_minutes is not None:
        steps = max(0, int((60 * cfg.train.max_minutes - pace.compile_s) / pace.step_s))
        tokens = steps * cfg.train.batch_size * cfg.model.block_size
        return f"about {steps:,} steps, {tokens:,} tokens, in {cfg.train.max_minutes:g} minutes"
    assert cfg.train.max_steps is not None, "cfg.tokens was read before, and requires it"
    left = max(0, cfg.train.max_steps - done)
    hours = (left * pace.step_s + pace.compile_s) / 3600
    duration = f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
    return f"{duration} for {left:,} steps, {done:,} are done"


def figures(cfg: Config, first: Trainer, swept: Sweep, pace: Pace, done: int) -> list[str]:
    """Return the lines about the run with its own config."""
    model, runtime, train = first.model, first.runtime, cfg.train
    total, weights = model.n_parameters(), nbytes(model.parameters())
    state = nbytes(t for o in first.optimizers for s in o.state.values() for t in s.values() if isinstance(t, Tensor))
    peak = max(swept.update_bytes, swept.of(pace.micro_batch).peak_bytes)
    how = (
        f"{runtime.precision}, {'compiled' if pace.compiled else 'not compiled'}, {torch.get_num_threads()} CPU threads"
    )
    tokens = "" if train.max_minutes is not None else f"{cfg.tokens:,} = {train.max_steps:,} "
    return [
        f"model        {total:,} parameters, {total - cfg.model.n_position_parameters:,} without positions",
        f"runs on      {runtime.device.type}, {how}",
        f"memory       {2 * weights / 1e9:.2f} GB weights and gradients + {state / 1e9:.2f} GB optimiser state; "
        f"{peak / 1e9:.2f} GB at the peak of a step, measured",
        f"tokens       {tokens}steps of {train.batch_size} x {cfg.model.block_size}, "
        f"in {train.batch_size // pace.micro_batch} micro-batches of {pace.micro_batch}",
        f"speed        {train.batch_size * cfg.model.block_size / pace.step_s:,.0f} tokens/s, measured on random tokens",
        f"{'time' if train.max_minutes is not None else 'time left':<13}{length_of(cfg, pace, done)}",
    ]


def table(cfg: Config, swept: Sweep) -> list[str]:
    """Return the lines of the table of sizes."""
    lines = [f"{'micro-batch':>11}{'tokens/s':>12}{'GB at the peak':>16}"]
    for m in swept.measured:
        speed = swept.batch_size * cfg.model.block_size / swept.step_s(m)
        peak = max(swept.update_bytes, m.peak_bytes)
        said = "  this run's" if m.micro_batch == cfg.train.micro_batch else ""
        lines.append(f"{m.micro_batch:>11}{speed:>12,.0f}{f'{peak / 1e9:.2f}' if peak else 'unknown':>16}{said}")
    for why in dict.fromkeys(swept.untried.values()):
        sizes = ", ".join(str(size) for size, reason in swept.untried.items() if reason == why)
        lines.append(f"not tried: {sizes} ({why})")
    return lines


def advice(cfg: Config, swept: Sweep, pace: Pace, done: int) -> str:
    """Return the line about the largest and the fastest size."""
    own, best = swept.of(cfg.train.micro_batch), swept.fastest()
    largest = f"the largest that was tried and fits is {swept.measured[-1].micro_batch}"
    if own.micro_batch == cfg.train.micro_batch and swept.step_s(own) < (1 + TIE) * swept.step_s(best):
        return f"{largest}; none is faster than this run's {own.micro_batch}"
    faster = replace(pace, step_s=pace.step_s * swept.step_s(best) / swept.step_s(own))
    return f"{largest}; the fastest is --train.micro-batch-size {best.micro_batch}: {length_of(cfg, faster, done)}"


def dry_run(cfg: Config, model: LanguageModel, runtime: Runtime, done: int = 0, limit_s: float | None = None) -> str:
    """Train on random tokens, without files. Return a text: time and memory of the run, and its fastest micro-batch.

    `done` is the number of steps that the run has already done. Measuring all sizes takes about `limit_s` seconds; None: a
    limit that suits the device. Raises DryRunError for a model that is too large.
    """
    model.train()
    first = trainer_of(1, cfg, model, runtime)
    # each size is compiled on its own. A GPU needs seconds for it, and its memory depends on it; a CPU takes 15 s a size
    compiled = runtime.asynchronous and wants_compile(cfg, model, runtime) and first.compile()
    compile_s = first.state.elapsed_s if compiled else None
    swept = sweep(first, cfg, compiled, limit_s or (COMPILED_LIMIT_S if compiled else LIMIT_S))
    pace = pace_of(cfg, model, runtime, swept, compile_s)
    lines = [*figures(cfg, first, swept, pace, done), "", *table(cfg, swept)]
    if pace.compiled and not compiled:
        lines.append("sizes are compared uncompiled, since each would have to be compiled for itself")
    return "\n".join([*lines, advice(cfg, swept, pace, done)])

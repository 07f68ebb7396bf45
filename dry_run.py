"""What a run would take, measured without files: `python main.py --dry-run`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import device
from checkpoint import RunDirectory
from config import Config
from device import Runtime
from model import LanguageModel
from shards import Batch, document_positions
from trainer import Trainer, wants_compile


def dry_run(
    cfg: Config, model: LanguageModel, runtime: Runtime, done: int = 0, steps: int = 3, limit_s: float = 20
) -> str:
    """Train a few steps of one micro-batch on random tokens, without files, and return what the run would take.

    `done` is the number of steps that the run has behind it.
    """

    class Noise:
        n_rows = 1

        def rows(self, first: int, count: int) -> Batch:
            rows = np.random.default_rng(first).integers(0, cfg.model.vocab_size, (count, cfg.model.block_size + 1))
            idx = rows[:, :-1]
            # any token for the end of text: a mask across documents costs the same wherever they end
            return Batch(idx, rows[:, 1:], document_positions(idx, 0) if cfg.model.document_mask else None)

    n_micro = cfg.train.batch_size // cfg.train.micro_batch
    trainer = Trainer(
        replace(cfg, train=replace(cfg.train, batch_size=cfg.train.micro_batch, micro_batch_size=None)),
        RunDirectory(Path(os.devnull)),
        model,
        Noise(),
        lambda _: {},
        runtime,
    )
    model.train()
    compiled = wants_compile(cfg, model, runtime) and trainer.compile()
    trainer.train_step()  # the first one allocates

    def seconds_of(work: Callable[[], Any]) -> float:
        device.synchronize(runtime)
        started, done = time.perf_counter(), 0
        while done < steps and (done == 0 or time.perf_counter() - started < limit_s):
            work()
            device.synchronize(runtime)
            done += 1
        return (time.perf_counter() - started) / done

    micro_s = seconds_of(trainer.forward_backward)
    step_s = seconds_of(trainer.train_step) + (n_micro - 1) * micro_s
    state = sum(
        t.numel() * t.element_size()
        for o in trainer.optimizers
        for s in o.state.values()
        for t in s.values()
        if isinstance(t, Tensor)
    )
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    total, positions = model.n_parameters(), cfg.model.n_position_parameters
    left = max(0, cfg.train.max_steps - done)
    hours = left * step_s / 3600
    duration = f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
    how = f"{runtime.precision}, {'compiled' if compiled else 'not compiled'}, {torch.get_num_threads()} CPU threads"
    return "\n".join(
        [
            f"model        {total:,} parameters, {total - positions:,} without positions",
            f"runs on      {runtime.device.type}, {how}",
            f"memory       {2 * weights / 1e9:.2f} GB weights and gradients + {state / 1e9:.2f} GB optimiser state; "
            f"{device.peak_memory_bytes(runtime) / 1e9:.2f} GB at the peak of a step, measured",
            f"tokens       {cfg.tokens:,} = {cfg.train.max_steps:,} steps of {cfg.train.batch_size} x {cfg.model.block_size}, "
            f"in {n_micro} micro-batches of {cfg.train.micro_batch}",
            f"speed        {cfg.tokens / cfg.train.max_steps / step_s:,.0f} tokens/s, measured over {steps} micro-batches",
            f"time left    {duration} for {left:,} steps, {done:,} are done",
        ]
    )

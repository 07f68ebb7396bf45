"""Measure what `model.document_mask` costs a training step, on this machine.

    python benchmarks/document_mask.py                       # 66 steps and two compilations; see that nothing else runs
    python benchmarks/document_mask.py --preset code-50m --micro-batch 4 --steps 5

Two trainers of the same shape, one with the mask, take steps on the same random tokens in turn, in one process,
compiled. Prints the median seconds of each and the median of the ratios of neighbouring steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--micro-batch", type=int, help="sequences per step; by default the preset's micro-batch")
    parser.add_argument("--steps", type=int, default=30, help="pairs of steps")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32", "fp16"))
    flags = parser.parse_args()

    import torch

    from kindling import device
    from kindling.runs.checkpoint import RunDirectory
    from kindling.training.dry_run import RandomRows
    from kindling.training.trainer import Trainer
    from model import build_model
    from presets import preset

    cfg = preset(flags.preset)
    batch = flags.micro_batch or cfg.train.micro_batch
    train = replace(cfg.train, batch_size=batch, micro_batch_size=None, precision=flags.precision)
    runtime = device.resolve(train)

    trainers = []
    for mask in (False, True):
        device.seed_all(0)
        c = replace(cfg, train=train, model=replace(cfg.model, document_mask=mask))
        model = build_model(c.model).to(runtime.device)
        trainers.append(Trainer(c, RunDirectory(Path(os.devnull)), model, RandomRows(c.model), None, runtime))
        trainers[-1].compile()
        for _ in range(3):
            trainers[-1].train_step()
    seconds: tuple[list[float], list[float]] = ([], [])
    for pair in range(flags.steps):
        for i in (0, 1) if pair % 2 else (1, 0):
            device.synchronize(runtime)
            started = time.perf_counter()
            trainers[i].train_step()
            device.synchronize(runtime)
            seconds[i].append(time.perf_counter() - started)
    plain, masked = (statistics.median(s) for s in seconds)
    ratio = statistics.median(m / p for p, m in zip(*seconds))
    print(
        f"{flags.preset}, step of {batch} x {cfg.model.block_size}, {runtime.device.type}, {runtime.precision}, "
        f"{'compiled' if all(t.compiled for t in trainers) else 'NOT compiled'}, {torch.get_num_threads()} threads, "
        f"{flags.steps} pairs"
    )
    print(f"without the mask  {plain * 1e3:8.1f} ms   (quartiles {quartiles(seconds[0])})")
    print(f"with the mask     {masked * 1e3:8.1f} ms   (quartiles {quartiles(seconds[1])})")
    print(
        f"ratio             {ratio:8.3f}      (quartiles of pairs {quartiles([m / p / 1e3 for p, m in zip(*seconds)], 3)})"
    )


def quartiles(values: list[float], digits: int = 1) -> str:
    """Return the first and third quartile, times a thousand."""
    low, _, high = statistics.quantiles(values, n=4)
    return f"{low * 1e3:.{digits}f} to {high * 1e3:.{digits}f}"


if __name__ == "__main__":
    from kindling.cli import run_script

    run_script(main)

"""Measure what training on several ranks of one machine costs, beside one process with as many threads.

    python benchmarks/ranks.py                              # 8 minutes; see that nothing else runs
    python benchmarks/ranks.py --shapes code-50m --rounds 1

By turns, a process with two threads and two ranks with one thread each train the same shape on random tokens, uncompiled and in
the preset's batch. Writes benchmarks/results/local/ranks.json: the median tokens/s of each and the ratio of neighbouring turns.
What the ranks lose is the exchange of gradients, and the wait for the slower one; what they win is that nothing else waits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

BATCH = {"code-50m": (4, 2)}  # sequences of a step, and of a pass, where the preset's would take minutes
WARM_UP, MEASURED_S = 2, 20.0


def measure(shape: str, compiled: bool, result: Path) -> None:
    """Train for a while on the ranks that this process is one of; the main one writes tokens/s to `result`."""
    import torch

    from kindling import device
    from kindling.distributed import process_group
    from kindling.runs.checkpoint import RunDirectory
    from kindling.training.dry_run import RandomRows
    from kindling.training.trainer import Trainer
    from model import build_model
    from presets import preset

    cfg = preset(shape)
    batch, micro = BATCH.get(shape, (cfg.train.batch_size, cfg.train.micro_batch))
    train = replace(cfg.train, batch_size=batch, micro_batch_size=micro)
    cfg = replace(cfg, train=train)
    with process_group() as world:
        torch.set_num_threads(2 // world.size)
        runtime = device.resolve(train, world)
        device.seed_all(0)
        model = build_model(cfg.model).to(runtime.device)
        trainer = Trainer(cfg, RunDirectory(Path(os.devnull)), model, RandomRows(cfg.model), None, runtime)
        if compiled:
            trainer.compile()
        seconds: list[float] = []
        for i in range(1000):
            started = time.perf_counter()
            trainer.train_step()
            if i >= WARM_UP:
                seconds.append(time.perf_counter() - started)
            if world.max([sum(seconds)])[0] >= MEASURED_S:
                break
        if world.main:
            rate = batch * cfg.model.block_size / statistics.median(seconds)
            result.write_text(json.dumps({"tokens_per_s": rate, "precision": runtime.precision}), encoding="utf-8")


def turn(shape: str, compiled: bool, ranks: int) -> dict[str, float]:
    """Start that many ranks, and return what they measured."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, *launcher, __file__, "--measure", shape, "--result", str(result)]
        subprocess.run([*command, *(["--compile"] if compiled else [])], check=True, stderr=subprocess.DEVNULL)
        return json.loads(result.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["demo", "autocomplete", "code-50m"])
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--compile", action="store_true", help="compile the models first")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.measure:
        measure(flags.measure, flags.compile, flags.result)
        return

    from machine import Watch, phrase, results_file

    watch, shapes = Watch(), {}
    for shape in flags.shapes:
        alone, together = [], []
        for _ in range(flags.rounds):
            alone.append(turn(shape, flags.compile, 1))
            together.append(turn(shape, flags.compile, 2))
        one, two = ([found["tokens_per_s"] for found in side] for side in (alone, together))
        ratio = statistics.median(b / a for a, b in zip(one, two))
        shapes[shape] = {"one": one, "two": two, "ratio": ratio, "precision": alone[0]["precision"]}
        print(
            f"{shape}: one process with two threads {statistics.median(one):,.0f} tokens/s, two ranks with one thread each "
            f"{statistics.median(two):,.0f}: {ratio:.2f} (median of {flags.rounds})",
            flush=True,
        )
    results = {"machine": watch.describe(), "compiled": flags.compile, "shapes": shapes}
    path = results_file("ranks.json")
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{phrase(results['machine'])}; written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    from kindling.cli import run_script

    run_script(main)

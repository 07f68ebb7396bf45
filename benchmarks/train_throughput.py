"""Measure how fast a whole optimiser step is, beside transformers' GPT-2 of equal shape in a plain AdamW loop.

    python benchmarks/train_throughput.py                   # about 6 minutes on two cores; see that nothing else runs
    python benchmarks/train_throughput.py --shapes demo --rounds 3
    python benchmarks/train_throughput.py --shapes code-50m code-225m smallcoder-1     # on a CUDA machine

Ours is `trainer.Trainer` with the preset's config (without dropout, which the peer has none of either) on random tokens: forward,
backward, clipping, optimiser. The peer is `peer.Peer` with the same layers, width, heads, context, vocabulary and batch, in
float32 and, where the hardware multiplies it, bfloat16, eager and compiled; its best counts. Every way is a process of its
own, so that its memory is its own; they take turns, one works at a time. Medians of rounds, and ratios within rounds.

Model FLOPs of a step are 6 * matrix parameters * tokens + 12 * n_layer * n_embd * block_size * tokens / 2: matrices that
multiply (the head is one, embedding lookups are not), then attention, of which a causal mask leaves half. Their rate is given
as a share of the fastest product of matrices that this machine does in the same precision, measured in the same run, among
square ones and those of the model's layers. Compiling is timed from an empty cache. Memory is the process's peak (VmHWM), on
CUDA what torch allocated. Writes `train_throughput.json` and the same as Markdown into `benchmarks/results/local/`.

Limit: the processes of a shape are held at a time, which at `code-50m` takes some 10 GB.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from child import Child, ChildError
from machine import RESULTS
from throughput_worker import Way, configured, step_flops

ROOT = Path(__file__).resolve().parent.parent

if TYPE_CHECKING:
    from config import Config

WORKER = ROOT / "benchmarks" / "throughput_worker.py"
ON_CPU, ON_CUDA = ("demo", "tinystories", "autocomplete", "code-50m"), ("code-50m", "code-225m", "smallcoder-1")
MIN_ROUNDS, ROUND_S = 2, 4.0  # a round of one way takes as many steps as fit, at least one


class Worker:
    """A process that trains one way of one shape when it is its turn."""

    def __init__(self, shape: str, way: Way, cache: Path):
        """Start it and wait until it is ready; exits with its last words if it cannot. `cache`: an empty folder."""
        self.way = way
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
        command = [sys.executable, str(WORKER), json.dumps([shape, *way])]
        self.child = Child(command, cache / "log.txt", environment)
        self.turns: list[dict[str, Any]] = []
        try:
            self.about = self.child.answer()
        except ChildError as e:
            sys.exit(f"{self.way} must train, but {e}")

    def turn(self, seconds: float) -> None:
        """Let it work for about that long."""
        try:
            self.turns.append(self.child.ask(seconds))
        except ChildError as e:
            sys.exit(f"{self.way} must train, but {e}")

    @property
    def speeds(self) -> list[float]:
        """Tokens a second of each turn."""
        return [turn["tokens"] / turn["seconds"] for turn in self.turns]

    def close(self) -> None:
        """End it."""
        self.child.close()


def ways_of(kind: str) -> list[Way]:
    """Return the ways to measure on a device: ours in its best precision and float32, the peer in each."""
    from kindling import device

    bf16, compiles = device.has_bf16(kind), device.has_compiler(kind)
    precisions = (["fp32"] if kind == "cpu" or not bf16 else []) + (["bf16"] if bf16 else [])
    ours = [Way("ours", precision, compiles) for precision in precisions]
    peers = [Way("peer", precision, False) for precision in precisions]
    return ours + peers + [Way("peer", precision, True) for precision in precisions if compiles]


def measure(shape: str, ways: list[Way], rounds: int, limit_s: float) -> dict[str, Any]:
    """Measure the ways in turn: so many rounds, or fewer of a slow shape once the seconds are over."""
    peaks = [Way("peak", precision) for precision in dict.fromkeys(way.precision for way in ways)]
    began, workers = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for number, way in enumerate([*ways, *peaks]):
            cache = Path(folder, str(number))
            cache.mkdir()
            workers.append(Worker(shape, way, cache))
            stack.callback(workers[-1].close)
            print(f"{shape}: {way} is ready, {json.dumps(workers[-1].about)}", flush=True)
        done, round_s = 0, 0.0
        while done < MIN_ROUNDS or (done < rounds and time.perf_counter() - began + round_s < limit_s):
            started = time.perf_counter()
            for worker in workers if done % 2 == 0 else reversed(workers):
                worker.turn(ROUND_S)
            done, round_s = done + 1, time.perf_counter() - started
            speeds = (f"{w.way} {w.speeds[-1]:,.0f}/s" for w in workers if w.way.side != "peak")
            print(f"{shape}, round {done}: {'; '.join(speeds)}", flush=True)
    peak = {w.way.precision: max(w.turns, key=lambda turn: turn["flops"]) for w in workers if w.way.side == "peak"}
    cfg = configured(shape, "fp32")
    of_ways = {str(w.way): figures(w.way, w.about, w.turns, cfg, peak) for w in workers if w.way.side != "peak"}
    batch = f"{cfg.train.batch_size} x {cfg.model.block_size}"
    return {"batch": batch, "rounds": done, "peak": peak, "ways": of_ways, "ratios": ratios(of_ways)}


def figures(way: Way, about: dict[str, Any], turns: list[dict[str, Any]], cfg: Config, peak: dict[str, Any]) -> dict:
    """Return what is reported of one way."""
    speeds = [turn["tokens"] / turn["seconds"] for turn in turns]
    speed = statistics.median(speeds)
    flops = step_flops(about["matrices"], cfg.model, 1) * speed
    return {
        **way._asdict(),
        **about,
        "tokens_per_s": speed,
        "tokens_per_s_by_round": speeds,
        "step_s": statistics.median(turn["seconds"] / turn["steps"] for turn in turns),
        "flops": flops,
        "share_of_peak": flops / peak[way.precision]["flops"],
        "peak_bytes": max(turn["peak_bytes"] for turn in turns),
    }


def ratios(ways: dict[str, Any]) -> dict[str, Any]:
    """Return how many times as fast ours is as the best peer of each precision: the median of the rounds' ratios."""
    best_of_ours = max((w for w in ways.values() if w["side"] == "ours"), key=lambda w: w["tokens_per_s"])
    out = {}
    for precision in ("fp32", "bf16"):
        peers = [w for w in ways.values() if w["side"] == "peer" and w["precision"] == precision]
        if peers:
            peer = max(peers, key=lambda w: w["tokens_per_s"])
            pairs = zip(best_of_ours["tokens_per_s_by_round"], peer["tokens_per_s_by_round"])
            by_round = [ours / theirs for ours, theirs in pairs]
            names = {"ours": name(best_of_ours), "peer": name(peer)}
            out[precision] = {**names, "times": statistics.median(by_round), "by_round": by_round}
    return out


def name(way: dict[str, Any]) -> str:
    """Return the name of a way of the results."""
    return str(Way(way["side"], way["precision"], way["compiled"]))


def markdown(results: dict[str, Any]) -> str:
    """Return the results as tables."""
    from machine import phrase

    head = "| shape | way | tokens/s | ms a step | GFLOP/s | of the peak | peak memory, GiB | compiling, s |"
    lines = [head, "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    times = ["| shape | ours | the best peer | times as fast |", "| --- | --- | --- | ---: |"]
    peaks = []
    for shape, found in results["shapes"].items():
        for way_name, way in found["ways"].items():
            compiling = "-" if way["compile_s"] is None else f"{way['compile_s']:.0f}"
            lines.append(
                f"| {shape}, {found['batch']} | {way_name} | {way['tokens_per_s']:,.0f} | {way['step_s'] * 1e3:,.0f} | "
                f"{way['flops'] / 1e9:,.0f} | {way['share_of_peak']:.0%} | {way['peak_bytes'] / 2**30:.2f} | {compiling} |"
            )
        for ratio in found["ratios"].values():
            times.append(f"| {shape} | {ratio['ours']} | {ratio['peer']} | {ratio['times']:.2f} |")
        for precision, peak in found["peak"].items():
            sizes = " x ".join(map(str, peak["sizes"]))
            peaks.append(f"{shape}, {precision}: {peak['flops'] / 1e9:,.0f} GFLOP/s at {sizes}")
    notes = [f"- on {phrase(results['machine'])}", f"- peak: {'; '.join(peaks)}"]
    notes += [f"- {note}" for note in results["notes"]]
    return "\n".join([*lines, "", *times, "", *notes]) + "\n"


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", help=f"presets; by default {', '.join(ON_CPU)}; on CUDA {', '.join(ON_CUDA)}"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help=f"of each way, at least {MIN_ROUNDS}; fewer of a slow shape"
    )
    parser.add_argument(
        "--minutes", type=float, default=6, help="for all shapes; past it each has its least rounds only"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder that the results are written to")
    flags = parser.parse_args()
    from kindling.errors import did_you_mean
    from presets import PRESETS

    for shape in flags.shapes or ():
        if shape not in PRESETS:
            parser.error(f"--shapes must name presets, but {shape!r} is none; {did_you_mean(shape, PRESETS)}")
    if flags.rounds < MIN_ROUNDS or flags.minutes <= 0:
        parser.error(f"--rounds must be at least {MIN_ROUNDS} and --minutes above 0")
    return flags


def main() -> None:
    flags = parse()
    import torch
    from machine import Watch

    from kindling.files import write_atomic, write_json

    kind, watch = "cuda" if torch.cuda.is_available() else "cpu", Watch()
    shapes = flags.shapes or (ON_CUDA if kind == "cuda" else ON_CPU)
    ways, began = ways_of(kind), time.perf_counter()
    notes = []
    if not any(way.precision == "bf16" for way in ways):
        notes.append("bfloat16 is not measured: this machine has no instructions for it")
    if not any(way.compiled for way in ways):
        notes.append("nothing is compiled: this machine has no compiler that torch could use")
    results: dict[str, Any] = {"device": kind, "notes": notes, "shapes": {}}
    for number, shape in enumerate(shapes):
        left_s = began + 60 * flags.minutes - time.perf_counter()
        results["shapes"][shape] = measure(shape, ways, flags.rounds, left_s / (len(shapes) - number))
    results["machine"] = watch.describe()
    results["seconds"] = time.perf_counter() - began
    flags.results.mkdir(parents=True, exist_ok=True)
    table = markdown(results)
    write_json(flags.results / "train_throughput.json", results)
    write_atomic(flags.results / "train_throughput.md", table)
    print(f"\n{table}\nwritten to {flags.results / 'train_throughput.json'}")


if __name__ == "__main__":
    from kindling.cli import run_script

    run_script(main)

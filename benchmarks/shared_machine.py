"""Measure what a training loses beside other work, for several limits on how long OpenMP's threads spin.

    python benchmarks/shared_machine.py                         # 10 minutes on two cores; see that nothing else runs
    python benchmarks/shared_machine.py --spin-counts 1000 3000
    python benchmarks/shared_machine.py --toy                   # whether it works; its figures mean nothing

Each training is `trainer.Trainer` with the config of `demo` on random tokens, a process of its own (throughput_worker.py). It
runs alone, beside a second one with the same limit, and beside one busy loop for each core: uncompiled and compiled, in
float32 and, where the processor multiplies it, bfloat16. The limits take turns in every round, in alternating order. `as
before` leaves the spinning as it is by default; `passive` is OMP_WAIT_POLICY=passive; a number is GOMP_SPINCOUNT.

Figures are medians of rounds. `alone` is compared with `as before` in the same round; the others with the same training alone
in the same round, and of two trainings the slower one counts. Writes `benchmarks/results/local/shared_machine.json`, and the
same as Markdown.

Limit: the processes of a way are held at a time, two for each limit, about 0.7 GB each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from child import Child, ChildError
from machine import RESULTS
from throughput_worker import Way

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

WORKER = ROOT / "benchmarks" / "throughput_worker.py"
SHAPE = "demo"
BEFORE, PASSIVE = "as before", "passive"
ALONE, TWO, LOOPS = "alone", "two at once", "busy loops"
MIN_ROUNDS, TURN_S, SETTLE_S = 2, 1.5, 0.1

Turn = Callable[[], float]
"""Trains for a moment, and returns tokens a second."""


def environment_of(limit: str) -> dict[str, str]:
    """Return the variables that set a limit. For `as before`, one of openmp.OWN_CHOICES, at its default, keeps ours away."""
    from kindling.openmp import OWN_CHOICES

    kept = {name: value for name, value in os.environ.items() if name not in OWN_CHOICES}
    if limit == BEFORE:
        return kept | {"KMP_LIBRARY": "throughput"}
    return kept | ({"OMP_WAIT_POLICY": "passive"} if limit == PASSIVE else {"GOMP_SPINCOUNT": limit})


class Training:
    """A process that trains when it is its turn."""

    def __init__(self, limit: str, way: Way, folder: Path, number: int):
        """Start it and wait until it is ready; exits with its last words if it cannot."""
        environment = {**environment_of(limit), "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
        command = [sys.executable, str(WORKER), json.dumps([SHAPE, *way])]
        self.child = Child(command, folder / f"log-{limit}-{number}.txt", environment)
        self.what = f"{way} with {limit}"
        self._answer(self.child.answer)

    def _answer(self, ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return ask()
        except ChildError as e:
            sys.exit(f"{self.what} must train, but {e}")

    def turn(self, seconds: float) -> float:
        """Train for about so long, and return tokens a second."""
        found = self._answer(lambda: self.child.ask(seconds))
        return found["tokens"] / found["seconds"]


@contextlib.contextmanager
def busy_loops(n: int) -> Iterator[None]:
    """Keep `n` cores busy meanwhile."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    time.sleep(SETTLE_S)
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def round_of(turns: tuple[Turn, Turn], n_loops: int) -> dict[str, float]:
    """Return the tokens a second of one training in each situation; beside the other one, those of the slower."""
    found = {ALONE: turns[0]()}
    with ThreadPoolExecutor(2) as pool:
        found[TWO] = min(pool.map(lambda turn: turn(), turns))
    with busy_loops(n_loops):
        found[LOOPS] = turns[0]()
    return found


def measure(way: Way, limits: list[str], rounds: int, turn_s: float, limit_s: float) -> dict[str, Any]:
    """Measure one way in so many rounds, or in fewer, but MIN_ROUNDS at least, once the seconds are over."""
    began, by_limit = time.perf_counter(), {limit: [] for limit in limits}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        pairs: dict[str, tuple[Turn, Turn]] = {}
        for limit in limits:
            both = [Training(limit, way, Path(name), number) for number in range(2)]
            for training in both:
                stack.callback(training.child.close)
            pairs[limit] = tuple(lambda t=training: t.turn(turn_s) for training in both)
        print(f"{way}: {2 * len(limits)} trainings are ready after {time.perf_counter() - began:.0f} s", flush=True)
        done, round_s = 0, 0.0
        while done < min(rounds, MIN_ROUNDS) or (done < rounds and time.perf_counter() - began + round_s < limit_s):
            started = time.perf_counter()
            for limit in limits if done % 2 == 0 else reversed(limits):
                by_limit[limit].append(round_of(pairs[limit], os.cpu_count() or 1))
            done, round_s = done + 1, time.perf_counter() - started
            print(f"{way}, round {done}: {round_s:.0f} s", flush=True)
    return {limit: figures(found, by_limit[BEFORE]) for limit, found in by_limit.items()}


def figures(rounds: list[dict[str, float]], before: list[dict[str, float]]) -> dict[str, Any]:
    """Return the medians of one limit's rounds, beside those of `as before`."""
    return {
        "tokens_per_s": {name: statistics.median(found[name] for found in rounds) for name in (ALONE, TWO, LOOPS)},
        "alone_times_before": statistics.median(a[ALONE] / b[ALONE] for a, b in zip(rounds, before, strict=True)),
        "two_share": statistics.median(found[TWO] / found[ALONE] for found in rounds),
        "loops_share": statistics.median(found[LOOPS] / found[ALONE] for found in rounds),
        "rounds": rounds,
    }


def ways_of(toy: bool) -> list[Way]:
    """Return the ways to train: in each precision that the processor has, uncompiled and compiled."""
    from kindling import device

    if toy:
        return [Way("ours", "fp32", False)]
    precisions = ["fp32", *(["bf16"] if device.has_bf16("cpu") else [])]
    compiled = [False, *([True] if device.has_compiler("cpu") else [])]
    return [Way("ours", precision, how) for precision in precisions for how in compiled]


def markdown(results: dict[str, Any]) -> str:
    """Return the results as a table."""
    from machine import phrase

    lines = [
        "| training | spinning | alone, tokens/s | alone, times as before | two at once, of alone | busy loops, of alone |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for way, limits in results["ways"].items():
        for limit, found in limits.items():
            name = f"{limit} (Kindling's)" if limit == results["own"] else limit
            lines.append(
                f"| {way.removeprefix('ours, ')} | {name} | {found['tokens_per_s'][ALONE]:,.0f} | "
                f"{found['alone_times_before']:.2f} | {found['two_share']:.0%} | {found['loops_share']:.0%} |"
            )
    return "\n".join([*lines, "", f"- on {phrase(results['machine'])}", *(f"- {n}" for n in results["notes"])]) + "\n"


def parse() -> argparse.Namespace:
    """Return the command line."""
    from kindling.openmp import SPIN_COUNT

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    counts = sorted({100, 1000, 3000, 10_000, SPIN_COUNT})
    parser.add_argument("--spin-counts", nargs="*", type=int, default=counts, help="values of GOMP_SPINCOUNT")
    parser.add_argument("--rounds", type=int, default=5, help="of each way at most")
    parser.add_argument(
        "--minutes", type=float, default=10, help="for everything; past it each way has two rounds only"
    )
    parser.add_argument("--toy", action="store_true", help="one way, two limits, one short round")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder that the results are written to")
    flags = parser.parse_args()
    if flags.rounds < 1 or flags.minutes <= 0 or any(n < 0 for n in flags.spin_counts):
        parser.error("--rounds must be at least 1, --minutes above 0, and no value of --spin-counts below 0")
    return flags


def main() -> None:
    flags = parse()
    from machine import Watch

    from kindling.files import write_atomic, write_json
    from kindling.openmp import SPIN_COUNT

    watch, began, ways = Watch(), time.perf_counter(), ways_of(flags.toy)
    limits = [
        BEFORE,
        *([] if flags.toy else [PASSIVE]),
        *(map(str, flags.spin_counts[:1] if flags.toy else flags.spin_counts)),
    ]
    rounds, turn_s = (1, 0.01) if flags.toy else (flags.rounds, TURN_S)
    results: dict[str, Any] = {"own": str(SPIN_COUNT), "notes": [], "ways": {}}
    if not any(way.precision == "bf16" for way in ways):
        results["notes"].append("bfloat16 is not measured: this machine has no instructions for it")
    for number, way in enumerate(ways):
        left_s = began + 60 * flags.minutes - time.perf_counter()
        results["ways"][str(way)] = measure(way, limits, rounds, turn_s, left_s / (len(ways) - number))
    results |= {"machine": watch.describe(), "seconds": time.perf_counter() - began}
    table = markdown(results)
    flags.results.mkdir(parents=True, exist_ok=True)
    write_json(flags.results / "shared_machine.json", results)
    write_atomic(flags.results / "shared_machine.md", table)
    print(f"\n{table}\nwritten to {flags.results / 'shared_machine.json'}")


if __name__ == "__main__":
    from kindling.cli import run_script

    run_script(main)

"""Measure what a portable shape costs: presets beside each other at equal time, over several seeds.

    python benchmarks/portability.py                    # about 40 minutes; see that nothing else runs in the first 5
    python benchmarks/portability.py --minutes 0.1 --seeds 1 2 --results /tmp/try

First the presets take turns of a part of the time (compiling begins with an empty cache), which says how many steps of each
fit the time. Then each preset trains so many steps with each seed, its whole schedule in them, on the same shards and so with
the same tokenizer: those of the first preset. So the trainings may run beside other work: only the first part is by the clock.
Each training is a process of its own. Bits per byte are of whole splits. A seed draws the weights and the order of the data.
Writes `portability.json` and `.md` into `benchmarks/results/local/`, after each training.

Limits: the interval is Student's t over the seeds, so of three it is wide; it says nothing about other data.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from loss_worker import Spec
from machine import RESULTS
from time_to_loss import train

PRESETS = ("modern-5m", "portable-5m")
SPLITS = ("val", "test")
ROUNDS, PART = 3, 0.15  # in each round each preset trains for this part of the time
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, by degrees of freedom from 1


def fitting_steps(runs: list[dict[str, Any]], seconds: float) -> int:
    """Return how many steps fit the time, compiling counted, by the medians of short runs."""
    compile_s = statistics.median(run["compile_s"] for run in runs)
    step_s = statistics.median((run["seconds"] - run["compile_s"]) / run["steps"] for run in runs)
    return max(1, int((seconds - compile_s) / step_s))


def mean_and_half_width(values: list[float]) -> tuple[float, float | None]:
    """Return the mean and half of its 95% interval, None of a single value."""
    if len(values) < 2:
        return values[0], None
    degrees = len(values) - 1
    t = T_95[degrees - 1] if degrees <= len(T_95) else 1.96
    return statistics.mean(values), t * statistics.stdev(values) / len(values) ** 0.5


def prices(found: dict[str, dict[str, dict[str, Any]]], preset: str, split: str) -> list[float]:
    """Return how much more bits per byte a preset has than the first one, with each seed that both were trained with."""
    first = next(iter(found.values()))
    return [row[split] - first[seed][split] for seed, row in found[preset].items() if seed in first]


def markdown(results: dict[str, Any]) -> str:
    """Return the table, with the price of each preset beside the first one."""
    from machine import phrase

    found = results["found"]
    lines = ["| preset | parameters | steps | tokens | validation | test | beside the first, test |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for number, (preset, by_seed) in enumerate(found.items()):
        rows = list(by_seed.values())
        steps, tokens = (statistics.mean(row[key] for row in rows) for key in ("steps", "tokens"))
        bits = [told(mean_and_half_width([row[split] for row in rows])) for split in SPLITS]
        price = told(mean_and_half_width(prices(found, preset, "test")), "+") if number else ""
        lines.append(
            f"| `{preset}` | {rows[0]['parameters']:,} | {steps:,.0f} | {tokens / 1e6:.2f}M | {' | '.join(bits)} | {price} |"
        )
    row = next(iter(next(iter(found.values())).values()))
    way = f"{row['precision']}, {'compiled' if row['compiled'] else 'eager'}"
    notes = [
        f"bits per byte of whole splits, after the steps that fit {results['minutes']:g} minutes of a quiet machine ({way})",
        f"means with 95% intervals of seeds {', '.join(map(str, results['seeds']))}",
        "the last column is the mean difference at the same seed",
        f"on {phrase(results['machine'])}; data {results['data']}",
    ]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def told(figure: tuple[float, float | None], sign: str = "") -> str:
    """Return a mean with its interval as text."""
    mean, half = figure
    return f"{mean:{sign}.4f}" + ("" if half is None else f" ± {half:.4f}")


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=PRESETS, help="the others are told beside the first")
    parser.add_argument("--seeds", type=int, nargs="+", default=(1, 2, 3), help="of each preset's trainings")
    parser.add_argument("--minutes", type=float, default=5.0, help="that each training may take")
    parser.add_argument("--data", type=Path, help="a folder of shards; else the first preset's are prepared")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to write")
    flags = parser.parse_args()
    if flags.minutes <= 0 or len(set(flags.seeds)) < len(flags.seeds) or len(set(flags.presets)) < len(flags.presets):
        parser.error("--minutes must be above 0, and each of --seeds and --presets named once")
    return flags


def main() -> None:
    """Train every preset with every seed, and write the table after each training."""
    flags = parse()
    from machine import Watch

    from kindling.data.build import prepare
    from kindling.files import write_atomic, write_json
    from kindling.training.compilation import COMPILE_MINUTES
    from presets import preset

    configs = [preset(name) for name in flags.presets]  # an unknown one is said before the data are built
    flags.results.mkdir(parents=True, exist_ok=True)
    given, target, watch = flags.data and flags.data.resolve(), flags.results.resolve(), Watch()
    found: dict[str, dict[str, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as temporary, contextlib.chdir(temporary):
        data = given or prepare(configs[0]).resolve()
        compile = "on" if flags.minutes >= COMPILE_MINUTES else "off"  # as main.py would in the whole time
        base = Spec("ours", str(data), flags.minutes, [1.0], compile=compile)
        short = replace(base, minutes=PART * flags.minutes)
        rounds = [
            [train(replace(short, preset=name), Path(temporary)) for name in flags.presets] for _ in range(ROUNDS)
        ]
        fit = {name: fitting_steps(list(runs), 60 * flags.minutes) for name, runs in zip(flags.presets, zip(*rounds))}
        print(f"steps that fit {flags.minutes:g} minutes: {fit}", flush=True)
        for seed in flags.seeds:
            for name in flags.presets:
                spec = replace(base, final=True, preset=name, seed=seed, steps=fit[name])
                found.setdefault(name, {})[str(seed)] = train(spec, Path(temporary))
                results = {
                    "machine": watch.describe(), "data": data.name, "minutes": flags.minutes, "seeds": flags.seeds,
                    "short_runs": {name: [row[i] for row in rounds] for i, name in enumerate(flags.presets)}, "found": found,
                }  # fmt: skip
                write_json(target / "portability.json", results)
                write_atomic(target / "portability.md", markdown(results))
    print(f"\n{markdown(results)}\nwritten to {target}: portability.json, portability.md")


if __name__ == "__main__":
    from kindling.cli import run_script

    run_script(main)

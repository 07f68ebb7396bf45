"""Measure what a portable shape costs: presets beside each other at equal time, over several seeds.

    python benchmarks/portability.py                    # about 40 minutes; see that nothing else runs in the first 5
    python benchmarks/portability.py --minutes 0.1 --seeds 1 2 --results /tmp/try

Each preset trains with each seed, on the same shards and so with the same tokenizer: those of the first preset. How many steps
fit the time is measured first (see paired.py): the trainings after it may run beside other work. Bits per byte are of whole
splits.
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
from paired import as_main_compiles, differences, fitting_steps, mean_and_half_width, short_runs, told, trained

PRESETS = ("modern-5m", "portable-5m")
SPLITS = ("val", "test")


def markdown(results: dict[str, Any]) -> str:
    """Return the table, with the price of each preset beside the first one."""
    from machine import phrase

    found = results["found"]
    lines = ["| preset | parameters | steps | tokens | validation | test | beside the first, validation | test |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for number, (preset, by_seed) in enumerate(found.items()):
        rows = list(by_seed.values())
        steps, tokens = (statistics.mean(row[key] for row in rows) for key in ("steps", "tokens"))
        bits = [told(mean_and_half_width([row[split] for row in rows])) for split in SPLITS]
        prices = [
            told(mean_and_half_width(differences(found, preset, split)), "+") if number else "" for split in SPLITS
        ]
        lines.append(
            f"| `{preset}` | {rows[0]['parameters']:,} | {steps:,.0f} | {tokens / 1e6:.2f}M | {' | '.join([*bits, *prices])} |"
        )
    row = next(iter(next(iter(found.values())).values()))
    way = f"{row['precision']}, {'compiled' if row['compiled'] else 'eager'}"
    notes = [
        f"bits per byte of whole splits, after the steps that fit {results['minutes']:g} minutes of a quiet machine ({way})",
        f"means with 95% intervals of seeds {', '.join(map(str, results['seeds']))}",
        "the last columns are mean differences at the same seed",
        f"on {phrase(results['machine'])}; data {results['data']}",
    ]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


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
    from presets import preset

    configs = [preset(name) for name in flags.presets]  # an unknown one is said before the data are built
    flags.results.mkdir(parents=True, exist_ok=True)
    given, target, watch = flags.data and flags.data.resolve(), flags.results.resolve(), Watch()
    with tempfile.TemporaryDirectory() as temporary, contextlib.chdir(temporary):
        data, folder = given or prepare(configs[0]).resolve(), Path(temporary)
        base = Spec("ours", str(data), flags.minutes, [1.0], compile=as_main_compiles(flags.minutes))
        variants = {name: replace(base, preset=name) for name in flags.presets}
        short = short_runs(variants, folder)
        steps = {name: fitting_steps(runs, 60 * flags.minutes) for name, runs in short.items()}
        print(f"steps that fit {flags.minutes:g} minutes: {steps}", flush=True)
        for found in trained(variants, steps, flags.seeds, folder):
            results = {
                "machine": watch.describe(), "data": data.name, "minutes": flags.minutes, "seeds": flags.seeds,
                "short_runs": short, "found": found,
            }  # fmt: skip
            write_json(target / "portability.json", results)
            write_atomic(target / "portability.md", markdown(results))
    print(f"\n{markdown(results)}\nwritten to {target}: portability.json, portability.md")


if __name__ == "__main__":
    from kindling.cli import run_script

    run_script(main)

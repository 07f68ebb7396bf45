"""Try one change of a recipe: the recipe and the changed one beside each other, several seeds, and one line in the ledger lab.md.

    python benchmarks/lab.py "batch of 16" --minutes 5 --train.batch-size 16
    python benchmarks/lab.py "no pairs" --tokens 500000 --seeds 1 2 --model.bigram-rows 0 --ledger /tmp/try/lab.md

The change is given as the flags that main.py takes. With --minutes each side trains for the steps that fit the time: these are
measured first, with nothing else running (see paired.py), so what a change costs in time counts against it. With --tokens each
side reads so many, however long that takes: this is free of the clock's noise. The time of a token is told in both cases.
Bits per byte are of the whole validation split; the test split is kept for time_to_loss.py.

A change is kept if it is better by more than the noise of seeds, 0.015 bits per byte, and its whole interval is better than
nothing. The line says so. What is discarded gets a line too, so that nobody tries it again. All that was found goes into
`benchmarks/results/local/lab.json`.

Limits: Student's t over the seeds, so the interval of three is wide; one data set. Among twenty changes one may look better by
chance.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from loss_worker import Spec, configured
from machine import RESULTS
from paired import as_main_compiles, differences, fitting_steps, mean_and_half_width, short_runs, told, trained

LEDGER = Path(__file__).resolve().parent / "lab.md"
NOISE = 0.015  # bits per byte between two seeds of one recipe
SIDES = ("recipe", "changed")
HEAD = """# What was tried on the recipes

`python benchmarks/lab.py` adds a line for each change: bits per byte of the whole validation split, the mean over the seeds with
its 95% interval; the difference at the same seed; and whether it was kept. A change is kept if it is better by more than 0.015,
the noise of seeds, and its whole interval is below 0.

| day | change | flags | each side | seeds | recipe | changed | difference | time of a token | verdict | machine |
| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- | --- |
"""


def verdict(difference: tuple[float, float | None]) -> str:
    """Return what becomes of a change, by the mean of its difference and half of the interval."""
    mean, half = difference
    if mean >= -NOISE:
        return "discarded"
    if half is None:
        return "one seed: try more"
    return "kept" if mean + half < 0 else "too few seeds to tell"


def token_time(short: dict[str, list[dict[str, Any]]]) -> float:
    """Return the time of a token of the changed side over the recipe's, without compiling, by the medians of short runs."""
    recipe, changed = (
        statistics.median((run["seconds"] - run["compile_s"]) / run["tokens"] for run in short[side]) for side in SIDES
    )
    return changed / recipe


def line(results: dict[str, Any]) -> str:
    """Return the ledger's line."""
    from machine import phrase

    found = results["found"]
    bits = [told(mean_and_half_width([row["val"] for row in found[side].values()])) for side in SIDES]
    difference = mean_and_half_width(differences(found, "changed", "val"))
    tokens = statistics.mean(row["tokens"] for row in found["recipe"].values())
    size = f"{results['minutes']:g} minutes" if results["minutes"] else f"{tokens / 1e6:.2f}M tokens"
    cells = [
        results["day"], results["change"], f"`--preset {' '.join([results['preset'], *results['flags']])}`", size,
        str(len(found["changed"])), *bits, told(difference, "+"), f"{token_time(results['short_runs']):.2f}",
        verdict(difference), phrase(results["machine"]),
    ]  # fmt: skip
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Return the command line, and the flags that change the recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("change", help="in a few words, for the ledger")
    parser.add_argument("--preset", default="demo", help="the recipe")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--minutes", type=float, help="of each training on a quiet machine")
    size.add_argument("--tokens", type=int, help="of each training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--data", type=Path, help="a folder of shards; else the recipe's are prepared")
    parser.add_argument("--ledger", type=Path, default=LEDGER, help="the table to which the line is added")
    flags, changes = parser.parse_known_args(argv)
    if min(n for n in (flags.minutes, flags.tokens) if n is not None) <= 0 or len(set(flags.seeds)) < len(flags.seeds):
        parser.error("--minutes or --tokens must be above 0, and each of --seeds named once")
    if not changes:
        parser.error("the flags of a change must be given, as main.py takes them, such as --train.batch-size 16")
    return flags, changes


def main() -> None:
    """Train both sides with every seed, and add the line."""
    flags, changes = parse()
    from machine import Watch

    from kindling.data.build import prepare
    from kindling.files import write_json
    from presets import preset

    recipe = preset(flags.preset)
    ledger, watch = flags.ledger.resolve(), Watch()
    with tempfile.TemporaryDirectory() as temporary, contextlib.chdir(temporary):
        data, folder = (flags.data and flags.data.resolve()) or prepare(recipe).resolve(), Path(temporary)
        changed = configured(data, flags.preset, changes)  # what is wrong with the flags is said before a training
        minutes = flags.minutes or 1.0
        base = Spec(
            "ours", str(data), minutes, [1.0], preset=flags.preset, compile=as_main_compiles(flags.minutes or 0)
        )
        variants = {"recipe": base, "changed": replace(base, flags=changes)}
        short = short_runs(variants, folder)
        if flags.minutes:
            steps = {side: fitting_steps(runs, 60 * minutes) for side, runs in short.items()}
        else:
            configs = zip(SIDES, (configured(data, flags.preset), changed))
            steps = {
                side: max(1, flags.tokens // (cfg.train.batch_size * cfg.model.block_size)) for side, cfg in configs
            }
        *_, found = trained(variants, steps, flags.seeds, folder)
    results = {
        "day": time.strftime("%Y-%m-%d"), "change": flags.change, "preset": flags.preset, "flags": changes,
        "minutes": flags.minutes, "data": data.name, "machine": watch.describe(), "short_runs": short, "found": found,
    }  # fmt: skip
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_json(RESULTS / "lab.json", results)
    print(add(ledger, line(results)))


def add(ledger: Path, row: str) -> str:
    """Add a line to the ledger, which is begun if it is not there, and return it."""
    from kindling.files import write_atomic

    ledger.parent.mkdir(parents=True, exist_ok=True)
    before = ledger.read_text(encoding="utf-8") if ledger.exists() else HEAD
    write_atomic(ledger, f"{before.rstrip()}\n{row}\n")
    return row


if __name__ == "__main__":
    from kindling.cli import run_script

    run_script(main)

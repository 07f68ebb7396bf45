"""Train variants beside each other with several seeds, and tell their differences with intervals; lab.py and portability.py do.

How many steps of each variant fit the time is measured first, the variants in turns, with nothing else running. Compiling
counts, and begins with an empty cache. Then each trains so many steps with each seed, its whole schedule in them. So only the
first part is by the clock, and the trainings may run beside other work. A seed draws the weights and the order of the data. Each
training is a process of its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from loss_worker import Spec
from time_to_loss import train

ROUNDS, PART = 3, 0.15  # in each round each variant trains for this part of the time
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, by degrees of freedom from 1
Found = dict[str, dict[str, dict[str, Any]]]  # of each variant, of each seed: what loss_worker.py found


def as_main_compiles(minutes: float) -> str:
    """Return for `Spec.compile` whether main.py would compile in that time: short runs tell of long ones only if both do."""
    from kindling.training.compilation import COMPILE_MINUTES

    return "on" if minutes >= COMPILE_MINUTES else "off"


def short_runs(variants: dict[str, Spec], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Train all variants in turns for a part of their time, and return what they found."""
    rounds = [
        [train(replace(spec, minutes=PART * spec.minutes), folder) for spec in variants.values()] for _ in range(ROUNDS)
    ]
    return {name: [one[i] for one in rounds] for i, name in enumerate(variants)}


def fitting_steps(runs: list[dict[str, Any]], seconds: float) -> int:
    """Return how many steps fit the time, compiling counted, by the medians of short runs."""
    compile_s = statistics.median(run["compile_s"] for run in runs)
    step_s = statistics.median((run["seconds"] - run["compile_s"]) / run["steps"] for run in runs)
    return max(1, int((seconds - compile_s) / step_s))


def trained(variants: dict[str, Spec], steps: dict[str, int], seeds: list[int], folder: Path) -> Iterator[Found]:
    """Train all variants for their steps, seed by seed; yield what was found so far after each training."""
    found: Found = {}
    for seed in seeds:
        for name, spec in variants.items():
            whole = replace(spec, final=True, seed=seed, steps=steps[name])
            found.setdefault(name, {})[str(seed)] = train(whole, folder)
            yield found


def differences(found: Found, name: str, split: str) -> list[float]:
    """Return how many more bits per byte a variant has than the first one, with each seed that both were trained with."""
    first = next(iter(found.values()))
    return [row[split] - first[seed][split] for seed, row in found[name].items() if seed in first]


def mean_and_half_width(values: list[float]) -> tuple[float, float | None]:
    """Return the mean and half of its 95% interval, None of a single value."""
    if len(values) < 2:
        return values[0], None
    degrees = len(values) - 1
    t = T_95[degrees - 1] if degrees <= len(T_95) else 1.96
    return statistics.mean(values), t * statistics.stdev(values) / len(values) ** 0.5


def told(figure: tuple[float, float | None], sign: str = "") -> str:
    """Return a mean with its interval as text."""
    mean, half = figure
    return f"{mean:{sign}.4f}" + ("" if half is None else f" ± {half:.4f}")

"""What is measured after each stage of a training, and what the stage changed: tables and a heat map.

    matrix(runs, MEASURES, claimant, file)
    heat_map(runs, MEASURES, [("after 1",), ("after 2",)], title, file)

A measure is a figure of eval.json. A difference is paired, by document or by problem, as in evaluate.py --compare; that of a
task of the harness is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from kindling.evaluation.compare_runs import paired_bits, shown_difference, task_difference
from kindling.evaluation.infill_report import pass_difference
from kindling.evaluation.intervals import Difference
from kindling.evaluation.report import gold_cell, harness_cell, pass_cell, text_cell
from kindling.plots.figures import png
from kindling.plots.html_report import Picture
from kindling.plots.stage_figures import MeasureRow, stage_figure
from kindling.studies.run_results import MISSING, Run


@dataclass(frozen=True)
class Measure:
    """A figure of eval.json, and what the project claims of it."""

    label: str
    unit: str
    part: str
    """Of eval.json: texts, gold, functional or harness."""
    name: str
    """The file of a text, or the benchmark or task."""
    k: str = ""
    """Of pass@k."""
    lower: bool = True
    """Whether less is better."""
    relative: bool = True
    """Whether a change is seen relative to the value before; shares are not."""
    claims: Mapping[int, str] = field(default_factory=dict)
    """The project's figure after a stage, from 1."""

    def figures(self, run: Run) -> dict[str, Any]:
        """Return the part of eval.json; empty if it is not there."""
        return run.figures(self.part, self.name)

    def value(self, run: Run) -> float | None:
        """Return the figure, or None."""
        found = self.figures(run)
        if self.part == "functional":
            found, key = found.get("pass_at", {}), self.k
        else:
            found = found.get("all", {}) if self.part == "texts" else found
            key = "value" if self.part == "harness" else "bits_per_byte"
        value = found.get(key)
        return value if isinstance(value, (int, float)) and math.isfinite(value) else None

    def cell(self, run: Run) -> str:
        """Return the figure with its interval."""
        found = self.figures(run)
        if self.value(run) is None:
            return MISSING
        if self.part == "functional":
            return pass_cell(found, self.k)
        return {"texts": text_cell, "gold": gold_cell, "harness": harness_cell}[self.part](found)

    def short(self, run: Run) -> str:
        """Return the figure without its interval, for a picture."""
        value = self.value(run)
        return MISSING if value is None else f"{value:.1%}" if self.part == "functional" else f"{value:,.3f}"

    def difference(self, run: Run, before: Run) -> Difference | None:
        """Return the difference to the stage before, with its interval; None if it cannot be taken."""
        own, first = self.figures(run), self.figures(before)
        if None in (self.value(run), self.value(before)):
            return None
        if self.part == "functional":
            return pass_difference(own, first, int(self.k))
        return task_difference(own, first) if self.part == "harness" else paired_bits(own, first)

    def form(self, value: float) -> str:
        """Return a difference as text: of pass@k in percentage points."""
        return f"{100 * value:+.1f}" if self.part == "functional" else f"{value:+.3f}"

    def change(self, run: Run, before: Run) -> str:
        """Return the difference to the stage before, with its interval and a * if this excludes 0."""
        return shown_difference(self.difference(run, before), self.form)

    def gain(self, run: Run, before: Run) -> float:
        """Return by how much a stage made it better: relative to the value before, or of shares the difference."""
        own, first = self.value(run), self.value(before)
        if own is None or first is None or (self.relative and not first):
            return math.nan
        gain = (first - own) if self.lower else (own - first)
        return gain / first if self.relative else gain


def matrix(runs: list[Run], measures: list[Measure], claimant: str, file: str) -> list[list[str]]:
    """Return a row for each measure that a run has, with a figure for each run, and a row for each claim."""
    rows = []
    for measure in measures:
        cells = [measure.cell(run) for run in runs]
        if any(cell != MISSING for cell in cells):
            rows.append([measure.label, *cells, file])
        if measure.claims:
            said = [measure.claims.get(number, MISSING) for number in range(1, len(runs) + 1)]
            rows.append([f"{claimant}: {measure.label}", *said, "its page"])
    return rows


def differences(runs: list[Run], measures: list[Measure], file: str) -> list[list[str]]:
    """Return a row for each measure that two runs in a row have, with the difference of each run to the one before."""
    rows = []
    for measure in measures:
        cells = [measure.change(run, before) for before, run in pairwise(runs)]
        if any(cell != MISSING for cell in cells):
            rows.append([measure.label, *cells, file])
    return rows


def absent(runs: list[Run], measures: list[Measure]) -> list[str]:
    """Return the labels of the measures that no run has."""
    return [measure.label for measure in measures if all(measure.value(run) is None for run in runs)]


def heat_map(
    runs: list[Run], measures: list[Measure], stages: Sequence[tuple[str, ...]], title: str, file: str
) -> Picture | None:
    """Return the heat map of what each stage brought and took; None without a measure."""
    rows, told = [], []
    for measure in measures:
        if all(measure.value(run) is None for run in runs):
            continue
        values, changes, gains = [measure.short(run) for run in runs], [""], [math.nan]
        for before, run in pairwise(runs):
            known = measure.difference(run, before)
            gains.append(measure.gain(run, before))
            said = (
                "" if math.isnan(gains[-1]) else "gained" if gains[-1] > 0 else "lost" if gains[-1] < 0 else "no change"
            )
            star = " *" if known is not None and known.significant else ""
            changes.append("" if known is None else f"{measure.form(known.difference)} {said}{star}")
        name = f"{measure.label}, {measure.unit}"
        rows.append(MeasureRow(name, values, changes, gains))
        told.append(f"{name}: {', '.join(values)}")
    if not rows:
        return None
    caption = (
        f"What each stage brought and took, by measure, from {file}. Bits per byte and perplexity: less is better."
    )
    columns = ", ".join(" ".join(stage) for stage in stages)
    alt = f"A grid, a row for each measure and a column for each stage. Columns: {columns}. Values: {'; '.join(told)}."
    return Picture(png(stage_figure(rows, stages, title)), caption, alt)

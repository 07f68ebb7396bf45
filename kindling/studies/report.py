"""What a study leaves: table.md, report.html and plots, from the files of its runs.

write_report(study, folder, steps, facts)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import SourceConfig
from kindling.errors import KindlingError
from kindling.files import write_atomic
from kindling.plots.comparable import compared, notes_on, on_any_part
from kindling.plots.figures import Compared, compare_curves, png
from kindling.plots.html_report import Picture, Sample, Samples, page
from kindling.plots.inspection import curves_of
from kindling.plots.run_report import curves_in_words, rows_of
from kindling.runs.metrics import SAMPLES
from kindling.studies.inputs import Inputs
from kindling.studies.plan import MakePlan, total
from kindling.studies.run_results import MISSING, Run
from kindling.studies.steps import Records, Step, StudyError, duration
from kindling.tables import Section, as_markdown

PLOTS, TABLE, REPORT = "plots", "table.md", "report.html"
SHOWN = 8  # samples of each run
CHARS = 600


def no_pictures(folder: Path) -> list[Picture]:
    """Return no pictures."""
    return []


def no_texts(folder: Path) -> list[Samples]:
    """Return no texts."""
    return []


def no_stand_ins(scale: float, inputs: Inputs) -> list[SourceConfig]:
    """Return no sources."""
    return []


def nothing(scale: float, inputs: Inputs) -> None:
    """Write nothing."""


@dataclass(frozen=True)
class Study:
    """A study: how it is planned, and what is read from its runs."""

    name: str
    title: str
    plan: MakePlan
    sources: Callable[[float, Inputs], str]
    """Returns the line on the data."""
    sections: Callable[[Path], list[Section]]
    """Returns the tables of a study's folder."""
    runs_by_plot: Callable[[Path], dict[str, list[str]]]
    """Returns the runs whose curves are drawn together, by the name of the plot."""
    stand_ins: Callable[[float, Inputs], list[SourceConfig]] = no_stand_ins
    """Returns the sources whose files are written before the first step."""
    pictures: Callable[[Path], list[Picture]] = no_pictures
    texts: Callable[[Path], list[Samples]] = no_texts
    """Returns what the models wrote, beside the samples of their training."""
    prepare: Callable[[float, Inputs], None] = nothing
    """Writes what else must be there before the first step."""

    def write_inputs(self, scale: float, inputs: Inputs) -> None:
        """Write all that must be there before the first step."""
        for source in self.stand_ins(scale, inputs):
            inputs.write(source)
        self.prepare(scale, inputs)


def write_report(study: Study, folder: Path, steps: list[Step], facts: list[tuple[str, str]]) -> list[Path]:
    """Write the tables, the plots and the page; return their paths. Raises StudyError if the disk is full."""
    tables = [*study.sections(folder), times_section(steps, folder)]
    pictures = [*study.pictures(folder), *curves(study, folder)]  # a study's own are what it is for
    title = f"Study {study.name}: {study.title}"
    commands = "\n".join(step.command for step in steps)
    texts = [*study.texts(folder), *samples(folder, steps)]
    html = page(title, facts, tables, pictures, texts, commands, "Commands")
    try:
        (folder / PLOTS).mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(pictures):
            (folder / PLOTS / f"{number}.png").write_bytes(picture.png)
        write_atomic(folder / TABLE, as_markdown(title, [f"{name}: {value}" for name, value in facts], tables))
        write_atomic(folder / REPORT, html)
    except OSError as e:
        raise StudyError(f"{folder} must be writable, but is not ({e.strerror}); free some space") from None
    return [folder / TABLE, folder / REPORT, folder / PLOTS]


def curves(study: Study, folder: Path) -> list[Picture]:
    """Return a picture of the curves of each group of runs that have metrics."""
    pictures = []
    for name, runs in study.runs_by_plot(folder).items():
        drawn = [run for run in (Run(folder, run) for run in runs) if run.metrics]
        if not drawn:
            continue
        found, known = [], []
        for run in drawn:
            try:
                known.append(compared(run.directory, run.name, run.metrics))
                found.append(on_any_part(known[-1]))
            except KindlingError:  # its data are gone: it is drawn alone
                found.append(Compared(run.name, curves_of(run.metrics), *[run.name] * 3))
        figure = compare_curves(found, notes_on(known), fewest=3)
        alt = " ".join(f"{run.name}: {curves_in_words(run.metrics)}" for run in drawn)
        files = ", ".join(run.file("metrics.jsonl") for run in drawn)
        pictures.append(Picture(png(figure), f"Training of {name}, from {files}.", alt))
    return pictures


def times_section(steps: list[Step], folder: Path) -> Section:
    """Return how long each step took, beside the plan."""
    records = Records(folder)
    rows = []
    for step in steps:
        known = records.of.get(step.name)
        state = (
            "done"
            if records.done(step)
            else "not run"
            if known is None
            else "stopped"
            if known.code is None
            else "failed"
        )
        took = MISSING if known is None else duration(known.seconds)
        rows.append([step.name, step.script, step.about, state, duration(step.seconds), took])
    spent = sum(known.seconds for known in records.of.values())
    rows.append(["all", "", "", "", duration(total(steps)), duration(spent)])
    return Section("Steps", ["step", "script", "size", "", "planned", "took"], rows, ["from steps.json"], names=4)


def samples(folder: Path, steps: list[Step]) -> list[Samples]:
    """Return what each run wrote during training, where it was asked to."""
    found = []
    for step in steps:
        run = Run(folder, step.name)
        rows = list(rows_of(run.path / SAMPLES))
        if step.script != "main.py" or not rows:
            continue
        chosen = evenly(rows, SHOWN)
        shown = [
            Sample(f"step {row.get('step')}", str(row.get("prompt", "")), str(row.get("text", ""))[:CHARS])
            for row in chosen
        ]
        note = f"{len(chosen)} of {len(rows)}, from {run.file(SAMPLES)}"
        found.append(Samples(f"What {step.name} wrote during training", note, shown))
    return found


def evenly(rows: list[Any], most: int) -> list[Any]:
    """Return at most `most` of the rows, evenly spaced, with the first and the last."""
    if len(rows) <= most:
        return rows
    return [rows[round(n * (len(rows) - 1) / (most - 1))] for n in range(most)]

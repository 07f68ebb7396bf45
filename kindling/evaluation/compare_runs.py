"""Compares two or more evaluated runs side by side, and marks the significant differences.

    text, document = compare([Path("runs/demo"), Path("runs/other")])

Reads eval.json and losses.jsonl of each run. Each run is compared with the first, in pairs: bits per byte by document, pass@k
by problem. So a difference is seen although some documents are hard for both. Tasks of the harness are compared unpaired.
Results on other documents or questions are shown but not compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kindling.evaluation.infill_report import pass_difference
from kindling.evaluation.intervals import (
    FEWEST,
    Difference,
    LossLines,
    Z,
    bits_interval,
    count,
    number,
    paired_difference,
    paired_ratio_difference,
)
from kindling.evaluation.report import READING, Results, gold_cell, harness_cell, pass_cell, rate_cell, text_cell
from kindling.evaluation.results_file import ResultsError, read_results
from kindling.public_paths import public_names
from kindling.tables import Section, as_markdown, as_text

COLUMNS = ["", "run", "value", "difference to run 1"]


@dataclass
class Evaluated:
    """The saved results of a run. Its label in the tables is `place`, which counts from 1, with the folder's name."""

    path: Path
    place: int
    results: Results
    losses: LossLines = field(default_factory=list)

    @property
    def label(self) -> str:
        return f"{self.place} {self.path.resolve().name}"

    def part(self, name: str) -> dict[str, Any]:
        """Return a part of the results; empty if it is absent or was skipped."""
        part = self.results.get(name) or {}
        return {} if "skipped" in part else part


def compare(runs: list[Path]) -> tuple[str, str]:
    """Return the runs side by side for a terminal and as a Markdown document.

    Raises ResultsError for fewer than two different runs, and for a run that was not evaluated, was evaluated by an older
    version, or has damaged results.
    """
    if len({path.resolve() for path in runs}) < max(2, len(runs)):
        given = ", ".join(map(str, runs)) or "none"
        raise ResultsError(f"a comparison must be of two or more different runs, but is of {given}; name others")
    evaluated = [Evaluated(path, number, *read_results(path)) for number, path in enumerate(runs, 1)]
    try:
        found = [
            _runs(evaluated),
            *filter(None, (part(evaluated) for part in (_bits, _texts, _gold, _syntax, _functional, _harness))),
        ]
        found.append(_explanation(found))
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        given = ", ".join(str(run.path) for run in evaluated)
        raise ResultsError(
            f"the results of {given} must be as evaluate.py writes them, but are not ({type(e).__name__}: {e}); "
            f"evaluate them again"
        ) from None
    title = f"Comparison of {len(runs)} runs on the validation split"
    return as_text([title, READING], found), as_markdown(title, [READING], found)


def _section(heading: str, runs: list[Evaluated], parts: list[dict[str, Any]]) -> Section | None:
    """Return a section without rows, with a note on the runs that lack this part; None if all runs lack it."""
    if not any(parts):
        return None
    missing = [str(run.place) for run, part in zip(runs, parts) if not part]
    notes = [f"not evaluated for this: run {', '.join(missing)}"] if missing else []
    return Section(heading, COLUMNS, notes=notes, names=2)


def _add(section: Section, runs: list[Evaluated], name: str, cells: list[str], differences: list[str]) -> None:
    """Add a line for each run that has a metric. `differences` belong to the runs after the first."""
    for run, cell, difference in zip(runs, cells, ["", *differences]):
        if cell != "-":
            section.rows.append([name, run.label, cell, difference])
            name = ""


def shown_difference(difference: Difference | None, form: Callable[[float], str]) -> str:
    """Return a difference with its interval, and a * if it is significant."""
    if difference is None or math.isnan(difference.difference):
        return "-"
    if math.isnan(difference.low):
        return form(difference.difference)
    ends = f"[{form(difference.low)}, {form(difference.high)}]"
    return f"{form(difference.difference)} {ends}{' *' if difference.significant else ''}"


def _points(value: float) -> str:
    """Return a difference of fractions in percentage points."""
    return f"{100 * value:+.1f}"


def _fraction(value: float) -> str:
    return f"{value:+.4f}"


def _runs(runs: list[Evaluated]) -> Section:
    section = Section("Runs", ["run", "parameters", "preset", "checkpoint", "precision", "Python"])
    for place, (run, name) in enumerate(zip(runs, public_names([run.path for run in runs])), 1):
        details = [str(run.results.get(key) or "-") for key in ("preset", "checkpoint", "precision", "python")]
        section.rows.append([f"{place} {name}", count(run.results.get("parameters")), *details])
    first = runs[0].results.get("settings", {})
    for run in runs[1:]:
        own = run.results.get("settings", {})
        keys = [key for key in dict.fromkeys([*first, *own]) if first.get(key) != own.get(key)]
        if keys:
            changes = ", ".join(f"{key} {own.get(key, '-')}, not {first.get(key, '-')}" for key in keys)
            section.notes.append(f"run {run.place} was evaluated with other settings than run 1: {changes}")
    return section


def _bits(runs: list[Evaluated]) -> Section | None:
    """Return bits per byte of all held-out documents and of each language."""
    parts = [run.part("language_modelling") for run in runs]
    if (section := _section("Bits per byte", runs, parts)) is None:
        return None
    pairs = [_paired_documents(runs[0], run, section.notes) for run in runs[1:]]
    languages = dict.fromkeys(language for part in parts for language in part.get("by_language", {}))
    for language in [None, *languages] if len(languages) > 1 else [None]:
        cells = []
        for run, part in zip(runs, parts):
            figures = part.get("all", {}) if language is None else part.get("by_language", {}).get(language, {})
            own = [line for line in run.losses if language in (None, line["language"])]
            cells.append(number(figures.get("bits_per_byte"), bits_interval(own)))
        differences = [shown_difference(_bits_difference(pair, language), _fraction) for pair in pairs]
        _add(section, runs, language or "all", cells, differences)
    return section


def held_out_difference(first: Evaluated, run: Evaluated) -> Difference | None:
    """Return the difference of a run's bits per byte to the first one's, on the held-out documents of both.

    None if they cannot be compared.
    """
    return _bits_difference(_paired_documents(first, run, []), None)


Pairs = list[tuple[dict[str, Any], dict[str, Any]]]  # lines of losses.jsonl, of the first run and of another


def _paired_documents(first: Evaluated, run: Evaluated, notes: list[str]) -> Pairs:
    """Return the lines of the documents that both runs have. If they cannot be compared, return none and add a note why."""
    if not (first.part("language_modelling") and run.part("language_modelling")):
        return []
    data = [r.results.get("data") for r in (first, run)]
    if None in data or data[0] != data[1]:
        notes.append(
            f"run {run.place} is of other held-out documents than run 1, not compared: {data[1]}, not {data[0]}"
        )
        return []
    lines = {line["document"]: line for line in first.losses}
    pairs = [(lines[line["document"]], line) for line in run.losses if line["document"] in lines]
    if not pairs:
        notes.append(f"run {run.place} is not compared: the losses of single documents are missing")
    elif any(a["bytes"] != b["bytes"] or None in (a["nll"], b["nll"]) for a, b in pairs):
        notes.append(f"run {run.place} is not compared: a document's bytes differ, or its loss is not finite")
        return []
    elif len(pairs) < max(len(first.losses), len(run.losses)):
        notes.append(
            f"run {run.place} is compared with run 1 on the {len(pairs):,} documents that both were evaluated on"
        )
    return pairs


def _bits_difference(pairs: Pairs, language: str | None) -> Difference | None:
    own = [(a, b) for a, b in pairs if language in (None, b["language"])]
    if not own:
        return None
    first, other = ([line["nll"] / math.log(2) for line in side] for side in zip(*own))
    return paired_ratio_difference(other, first, [b["bytes"] for _, b in own])


def _texts(runs: list[Evaluated]) -> Section | None:
    """Return bits per byte of each file that was measured with --text."""
    parts = [run.part("texts") for run in runs]
    if (section := _section("Bits per byte of texts", runs, parts)) is None:
        return None
    for name in dict.fromkeys(name for part in parts for name in part):
        texts = [part.get(name, {}) for part in parts]
        differences = [shown_difference(paired_bits(text, texts[0]), _fraction) for text in texts[1:]]
        _add(section, runs, name, [text_cell(text) for text in texts], differences)
    return section


def _gold(runs: list[Evaluated]) -> Section | None:
    """Return gold bits per byte of each benchmark and each level."""
    parts = [run.part("gold") for run in runs]
    if (section := _section("Gold bits per byte: reference solutions, given their prompts", runs, parts)) is None:
        return None
    for name in dict.fromkeys(name for part in parts for name in part):
        whole = [part.get(name, {}) for part in parts]
        groups = {name: whole} | {f"{name}, level {level}": group for level, group in _by_level(whole).items()}
        for label, benchmarks in groups.items():
            differences = [shown_difference(paired_bits(b, benchmarks[0]), _fraction) for b in benchmarks[1:]]
            _add(section, runs, label, [gold_cell(benchmark) for benchmark in benchmarks], differences)
    return section


def _by_level(benchmarks: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the groups of each level, one for each run, by the level."""
    levels = sorted({level for benchmark in benchmarks for level in benchmark.get("by_level", {})})
    return {level: [b.get("by_level", {}).get(level, {}) for b in benchmarks] for level in levels}


def paired_bits(benchmark: dict[str, Any], first: dict[str, Any]) -> Difference | None:
    """Return the difference of bits per byte on the problems, or documents of a text, of both that have the same bytes.

    None if there are none, or if a loss is not finite.
    """
    own, other = ({task: (size, nll) for task, size, nll in side.get("losses", [])} for side in (benchmark, first))
    shared = [task for task in own if task in other and own[task][0] == other[task][0]]
    if not shared or any(side[task][1] is None for side in (own, other) for task in shared):
        return None
    bits = [[side[task][1] / math.log(2) for task in shared] for side in (own, other)]
    return paired_ratio_difference(bits[0], bits[1], [own[task][0] for task in shared])


def _syntax(runs: list[Evaluated]) -> Section | None:
    """Return the rates of samples that compile, and that also are not trivial, for all prompts and each kind of prompt."""
    parts = [run.part("syntax") for run in runs]
    if (section := _section("Syntax of samples", runs, parts)) is None:
        return None
    kinds = dict.fromkeys(kind for part in parts for kind in part.get("by_prompt", {}))
    for run, part in zip(runs[1:], parts[1:]):
        if part and parts[0] and set(part.get("by_prompt", {})) != set(parts[0].get("by_prompt", {})):
            section.notes.append(
                f"run {run.place} has other kinds of prompts than run 1: of all, no difference is taken"
            )
        if part and parts[0] and part.get("python") != parts[0].get("python"):
            section.notes.append(
                f"run {run.place} is by the syntax of Python {part.get('python')}, not {parts[0].get('python')}"
            )
    for kind in [None, *kinds] if len(kinds) > 1 else [None]:
        groups = [part if kind is None else part.get("by_prompt", {}).get(kind, {}) for part in parts]
        for key, name in (("passes", "pass"), ("non_trivial", "not trivial")):
            cells = [rate_cell(group, key) for group in groups]
            rates = [_rates(part, kind, key) for part in parts]
            differences = []
            for own in rates[1:]:
                same = kind or {k for k, _ in own} == {k for k, _ in rates[0]}
                differences.append(shown_difference(_rate_difference(own, rates[0]) if same else None, _points))
            _add(section, runs, f"{kind or 'all'}: {name}", cells, differences)
    return section


def _rates(part: dict[str, Any], kind: str | None, key: str) -> dict[tuple[str, str], float]:
    """Return the rate for each prompt, by its kind and name."""
    column = {"passes": 2, "non_trivial": 3}[key]
    groups = part.get("by_prompt", {}).items()
    return {(k, row[0]): row[column] / row[1] for k, group in groups if kind in (None, k) for row in group["counts"]}


def _rate_difference(own: dict[tuple[str, str], float], first: dict[tuple[str, str], float]) -> Difference | None:
    """Return the difference of the mean rates on the prompts that both have; None if there are none."""
    shared = [prompt for prompt in own if prompt in first]
    return paired_difference([own[p] for p in shared], [first[p] for p in shared]) if shared else None


def _functional(runs: list[Evaluated]) -> Section | None:
    """Return pass@k for each benchmark and k."""
    parts = [run.part("functional") for run in runs]
    if (section := _section("Functional correctness", runs, parts)) is None:
        return None
    for name in dict.fromkeys(name for part in parts for name in part):
        benchmarks = [part.get(name, {}) for part in parts]
        for k in sorted({k for benchmark in benchmarks for k in benchmark.get("pass_at", {})}, key=int):
            cells = [pass_cell(benchmark, k) for benchmark in benchmarks]
            differences = [shown_difference(pass_difference(b, benchmarks[0], int(k)), _points) for b in benchmarks[1:]]
            _add(section, runs, f"{name} pass@{k}", cells, differences)
        for level, groups in _by_level(benchmarks).items():  # at the most samples, where the steps are seen best
            k = max((k for group in groups for k in group.get("pass_at", {})), key=int, default="1")
            differences = [shown_difference(pass_difference(group, groups[0], int(k)), _points) for group in groups[1:]]
            _add(
                section, runs, f"{name}, level {level} pass@{k}", [pass_cell(group, k) for group in groups], differences
            )
        tasks = [{task for task, _, _ in benchmark.get("counts", [])} for benchmark in benchmarks]
        for run, own in zip(runs[1:], tasks[1:]):
            if own and tasks[0] and own != tasks[0]:
                both = f"the {len(own & tasks[0]):,} problems of both"
                section.notes.append(f"{name}: run {run.place} is compared with run 1 on {both}")
        for run, benchmark in zip(runs, benchmarks):
            if "skipped" in benchmark:
                section.notes.append(f"{name}: skipped for run {run.place}, {benchmark['skipped']}")
            if benchmark.get("sandbox") == "none":
                section.warnings.append(f"{name}: run {run.place} was evaluated NOT SANDBOXED")
    return section


def _harness(runs: list[Evaluated]) -> Section | None:
    """Return the tasks of the harness. Only runs with the same metric, questions and shots are compared."""
    parts = [run.part("harness") for run in runs]
    if (section := _section("lm-evaluation-harness", runs, parts)) is None:
        return None
    for name in dict.fromkeys(name for part in parts for name in part):
        tasks = [part.get(name, {}) for part in parts]
        differences = [shown_difference(task_difference(task, tasks[0]), _fraction) for task in tasks[1:]]
        metrics = ", ".join(dict.fromkeys(task["metric"] for task in tasks if "metric" in task))
        _add(section, runs, f"{name} {metrics}", [harness_cell(task) for task in tasks], differences)
        if any(t and tasks[0] and [t.get(k) for k in KIND] != [tasks[0].get(k) for k in KIND] for t in tasks):
            section.notes.append(f"{name}: runs of another metric, number of questions or of shots are not compared")
    section.notes.append("the harness's questions are not paired: intervals of differences are wider than they need be")
    return section


KIND = ("metric", "n", "shots")


def task_difference(task: dict[str, Any], first: dict[str, Any]) -> Difference | None:
    """Return the difference of a harness's task, unpaired; None for another metric, other questions or shots."""
    if [task.get(key) for key in KIND] != [first.get(key) for key in KIND]:
        return None
    if None in (task.get("value"), task.get("stderr"), first.get("value"), first.get("stderr")):
        return None
    difference, half = task["value"] - first["value"], Z * math.hypot(task["stderr"], first["stderr"])
    return Difference(difference, difference - half, difference + half, abs(difference) > half)


def _explanation(found: list[Section]) -> Section:
    """Return what a * means, and how many there would be by chance."""
    compared = sum("[" in row[3] for section in found for row in section.rows if section.columns == COLUMNS)
    notes = [
        "*: the 95% interval of the difference to run 1 excludes 0 (and where it is paired, at least "
        f"{FEWEST} documents or problems differ)",
        f"{compared} differences have an interval: if no run differed, about {compared / 20:.1f} of them would get a * by chance",
        "differences of shares are in percentage points; intervals are over documents, problems or prompts of one trained "
        "model each, and say nothing of what another training seed would give",
    ]
    return Section("How to read this", notes=notes)

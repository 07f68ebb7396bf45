"""Shows the results of an evaluation as tables with 95% intervals.

    print(table(results, losses))        # for the terminal

`results` and `losses` are those of results_file.py. Any part of the results may be absent, or be {"skipped": "the reason"},
which is shown. Without losses, the figures on them have no intervals.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kindling.evaluation.infill_report import gaps_section, line_notes, whole_problems
from kindling.evaluation.intervals import (
    FEWEST,
    NONE,
    Interval,
    LossLines,
    Z,
    all_finite,
    bits_interval,
    count,
    number,
    pass_interval,
    percent,
    perplexity_interval,
    rate_interval,
)
from kindling.tables import Section, as_markdown, as_text

READING = "figures in brackets are 95% intervals; a - stands for what is not known"

Results = dict[str, Any]


def table(results: Results, losses: LossLines | None = None, color: bool = False) -> str:
    """Return all results for a terminal of 100 columns."""
    return as_text([title(results), *facts(results), READING], sections(results, losses or []), color)


def markdown(results: Results, losses: LossLines | None = None) -> str:
    """Return the same as a Markdown document."""
    return as_markdown(title(results), [*facts(results), READING], sections(results, losses or []))


def title(results: Results) -> str:
    """Return the heading of a run's results."""
    return f"Evaluation of {results.get('run', 'a run')}"


def facts(results: Results) -> list[str]:
    """Return what was evaluated and how, in up to four lines."""
    labels = {"checkpoint": "{}", "preset": "preset {}", "parameters": "{:,} parameters",
              "weights_sha256": "weights {:.12}"}  # fmt: skip
    measured = {"split": "{} split", "data": "of {}", "device": "on {}", "precision": "{}", "python": "Python {}",
                "seconds": "{:,.0f} s"}  # fmt: skip
    lines = []
    for wanted in (labels, measured):
        parts = [form.format(results[key]) for key, form in wanted.items() if results.get(key) is not None]
        lines.append(", ".join(parts))
    lines.append(", ".join(f"{key} {value}" for key, value in results.get("settings", {}).items() if value is not None))
    if results.get("kept"):
        lines.append(f"kept from an earlier evaluation of the same weights: {', '.join(results['kept'])}")
    return [line for line in lines if line]


def sections(results: Results, losses: LossLines) -> list[Section]:
    """Return a section for each part of the results."""
    found: list[Section] = []
    for name, heading in HEADINGS.items():
        part = results.get(name)
        if not part:
            continue
        if "skipped" in part:
            found.append(Section(heading, notes=[f"not computed: {part['skipped']}", *skipped_benchmarks(part)]))
        elif name == "language_modelling":
            found.append(_language_modelling(part, losses))
        elif name == "infilling":
            found.append(gaps_section(HEADINGS[name], part))
        elif name == "texts":
            found.append(_texts(part))
        elif name == "gold":
            found.append(_gold(part))
        elif name == "syntax":
            found.append(_syntax(part))
        elif name == "functional":
            found += _functional(part)
        elif name == "memorisation":
            found.append(_memorisation(part))
        elif name == "contamination":
            found.append(_contamination(part))
        elif name == "harness":
            found.append(_harness(part))
    return found or [Section("Nothing was evaluated")]


HEADINGS = {
    "language_modelling": "Language modelling, held-out documents",
    "infilling": "Gaps in held-out files, filled in",
    "texts": "Language modelling, texts",
    "gold": "Reference solutions, given their prompts",
    "syntax": "Syntax of samples",
    "functional": "Functional correctness",
    "memorisation": "Memorisation",
    "contamination": "Benchmark problems in the training data",
    "harness": "lm-evaluation-harness",
}


_LM_COLUMNS = ["loss", "perplexity", "bits per byte", "docs", "tokens", "bytes"]


def _lm_row(name: str, figures: dict[str, Any], losses: LossLines) -> list[str]:
    return [
        name,
        number(figures.get("loss")),
        number(figures.get("perplexity"), perplexity_interval(losses), ",.2f"),
        number(figures.get("bits_per_byte"), bits_interval(losses), ".3f"),
        *(count(figures.get(key)) for key in ("documents", "tokens", "bytes")),
    ]


def _language_modelling(part: dict[str, Any], losses: LossLines) -> Section:
    section = Section(HEADINGS["language_modelling"], ["", *_LM_COLUMNS])
    if "all" in part:
        section.rows.append(_lm_row("all", part["all"], losses))
    for key, field, label in (("by_language", "language", "{}"), ("by_source", "source", "from {}")):
        groups = part.get(key, {})
        if len(groups) == 1 and "all" in part:
            section.notes.append(f"all of one {field}: {next(iter(groups))}")
            continue
        for name, figures in groups.items():
            own = [line for line in losses if line[field] == name]
            section.rows.append(_lm_row(label.format(name), figures, own))
            if losses and len(own) < FEWEST:
                section.notes.append(f"{label.format(name)}: no interval, of fewer than {FEWEST} documents")
    if losses:
        section.notes.append("intervals: documents resampled, 10,000 times")
    else:
        section.notes.append("no intervals: the losses of single documents are missing")
    if not all_finite(losses):
        section.notes.append("no intervals where the loss of a document is not finite")
    if part.get("stride"):
        section.notes.append(f"read through a window that moves on by {part['stride']:,} tokens")
    return section


def _texts(part: dict[str, Any]) -> Section:
    rows = [_lm_row(name, text.get("all", {}), []) for name, text in part.items()]
    bits = _LM_COLUMNS.index("bits per byte") + 1
    for row, text in zip(rows, part.values()):
        row[bits] = text_cell(text)
    note = f"intervals: documents of a file resampled; a text that is not {FEWEST} documents has none"
    return Section(HEADINGS["texts"], ["", *_LM_COLUMNS], rows, [note])


def text_cell(text: dict[str, Any]) -> str:
    """Return a text's bits per byte with their interval over its documents, or "-"."""
    return gold_cell({**text.get("all", {}), "losses": text.get("losses", [])})


def gold_cell(benchmark: dict[str, Any]) -> str:
    """Return a benchmark's gold bits per byte with their interval over problems, or "-"."""
    losses = [{"bytes": n_bytes, "nll": nll} for _, n_bytes, nll in benchmark.get("losses", [])]
    return number(benchmark.get("bits_per_byte"), bits_interval(losses), ".3f")


def _gold(part: dict[str, Any]) -> Section:
    section = Section(HEADINGS["gold"], ["benchmark", "gold bits per byte", "problems", "bytes"])
    for name, benchmark in part.items():
        groups = {name: benchmark} | {f"level {k}": group for k, group in benchmark.get("by_level", {}).items()}
        for label, group in groups.items():
            section.rows.append([label, gold_cell(group), *(count(group.get(key)) for key in ("problems", "bytes"))])
    section.notes.append("intervals: problems resampled, 10,000 times")
    return section


def rate_cell(group: dict[str, Any], key: str) -> str:
    """Return the rate of `key` ("passes" or "non_trivial") among samples, with its interval over prompts; "-" without samples."""
    if not group.get("samples"):
        return "-"
    columns = {"passes": 2, "non_trivial": 3}
    counts = group.get("counts") or [row for part in group.get("by_prompt", {}).values() for row in part["counts"]]
    interval = rate_interval([row[columns[key]] for row in counts], [row[1] for row in counts]) if counts else NONE
    return percent(group[key] / group["samples"], interval)


def _syntax(part: dict[str, Any]) -> Section:
    columns = ["prompts", "samples", "pass", "and are not trivial"]
    groups = {"all": part, **part.get("by_prompt", {})}
    rows = [
        [name, count(group.get("samples")), *(rate_cell(group, key) for key in ("passes", "non_trivial"))]
        for name, group in groups.items()
    ]
    section = Section(HEADINGS["syntax"], columns, rows, list(part.get("notes", [])))
    if "python" in part:
        section.notes.append(f"by the syntax of Python {part['python']}; intervals: prompts resampled")
    if not part.get("samples"):
        section.notes.append("no samples were taken")
    return section


def pass_cell(benchmark: dict[str, Any], k: str) -> str:
    """Return a benchmark's pass@k with its interval over problems; "-" if some problem has fewer than k samples."""
    value, counts = benchmark.get("pass_at", {}).get(k), benchmark.get("counts", [])
    if value is None or any(n < int(k) for _, n, _ in counts):
        return "-"
    n, c = [n for _, n, _ in counts], [c for _, _, c in counts]
    return percent(value, pass_interval(n, c, int(k), clusters=whole_problems(benchmark)) if counts else NONE)


def _functional(part: dict[str, Any]) -> list[Section]:
    ks = sorted({k for benchmark in part.values() for k in benchmark.get("pass_at", {})}, key=int)
    solved = Section(HEADINGS["functional"], ["benchmark", *(f"pass@{k}" for k in ks), "problems", "samples each"])
    for name, benchmark in part.items():
        if "skipped" in benchmark:
            continue
        each = benchmark.get("samples_per_problem")
        cells = [pass_cell(benchmark, k) for k in ks]
        solved.rows.append([name, *cells, count(benchmark.get("problems")), count(each)])
        for level, group in benchmark.get("by_level", {}).items():
            cells = [pass_cell(group, k) for k in ks]
            solved.rows.append([f"level {level}", *cells, count(group.get("problems")), count(each)])
        if each and any(int(k) > each for k in benchmark.get("pass_at", {})):
            solved.notes.append(f"{name}: pass@k needs at least k samples of each problem, and {each} were taken")
        if benchmark.get("cropped"):
            solved.notes.append(f"{name}: {benchmark['cropped']:,} prompts cropped to the model's context")
        if benchmark.get("left_out"):
            solved.notes.append(f"{name}: {describe_left_out(benchmark['left_out'])}")
        if benchmark.get("sandbox") == "none":
            solved.warnings.append(f"{name}: NOT SANDBOXED, the samples could do what the user can")
    solved.notes += skipped_benchmarks(part) + line_notes(part)
    modes = dict.fromkeys(b["sandbox"] for b in part.values() if b.get("sandbox", "none") != "none")
    solved.notes += [f"sandbox: {', '.join(modes)}"] * bool(modes)
    pythons = dict.fromkeys(b["python"] for b in part.values() if "python" in b)
    solved.notes += [f"run by Python {', '.join(pythons)}"] * bool(pythons)
    solved.notes.append(
        f"intervals: problems resampled, 10,000 times, if there are {FEWEST}; of none or all solved, Wilson's"
    )
    found = [name for name, benchmark in part.items() if benchmark.get("verdicts")]
    kinds = list(dict.fromkeys(kind for name in found for kind in part[name]["verdicts"]))
    rows = [[name, *(count(part[name]["verdicts"].get(kind, 0)) for kind in kinds)] for name in found]
    return [solved, *([Section("Verdicts on the samples", ["benchmark", *kinds], rows)] if rows else [])]


def skipped_benchmarks(part: dict[str, Any]) -> list[str]:
    """Return a line on each benchmark of `functional` that was skipped as a whole."""
    return [f"{name}: skipped, {b['skipped']}" for name, b in part.items() if isinstance(b, dict) and "skipped" in b]


def _memorisation(part: dict[str, Any]) -> Section:
    samples, over = part.get("samples"), part.get("over_50")
    rows = [
        ["samples", count(samples)],
        ["longest run of a sample that the training data holds, in tokens", count(part.get("longest"))],
        ["median of these runs, in tokens", number(part.get("median"), form=",g")],
        ["samples with a run of over 50 tokens", count(over)],
        ["their share", percent(over / samples if samples and over is not None else None)],
    ]
    notes = [f"looked for in {part['training_tokens']:,} tokens of training"] if part.get("training_tokens") else []
    return Section(HEADINGS["memorisation"], ["", ""], rows, notes)


def _contamination(part: dict[str, Any]) -> Section:
    section = Section(HEADINGS["contamination"], ["benchmark", "problems", "found", "share"])
    for name, found in part.items():
        if not isinstance(found, dict):
            continue
        problems, hit = found.get("problems"), found.get("hit")
        part_of = None if hit is None or not problems else hit / problems
        section.rows.append([name, count(problems), count(hit), percent(part_of)])
        if found.get("examples"):
            named = ", ".join(str(example) for example in found["examples"][:5])
            more = len(found["examples"]) - 5
            section.notes.append(f"{name}: {named}" + (f" and {more:,} more" if more > 0 else ""))
        if found.get("too_short"):
            section.notes.append(f"{name}: {found['too_short']:,} problems are too short to be recognised in any data")
    read, of = part.get("read_tokens"), part.get("of_tokens")
    if read is not None and of is not None:
        section.notes.append(
            f"{'all' if read >= of else f'ONLY {read:,} of'} {of:,} tokens of the training data were read"
        )
    return section


def _harness(part: dict[str, Any]) -> Section:
    rows = [
        [name, task.get("metric", "-"), harness_cell(task), count(task.get("n")), count(task.get("shots"))]
        for name, task in part.items()
    ]
    notes = [f"{name}: {note}" for name, task in part.items() for note in task.get("notes", [])]
    return Section(HEADINGS["harness"], ["task", "metric", "value", "questions", "shots"], rows, notes, names=2)


def harness_cell(task: dict[str, Any]) -> str:
    """Return a task's value with its interval of 1.96 standard errors on each side."""
    value, stderr = task.get("value"), task.get("stderr")
    return number(value, NONE if value is None or stderr is None else Interval(value - Z * stderr, value + Z * stderr))


def describe_left_out(left_out: Mapping[str, str]) -> str:
    """Return one line on what is left out."""
    shown = [f"{task} ({reason})" for task, reason in left_out.items()]
    more = [f"and {len(shown) - 5:,} more"] if len(shown) > 5 else []
    return f"{len(shown):,} problems left out: {'; '.join([*shown[:5], *more])}"

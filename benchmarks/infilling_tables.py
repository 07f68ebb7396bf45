"""The figures of infilling.py: what is kept of each run, and the tables as Markdown.

Intervals are of 95% and resample documents. Where there are several seeds, a document has the sum over all of them, so the
interval is about other documents, not other seeds; the spread over seeds stands beside it.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

Results = dict[str, Any]

WITHOUT = "no suffix"  # the way of evaluation/infill.py without what follows the gap


def run_figures(run: Path) -> dict[str, Any]:
    """Return the figures of a run's eval.json, and the losses of its documents; nothing if it was not evaluated."""
    try:
        results = json.loads((run / "eval.json").read_text(encoding="utf-8"))
        lines = (run / "losses.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    losses = [json.loads(line) for line in lines]
    infilling = results.get("infilling", {})
    return {
        "bits_per_byte": results["language_modelling"]["all"]["bits_per_byte"],
        "documents": [[line["bytes"], line["nll"]] for line in losses],
        "infilling_bits_per_byte": infilling.get("all", {}).get("bits_per_byte"),
        "gaps": infilling.get("gaps", {}),
        "functional": results.get("functional", {}),
    }


def markdown(results: Results) -> str:
    """Return all results as tables."""
    from machine import phrase

    settings = results["settings"]
    lines = [
        f"`{settings['preset']}` on {phrase(results['machine'])}, {results['seconds']:.0f} s; {results.get('tokens', 0):,} "
        f"tokens a run in steps of {settings['step_tokens']:,}; {settings['at_once']} runs at the same time. "
        f"Flags: `{' '.join(settings['more']) or 'none'}`."
    ]
    if results["toy"]:
        lines.append("\n**Toy sizes: this shows that all of it works, and measures nothing.**")
    parts = {name: found for part in ("builds", "runs") for name, found in results.get(part, {}).items()}
    failed = [f"- {name}: {found['failed']}" for name, found in parts.items() if "failed" in found]
    lines += ["", "Failed:", "", *failed] if failed else []
    runs = [run for run in results.get("runs", {}).values() if "bits_per_byte" in run]
    ways = [way for way in settings["ways"] if any(run["way"] == way for run in runs)]
    of = {way: {run["seed"]: run for run in runs if run["way"] == way} for way in ways}
    lines += ["", "## From left to right", "", *from_left_to_right(of)]
    lines += ["", "## Gaps in held-out files", "", *gap_table(of)]
    lines += ["", "## Lines of programs, which were run", "", *line_table(of)] if settings["benchmarks"] else []
    lines += ["", "## The runs", "", *run_table(results.get("runs", {}))]
    return "\n".join(lines).rstrip() + "\n"


def from_left_to_right(of: dict[str, dict[int, Results]]) -> list[str]:
    """Return the bits per byte of each way, and its difference to the first way on the same documents."""
    lines = [
        "| | bits per byte, each seed | mean | to the first, each seed | mean, with its interval over documents |",
        "| --- | --- | ---: | --- | ---: |",
    ]
    first = next(iter(of), "")
    for way, runs in of.items():
        bits = [run["bits_per_byte"] for run in runs.values()]
        pairs = [(run, of[first][seed]) for seed, run in runs.items() if seed in of[first]]
        cells = ["", ""]
        if way != first and pairs:
            cells = list(difference(pairs))
        lines.append(
            f"| {way} | {', '.join(f'{b:.4f}' for b in bits)} | {statistics.mean(bits):.4f} | {cells[0]} | {cells[1]} |"
        )
    return lines


def difference(pairs: list[tuple[Results, Results]]) -> tuple[str, str]:
    """Return the differences in bits per byte of runs and those that they are compared with, pair by pair and together."""
    from kindling.evaluation.intervals import paired_ratio_difference

    each, total = [], []
    if any("documents" not in run for pair in pairs for run in pair):  # not evaluated: the last validation of training
        plain = [run["bits_per_byte"] - other["bits_per_byte"] for run, other in pairs]
        return ", ".join(f"{d:+.4f}" for d in plain), f"{statistics.mean(plain):+.4f}"
    for run, other in pairs:
        n_bytes, nll = zip(*run["documents"])
        other_bytes, other_nll = zip(*other["documents"])
        if n_bytes != other_bytes:
            return "other documents", "other documents"
        each.append(paired_ratio_difference(nll, other_nll, n_bytes).difference / math.log(2))
        total.append((nll, other_nll))
    ours, theirs = ([sum(column) for column in zip(*side)] for side in zip(*total))
    found = paired_ratio_difference(ours, theirs, [len(pairs) * n for n in n_bytes])
    mean, low, high = (x / math.log(2) for x in found[:3])
    return ", ".join(f"{d:+.4f}" for d in each), f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def gap_table(of: dict[str, dict[int, Results]]) -> list[str]:
    """Return exact matches and similarity by way of cutting, kind of gap and way of filling it, all seeds together."""
    from kindling.evaluation.intervals import bootstrap_ratio, number, percent, rate_interval

    lines = ["| | gap | filled | exact | more than without the suffix | similarity | gaps | docs |"]
    lines.append("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for way, runs in of.items():
        for kind, ways in pooled([run.get("gaps", {}) for run in runs.values()]).items():
            for filled, (n, exact, similarity) in ways.items():
                rates = [sum(column) / sum(n) for column in (exact, similarity)]
                cells = [percent(rates[0], rate_interval(exact, n)), more_than(exact, ways[WITHOUT][1], n, filled)]
                cells += [number(rates[1], bootstrap_ratio(similarity, n), ".3f"), str(int(sum(n))), str(len(n))]
                lines.append(f"| {way} | {kind} | {filled} | {' | '.join(cells)} |")
        bits = [run.get("infilling_bits_per_byte") for run in runs.values()]
        bits = [b for b in bits if b is not None]
        if bits:
            lines.append(f"| {way} | pieces, all filled in | bits per byte: {statistics.mean(bits):.4f} | | | | | |")
    return lines


def more_than(exact: list[float], without: list[float], n: list[float], filled: str) -> str:
    """Return the difference in exact matches to filling without the suffix, as a text."""
    from kindling.evaluation.infill_report import percent_points
    from kindling.evaluation.intervals import paired_ratio_difference

    return "" if filled == WITHOUT else percent_points(paired_ratio_difference(exact, without, n))


def pooled(all_gaps: list[Results]) -> dict[str, dict[str, list[list[float]]]]:
    """Return by kind and way of filling the number of gaps, exact matches and similarity of each document, over all runs.

    Runs of the same data have the same gaps, in the same order of documents.
    """
    out: dict[str, dict[str, list[list[float]]]] = {}
    for gaps in all_gaps:
        for kind, found in gaps.items():
            for filled, figures in found["ways"].items():
                columns = [list(column) for column in zip(*figures["by_document"])]
                before = out.setdefault(kind, {}).get(filled)
                if before is not None:
                    columns = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(before, columns)]
                out[kind][filled] = columns
    return out


def line_table(of: dict[str, dict[int, Results]]) -> list[str]:
    """Return pass@1 of each way of cutting on each benchmark, all seeds together: a seed is one more sample of a line."""
    from kindling.evaluation.infill_report import line_notes
    from kindling.evaluation.report import pass_cell

    lines = ["| | benchmark | pass@1 | each seed | lines |", "| --- | --- | ---: | --- | ---: |"]
    notes = []
    for way, runs in of.items():
        found = [run.get("functional", {}) for run in runs.values()]
        together = {}
        for name in dict.fromkeys(name for part in found for name in part):
            each = [part[name] for part in found if isinstance(part.get(name), dict) and "counts" in part[name]]
            if not each:
                said = next((part[name] for part in found if name in part), "")
                notes.append(f"- {way}, {name}: {said['skipped'] if isinstance(said, dict) else said}")
                continue
            counts: dict[str, list[int]] = {}
            for task, n, c in (row for part in each for row in part["counts"]):
                counts[task] = [counts.get(task, [0, 0])[0] + n, counts.get(task, [0, 0])[1] + c]
            rates = [part["pass_at"]["1"] for part in each]
            together[name] = {**each[0], "counts": [[task, *row] for task, row in counts.items()]}
            together[name]["pass_at"] = {"1": sum(c / n for n, c in counts.values()) / len(counts)}
            by_seed = ", ".join(f"{rate:.1%}" for rate in rates)
            lines.append(f"| {way} | {name} | {pass_cell(together[name], '1')} | {by_seed} | {len(counts)} |")
        notes += [f"- {way}, {note}" for note in line_notes(together)]
    return [*lines, *(["", *notes] if notes else [])]


def run_table(runs: dict[str, Results]) -> list[str]:
    """Return what each run took."""
    lines = ["| run | steps | tokens/s | bits per byte | steps, s | training, s | evaluation, s | lines, s |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, run in runs.items():
        figures = [("steps", ",.0f"), ("tokens_per_s", ",.0f"), ("bits_per_byte", ".4f"), ("seconds", ".1f")]
        figures += [(f"{stage}_s", ".1f") for stage in ("training", "evaluation", "lines")]
        cells = [format(run[key], form) if key in run else "-" for key, form in figures]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines

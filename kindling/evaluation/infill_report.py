"""What report.py shows of infilling: gaps in held-out files, and lines of reference solutions.

gaps_section(heading, results["infilling"])
line_notes(results["functional"])       # "humaneval-infill: 1,033 lines of 164 problems; the suffix adds 9.3 points ..."
"""

from __future__ import annotations

from typing import Any

from kindling.evaluation.intervals import (
    Difference,
    bootstrap_ratio,
    cluster_sums,
    count,
    number,
    paired_difference,
    paired_ratio_difference,
    pass_at_k,
    percent,
    rate_interval,
)
from kindling.evaluation.tasks import NO_SUFFIX
from kindling.tables import Section


def gaps_section(heading: str, part: dict[str, Any]) -> Section:
    """Return the table of the gaps in held-out files."""
    section = Section(heading, ["gap", "way", "exact", "similarity", "gaps", "docs"], names=2)
    for kind, found in part.get("gaps", {}).items():
        for way, figures in found["ways"].items():
            n, exact, similarity = zip(*figures["by_document"])
            cells = [percent(figures["exact"], rate_interval(exact, n))]
            cells += [number(figures["similarity"], bootstrap_ratio(similarity, n), ".3f"), count(found["gaps"])]
            section.rows.append([kind, way, *cells, count(len(n))])
    section.notes.append("intervals: documents resampled; PSM and SPM: with the suffix, after or before the prefix")
    if "all" in part:
        section.notes.append(f"bits per byte of held-out pieces, all filled in: {number(part['all']['bits_per_byte'])}")
    return section


def whole_problems(benchmark: dict[str, Any]) -> list[str] | None:
    """Return the whole problem of each line in the counts of a benchmark; None if its problems are no lines."""
    return [task.rpartition("/")[0] for task, _, _ in benchmark["counts"]] if "lines_of" in benchmark else None


def pass_difference(benchmark: dict[str, Any], first: dict[str, Any], k: int) -> Difference | None:
    """Return the difference of pass@k on the problems that both have; None if some problem has fewer than k samples.

    Of lines to be filled in, whole problems are resampled.
    """
    own, other = ({task: (n, c) for task, n, c in side.get("counts", [])} for side in (benchmark, first))
    shared = [task for task in own if task in other]
    if not shared or any(side[task][0] < k for side in (own, other) for task in shared):
        return None
    a, b = (
        pass_at_k([side[task][0] for task in shared], [side[task][1] for task in shared], k) for side in (own, other)
    )
    if "lines_of" not in benchmark:
        return paired_difference(a, b)
    whole = [task.rpartition("/")[0] for task in shared]
    passed, of_first, lines = cluster_sums(whole, a, b, [1] * len(shared))
    return paired_ratio_difference(passed, of_first, lines)


def line_notes(part: dict[str, Any]) -> list[str]:
    """Return a line on each benchmark whose lines were filled in: how many they are, and what the suffix is worth."""
    notes = []
    for name, benchmark in part.items():
        if not isinstance(benchmark, dict) or "lines_of" not in benchmark or name.endswith(NO_SUFFIX):
            continue
        note = f"{name}: {benchmark['problems']:,} lines of {benchmark['lines_of']:,} problems, which are resampled"
        found = pass_difference(benchmark, part.get(name + NO_SUFFIX, {}), 1)
        if found is not None:
            note += f"; pass@1 with the suffix less that without: {percent_points(found)}"
        notes.append(note)
    return notes


def percent_points(difference: Difference) -> str:
    """Return a difference of two shares in points, with its interval if there is one."""
    ends = (100 * difference.low, 100 * difference.high)
    return f"{100 * difference.difference:+.1f} points" + (
        "" if ends[0] != ends[0] else f" [{ends[0]:+.1f}, {ends[1]:+.1f}]"
    )

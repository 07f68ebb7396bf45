"""The figures of serving.py as tables in Markdown, with the goals beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from machine import phrase

Results = dict[str, Any]


def markdown(results: Results) -> str:
    """Return all results as tables."""
    lines = ["# The server", "", f"{results['model']}; {phrase(results['machine'])}", ""]
    if found := results.get("latency"):
        lines += [
            "| prompt | server | first text, ms | line of 12 tokens, ms | p95 |",
            "| --- | --- | ---: | ---: | ---: |",
        ]
        for kind, said in (("cached", "cached but for one token"), ("new", "new")):
            for name, kinds in found.items():
                one = kinds[kind]
                times = " | ".join(str(one[key]) for key in ("first text, ms", "line, ms", "line, p95, ms"))
                lines.append(f"| {said} | {name} | {times} |")
        lines += ["", "Goals for int8: 40 and 90 ms; 250 ms to the first text of a new prompt.", ""]
    if found := results.get("clients"):
        columns = list(next(iter(found.values()))["writing"])
        lines += [f"| 16 clients | server | {' | '.join(columns)} |", f"| --- | --- |{' ---: |' * len(columns)}"]
        for load in ("writing", "typing"):
            for name, loads in found.items():
                lines.append(f"| {load} | {name} | {' | '.join(str(loads[load][key]) for key in columns)} |")
        lines += ["", "Goals for int8: at least 4 times one client, p95 under 1,000 ms, the same texts.", ""]
    if found := results.get("decoding"):
        columns = list(next(iter(found.values())))
        lines += [f"Decoding ({results.get('model of decoding', results['model'])}):", ""]
        lines += [f"| server | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
        lines += [f"| {name} | {' | '.join(str(one[key]) for key in columns)} |" for name, one in found.items()]
        lines += ["", "Goal for int8: at least as fast as llama.cpp in both.", ""]
    lines += _memory_lines(results)
    if found := results.get("broken"):
        times = found["their time, ms"]
        lines += [
            f"Broken requests: {found['requests']:,} of {found['kinds']} kinds; with status 500 or above: "
            f"{found['status 500 and above']}; slow ones never ended: {found['slow ones that the server never ended']}. "
            f"{found['good requests in between']} good ones in between took {times['between']} ms "
            f"(p95 {times['between, p95']}), before them {times['before']} ({times['before, p95']}), "
            f"after them {times['after']}. Memory after each tenth: "
            f"{', '.join(str(one['whole']) for one in found['memory after each tenth'])} MB.",
            "",
        ]
    return "\n".join(lines)


def _memory_lines(results: Results) -> Iterator[str]:
    if found := results.get("memory"):
        yield f"| MB in memory | {' | '.join(found['then'])} |"
        yield f"| --- |{' ---: |' * len(found['then'])}"
        for said, key in (("at the start", "at the start"), (f"after {found['requests']:,} requests", "then")):
            yield f"| {said} | {' | '.join(map(str, found[key].values()))} |"
        yield from ("", "Goal: the whole under 150 MB.", "")
    if found := results.get("growth"):
        whole = ", ".join(str(one["whole"]) for one in found["after each tenth"])
        yield f"After each tenth of {found['requests']:,} requests: {whole} MB."
        yield ""

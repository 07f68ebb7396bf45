"""Put what the benchmarks measured beside what is asked, in one Markdown table.

    python benchmarks/summary.py                              # of this machine, in benchmarks/results/local/
    python benchmarks/summary.py --kept                       # of the machines whose results are kept, in benchmarks/results/

Writes `summary.md` there. Measures nothing itself. A figure whose benchmark has not run, or whose result lacks it, has a row
that says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from machine import RESULTS, phrase

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

GIB = 2**30
SPEED_FP32, SPEED_BF16, OF_PEAK, STEP_GIB, OF_ONE = 1.6, 1.15, 0.7, 4.0, 0.9
EIGHTH_NOTE = "ours, its whole schedule in an eighth of the peer's time, on test files"
BITS, COMPILING, START_S = 1.55, 0.5, 10.0


class Row(NamedTuple):
    """A line of the table."""

    figure: str
    asked: str
    measured: str
    machine: str


def verdict(measured: str, reached: bool, judged: bool = True) -> str:
    """Return a measured figure with what it is worth, unless it was measured otherwise than it is asked for."""
    if not judged:
        return measured
    return f"{measured}: {'reached' if reached else 'NOT reached'}"


def throughput(results: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows on training speed and memory."""
    machine = phrase(results["machine"])
    for shape, found in results["shapes"].items():
        for precision, least in (("fp32", SPEED_FP32), ("bf16", SPEED_BF16)):
            asked = f"at least {least}"
            figure = f"training at `{shape}` shape, times the best {precision} peer"
            ratio = found["ratios"].get(precision)
            if ratio is None:
                yield Row(figure, asked, missing_precision(results, precision), machine)
                continue
            speeds = " against ".join(f"{found['ways'][ratio[side]]['tokens_per_s']:,.0f}" for side in ("ours", "peer"))
            how = f"{ratio['times']:.2f} ({speeds} tokens/s; {ratio['ours']} against {ratio['peer']})"
            yield Row(figure, asked, verdict(how, ratio["times"] >= least), machine)
    yield from share_of_peak(results, machine)
    yield from memory(results, machine)


def missing_precision(results: dict[str, Any], precision: str) -> str:
    """Return why a precision was not measured."""
    if precision == "bf16" and results["device"] == "cpu":
        return "not measured: this machine has no bfloat16 instructions"
    return f"not measured: on {results['device']} ours runs in another precision"


def share_of_peak(results: dict[str, Any], machine: str) -> Iterator[Row]:
    """Yield the row on the share of the machine's peak at `autocomplete` shape; of every shape where that is not there."""
    shapes = results["shapes"]
    for shape in ["autocomplete"] if "autocomplete" in shapes else shapes:
        ours = [way for way in shapes[shape]["ways"].values() if way["side"] == "ours"]
        best = max(ours, key=lambda way: way["tokens_per_s"])
        peak = shapes[shape]["peak"][best["precision"]]["flops"] / 1e9
        how = f"{best['share_of_peak']:.0%} of {peak:,.0f} GFLOP/s in {best['precision']}"
        if best["precision"] == "bf16" and shape == "autocomplete":
            how = verdict(how, best["share_of_peak"] >= OF_PEAK)
        figure = f"model FLOP/s at `{shape}` shape, share of the matrix-product peak"
        asked = f"at least {OF_PEAK:.0%} in bfloat16" if shape == "autocomplete" else "-"
        yield Row(figure, asked, how, machine)


def memory(results: dict[str, Any], machine: str) -> Iterator[Row]:
    """Yield the row on the memory of a step of `code-50m`, which is asked of the CPU."""
    figure, asked = "`code-50m`, a step of 4 x 1024, peak process memory", f"at most {STEP_GIB:g} GiB"
    if "code-50m" not in results["shapes"]:
        yield Row(figure, asked, "not measured: `python benchmarks/train_throughput.py --shapes code-50m`", machine)
        return
    found = results["shapes"]["code-50m"]
    ways = {side: [w for w in found["ways"].values() if w["side"] == side] for side in ("ours", "peer")}
    most, of_peer = max(w["peak_bytes"] for w in ways["ours"]) / GIB, min(w["peak_bytes"] for w in ways["peer"]) / GIB
    how = f"{most:.2f} GiB (the leanest peer {of_peer:.2f})"
    if results["device"] != "cpu":
        yield Row("`code-50m`, a step of 4 x 1024, peak memory of the GPU", "-", how, machine)
        return
    yield Row(figure, asked, verdict(how, most <= STEP_GIB), machine)


def learning(results: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows on the time to a loss."""
    machine, found = phrase(results["machine"]), results["figures"]
    peer_s, minutes = found["peer_seconds"], results["minutes"]
    ours, peer = found["eighth_bits_per_byte"]["test"], found["peer_bits_per_byte"]["test"]
    how = f"{ours:.3f} after {found['eighth_seconds']:.0f} s, the peer {peer:.3f} after {peer_s:.0f} s"
    reached, whole = found["eighth_reaches_the_peer"]["test"], minutes == 5
    yield Row(f"bits per byte: {EIGHTH_NOTE}", "at most the peer's", verdict(how, reached, whole), machine)
    if found["reached_s"] is None:
        how = f"never in {minutes:g} minutes"
    else:
        how = f"{found['reached_s']:.0f} s of {peer_s:.0f} s, {found['times_sooner']:.1f} times sooner"
    yield Row("time to the peer's last loss, by the curve of the whole run", "-", how, machine)
    bits = found["ours_bits_per_byte"]["test"]
    how = f"{bits:.3f} (validation {found['ours_bits_per_byte']['val']:.3f}) after {minutes:g} minutes"
    asked = f"at most {BITS} after 5 minutes"
    yield Row("`demo`, bits per byte on test files", asked, verdict(how, bits <= BITS, whole), machine)
    functions = found["functions"]["test"]
    share = functions["passes"] / max(1, functions["samples"])
    how = f"{functions['passes']} of {functions['samples']}, {share:.0%}"
    figure = "`demo`, functions that parse, from signatures of test files"
    yield Row(figure, f"at least {COMPILING:.0%}", verdict(how, share >= COMPILING, whole), machine)


def start(results: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows on the time to the first step."""
    for kind, found in results["seconds"].items():
        seconds = statistics.median(found)
        asked = "-" if kind == "compiled, nothing cached" else f"under {START_S:g} s"
        how = f"{seconds:.1f} s"
        how = how if asked == "-" else verdict(how, seconds < START_S)
        yield Row(f"`python main.py` to its first step, shards there, {kind}", asked, how, phrase(results["machine"]))


def data(results: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows on preparing data."""
    for corpus in ("three languages, 27 MB of JSON lines", "this machine's Python, 28 MB in files"):
        if corpus in results:
            times = f"{results[corpus]['times as fast as datasets']:.2f}"
            yield Row(f"{corpus}: to shards, times `datasets`", "-", times, phrase(results["machine"]))


def decode(results: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows on writing text."""
    machine = f"{results['cores']} cores, Python {results['python']}"
    for way, other in (
        ("generate.py, fp32", "fp32"),
        ("generate.py, bf16", "bf16"),
        ("autocomplete.py, int8, c", "fp32"),
    ):
        times = results.get(f"decoding: {way}, times transformers, {other}")
        if times is not None:
            yield Row(f"decoding `code-50m`: {way}, times transformers in {other}", "-", f"{times:.2f}", machine)


def ranks(results: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows on several ranks of one machine."""
    for shape, found in results["shapes"].items():
        two, one = (statistics.median(found[side]) for side in ("two", "one"))
        figure = f"two ranks with a thread each, training `{shape}`, times one process with two threads"
        how = verdict(f"{found['ratio']:.2f} ({two:,.0f} against {one:,.0f} tokens/s)", found["ratio"] >= OF_ONE)
        yield Row(figure, f"at least {OF_ONE}", how, phrase(results["machine"]))


def sharded(results: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows on a model that is divided over two ranks."""
    for case, found in results.items():
        peak = max(stage for rank in found["ranks"] for stage in rank["peak_gib"].values())
        seconds = max(rank["seconds"]["step 2"] for rank in found["ranks"])
        figure = f"`smallcoder-1`, two FSDP2 steps on two ranks, {case}"
        how = f"done: at most {peak:.1f} GiB in each rank, {seconds:.0f} s for the second step"
        yield Row(figure, "in this machine's memory", how, phrase(found["machine"]))


SECTIONS: dict[str, Callable[[dict[str, Any]], Iterator[Row]]] = {
    "train_throughput": throughput,
    "time_to_loss": learning,
    "start": start,
    "data": data,
    "generation": decode,
    "ranks": ranks,
    "fsdp_smallcoder": sharded,
}


def rows(folders: list[Path]) -> list[Row]:
    """Return the rows of all results in folders, one for each machine; raises KindlingError if one cannot be read."""
    from kindling.errors import KindlingError

    out = []
    for name, section in SECTIONS.items():
        again = f"run `python benchmarks/{name}.py`"
        paths = [path for folder in folders if (path := folder / f"{name}.json").is_file()]
        if not paths:
            out.append(Row(f"`{name}`", "-", f"not measured: {again}", "-"))
        for path in paths:
            try:
                found = list(section(json.loads(path.read_text(encoding="utf-8"))))
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                raise KindlingError(f"{path} must be a result of {name}.py, but is not ({e!r}); {again}") from None
            out += found or [Row(f"`{name}`", "-", f"not measured: {path.name} has none of its figures; {again}", "-")]
    return out


def kept() -> list[Path]:
    """Return the folders of results that git keeps, one for each machine."""
    return sorted(folder for folder in RESULTS.parent.iterdir() if folder.is_dir() and folder != RESULTS)


def markdown(lines: list[Row]) -> str:
    """Return the table."""
    cells = [f"| {' | '.join(row)} |" for row in lines]
    return "\n".join(["| figure | asked | measured | machine |", "| --- | --- | --- | --- |", *cells]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder with the results")
    parser.add_argument("--kept", action="store_true", help="summarise the results that the repository keeps")
    flags = parser.parse_args()
    from kindling.files import write_atomic

    folders = kept() if flags.kept else [flags.results]
    path = (RESULTS.parent if flags.kept else flags.results) / "summary.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = markdown(rows(folders))
    write_atomic(path, table)
    print(f"{table}\nwritten to {path}")


if __name__ == "__main__":
    from kindling.cli import run_script

    run_script(main)

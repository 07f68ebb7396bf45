"""Measure how long it takes to predict held-out files well, beside a GPT-2 with AdamW and cosine on the same clock.

    python benchmarks/time_to_loss.py                       # about 17 minutes; see that nothing else runs
    python benchmarks/time_to_loss.py --minutes 0.5 --results /tmp/try
    python benchmarks/time_to_loss.py --data data/demo-0123456789ab --thorough

Ours is the `demo` preset's recipe with a time budget. The peer is `peer.Peer`, of the same layers, width, heads, context and
vocabulary (or of --peer-shape) and as many rows a step (or --peer-batch), run in the way (precision, compiled or not) that takes
the most steps in the time; of three learning rates, each tried uncompiled for a fifth of the time with its whole schedule, the
best one gets the whole
time (--thorough gives each the whole). Same data, same tokenizer, same clock: compiling and training steps count, evaluating
does not. Each training is a process of its own, one at a time.

The curves are on an even choice of the validation split's rows. A run in mid-schedule is not annealed, so the time at which
ours comes to the peer's last loss is told twice: by the curve of the run with the whole time, and by a run of ours whose whole
schedule takes an eighth of it. Each training begins with an empty cache of compiled kernels, so that run is not compiled. It is
done once more with the kernels of ours, as on a machine where the preset was trained before. The final table is on whole splits;
the test split is read for nothing else. Writes
`time_to_loss.json`, `.md` and `.png` into `benchmarks/results/local/`.

Limits: one seed each; a twentieth of a bit may be chance. The files held out come from the same packages as the others.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loss_worker import Spec
from machine import RESULTS

ROOT = Path(__file__).resolve().parent.parent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORKER = ROOT / "benchmarks" / "loss_worker.py"
RATES = (1e-3, 3e-3, 6e-3)
TRIAL = 1 / 5  # of the time, for each learning rate
EIGHTH = 1 / 8
PEER_SHARES = [n / 10 for n in range(1, 11)]
OUR_SHARES = [0.02, 0.04, 0.06, 0.08, 0.1, 0.125, 0.15, *(n / 10 for n in range(2, 11))]
EIGHTH_SHARES = [0.25, 0.5, 0.75, 1.0]


def train(spec: Spec, folder: Path, kernels: Path | None = None) -> dict[str, Any]:
    """Run a worker to its end and return what it found; exits with its last words if it fails.

    `kernels` is the folder of compiled kernels; without it, the worker has an empty one of its own.
    """
    what = f"{spec.side}, " + (f"{spec.steps:,} steps" if spec.steps else f"{spec.minutes:.3g} minutes")
    what += f", learning rate {spec.lr:g}" if spec.lr else ""
    what += "" if spec.seed is None else f", {spec.preset}, seed {spec.seed}"
    print(f"{what} ...", flush=True)
    given, target, log = folder / "spec.json", folder / "result.json", folder / "log.txt"
    given.write_text(json.dumps(asdict(spec)), encoding="utf-8")
    target.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as empty, open(log, "w", encoding="utf-8") as errors:
        cache = str(kernels or empty)
        caches = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
        command = [sys.executable, str(WORKER), str(given), str(target)]
        code = subprocess.run(
            command, cwd=folder, env={**os.environ, **caches, "TQDM_DISABLE": "1"}, stderr=errors
        ).returncode
    if code or not target.is_file():
        sys.exit(f"{what}, must train, but ended with code {code}:\n{log.read_text(encoding='utf-8')[-3000:]}")
    return json.loads(target.read_text(encoding="utf-8"))


def race(base: Spec, rates: tuple[float, ...], thorough: bool, way: str | None, folder: Path) -> dict[str, Any]:
    """Train everything, one after the other, and return it."""
    peer = replace(base, side="peer", shares=[1.0])
    out: dict[str, Any] = {"minutes": base.minutes}
    if way is None:
        out["probe"] = train(replace(peer, side="probe"), folder)
        peer = replace(peer, precision=out["probe"]["precision"], compiled=out["probe"]["compiled"])
    else:
        precision, how = way.split("-")
        peer = replace(peer, precision=precision, compiled=how == "compiled")
    whole = replace(peer, shares=PEER_SHARES, final=True)
    trial = whole if thorough else replace(peer, minutes=base.minutes * TRIAL, compiled=False)
    out["trials"] = [train(replace(trial, lr=rate), folder) for rate in rates]
    best = min(out["trials"], key=last)
    out["peer"] = best if thorough else train(replace(whole, lr=best["lr"]), folder)
    ours = replace(base, side="ours", final=True)
    out["ours"] = train(replace(ours, shares=OUR_SHARES, functions=True), folder, kernels=folder / "kernels")
    eighth = replace(ours, shares=EIGHTH_SHARES, minutes=base.minutes * EIGHTH)
    out["eighth"], out["again"] = train(eighth, folder), train(eighth, folder, kernels=folder / "kernels")
    return out | {"figures": figures(out)}


def last(training: dict[str, Any]) -> float:
    """Return the last point of a training's curve, in bits per byte; infinity if it is no number."""
    bits = training["points"][-1]["bits_per_byte"]
    return bits if math.isfinite(bits) else math.inf


def reached_s(points: list[dict[str, float]], loss: float) -> float | None:
    """Return the seconds at which a curve first comes to a loss, or None if it never does.

    Between two points it is taken as straight; it bends downwards early, so the true time is rather earlier. Before the first
    point nothing is known, and its time is returned.
    """
    before = None
    for point in points:
        if point["bits_per_byte"] <= loss:
            if before is None:
                return point["seconds"]
            part = (before["bits_per_byte"] - loss) / (before["bits_per_byte"] - point["bits_per_byte"])
            return before["seconds"] + part * (point["seconds"] - before["seconds"])
        before = point
    return None


def figures(found: dict[str, Any]) -> dict[str, Any]:
    """Return what the trainings come to."""
    peer, ours, eighth = found["peer"], found["ours"], found["eighth"]
    reached = reached_s(ours["points"], last(peer))
    return {
        "peer_seconds": peer["seconds"],
        "peer_bits_per_byte": {split: peer[split] for split in ("val", "test")},
        "ours_bits_per_byte": {split: ours[split] for split in ("val", "test")},
        "eighth_bits_per_byte": {split: eighth[split] for split in ("val", "test")},
        "eighth_seconds": eighth["seconds"],
        "eighth_reaches_the_peer": {split: eighth[split] <= peer[split] for split in ("val", "test")},
        "again_bits_per_byte": {split: found["again"][split] for split in ("val", "test")},
        "reached_s": reached,
        "times_sooner": None if reached is None else peer["seconds"] / reached,
        "functions": ours["functions"],
    }


def markdown(results: dict[str, Any]) -> str:
    """Return the final table, and what must be said to it."""
    from machine import phrase

    found, peer, ours = results["figures"], results["peer"], results["ours"]
    head = "| training | s | compiling, s | steps | tokens | parameters | validation | test |"
    lines = [head, "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    names = {
        "peer": f"GPT-2, AdamW at {peer['lr']:g}",
        "eighth": "ours, an eighth of the time",
        "again": "the same, with the kernels of ours",
        "ours": "ours",
    }
    for key, name in names.items():
        t = results[key]
        way = f"{t['precision']}, {'compiled' if t['compiled'] else 'eager'}"
        lines.append(
            f"| {name} ({way}) | {t['seconds']:.0f} | {t['compile_s']:.0f} | {t['steps']:,} | {t['tokens'] / 1e6:.2f}M | "
            f"{t['parameters'] / 1e6:.2f}M | {t['val']:.4f} | {t['test']:.4f} |"
        )
    if found["reached_s"] is None:
        reached = "ours never came to the peer's last loss"
    else:
        reached = f"ours came to the peer's last loss after {found['reached_s']:.0f} s, {found['times_sooner']:.1f} times sooner"
    yes = "is as good as" if found["eighth_reaches_the_peer"]["test"] else "is not as good as"
    of_val, of_test = (ours["functions"][split] for split in ("val", "test"))
    tried = ", ".join(f"{last(t):.4f} at {t['lr']:g}" for t in results["trials"])
    notes = [
        "bits per byte; validation and test are whole splits, the second read for this table only",
        f"{reached}, by the curves",
        f"a run of ours whose whole schedule takes an eighth of the time {yes} the peer on the test split; "
        f"with the kernels of ours in the cache it {'is' if results['again']['test'] <= peer['test'] else 'is not'}",
        f"{of_test['passes']} of {of_test['samples']} functions compile that ours wrote to signatures of the test split "
        f"(validation: {of_val['passes']} of {of_val['samples']})",
        f"learning rates of the peer, each {results['trials'][0]['seconds']:.0f} s: {tried}",
        f"on {phrase(results['machine'])}; data {results['data']}",
    ]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def drawing(results: dict[str, Any]) -> Figure:
    """Draw the curves against time on a log scale, the peer's last loss, and where ours came to it."""
    import numpy as np
    from machine import phrase
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    from kindling.plots.figures import line_style, new_figure, style

    peer, found = results["peer"], results["figures"]
    end, level = peer["points"][-1]["seconds"], last(peer)
    with style():
        figure = new_figure(
            8.4, 5.2, "Bits per byte on held-out Python against training time", phrase(results["machine"])
        )
        ax = figure.subplots()
        names = {
            "peer": f"GPT-2 {peer['shape']}, AdamW, cosine",
            "ours": "ours",
            "eighth": "ours, all in an eighth of the time",
        }
        for number, (key, name) in enumerate(names.items()):
            points = results[key]["points"]
            x, y = (np.array([p[field] for p in points]) for field in ("seconds", "bits_per_byte"))
            ax.plot(x, y, label=f"{name}: {y[-1]:.3f} after {x[-1]:.0f} s", linewidth=1.6, **line_style(number))
        ax.axhline(level, color="0.45", linestyle=(0, (5, 4)), linewidth=1, zorder=0)
        if found["reached_s"] is not None:
            look = {"arrowstyle": "-|>", "color": "0.25", "linewidth": 1.4, "shrinkA": 6, "shrinkB": 0}
            ax.annotate("", (found["reached_s"], level), (end, level), arrowprops=look)
            text = f"the peer's last loss {found['times_sooner']:.1f} times sooner, after {found['reached_s']:.0f} s"
            ax.annotate(text, (end, level), (0, -5), textcoords="offset points", ha="right", va="top")
        ax.set_xscale("log")
        first = min(results[key]["points"][0]["seconds"] for key in names)
        ax.set_xlim(0.85 * first, 1.15 * end)
        ticks = [n * 10**k for k in range(-1, 5) for n in (1, 2, 5) if 0.85 * first <= n * 10**k <= 1.15 * end]
        ticks = [t for t in ticks if not 0.75 * end < t < 1.3 * end] + [round(end)]
        ax.xaxis.set_major_locator(FixedLocator(ticks))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xticklabels([f"{t:g}" for t in ticks])
        ax.set_xlabel("seconds of training, compiling included (log scale)")
        ax.set_ylabel("bits per byte, validation files")
        ax.legend(frameon=False, loc="upper right")
        return figure


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="of training, for the peer and for ours; by default 5")
    parser.add_argument(
        "--quick", action="store_true", help="half a minute and one learning rate, to see that it works"
    )
    parser.add_argument("--thorough", action="store_true", help="each learning rate gets the whole time")
    parser.add_argument("--rates", type=float, nargs="+", help=f"of the peer; by default {', '.join(map(str, RATES))}")
    parser.add_argument("--peer-shape", default="", help="layers x width of the peer, such as 6x256; else ours")
    parser.add_argument("--peer-batch", type=int, default=8, help="rows in a step of the peer")
    parser.add_argument("--peer-way", help="fp32-eager, fp32-compiled, bf16-eager or bf16-compiled; else the fastest")
    parser.add_argument("--data", type=Path, help="a folder of shards; else built from this machine's Python")
    parser.add_argument(
        "--results", type=Path, help=f"the folder for the results; {RESULTS.relative_to(ROOT)}, but --quick"
    )
    flags = parser.parse_args()
    flags.minutes = flags.minutes or (0.5 if flags.quick else 5.0)
    flags.rates = tuple(flags.rates or (RATES[1:2] if flags.quick else RATES))
    flags.results = flags.results or (None if flags.quick else RESULTS)
    if flags.minutes <= 0 or flags.peer_batch < 1 or min(flags.rates) <= 0:
        parser.error("--minutes and --rates must be above 0 and --peer-batch at least 1")
    if flags.peer_shape and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", flags.peer_shape):
        parser.error(f"--peer-shape must be LAYERSxWIDTH, such as 6x256, but is {flags.peer_shape!r}")
    if flags.peer_way and not re.fullmatch(r"(fp32|bf16)-(eager|compiled)", flags.peer_way):
        parser.error(
            f"--peer-way must be a precision and eager or compiled, such as fp32-eager, but is {flags.peer_way!r}"
        )
    if flags.data and not (flags.data / "manifest.json").is_file():
        parser.error(f"--data must be a folder of shards with a manifest.json, but {flags.data} is not")
    return flags


def main() -> None:
    flags = parse()
    from machine import Watch

    from kindling.data.build import prepare
    from kindling.files import write_atomic, write_json
    from presets import preset

    began, watch = time.perf_counter(), Watch()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if flags.data:
            data = flags.data.resolve()
        else:
            with contextlib.chdir(folder):
                data = prepare(preset("demo")).resolve()
        layers, width = map(int, flags.peer_shape.split("x")) if flags.peer_shape else (0, 0)
        base = Spec("ours", str(data), flags.minutes, [], batch=flags.peer_batch, layers=layers, width=width)
        results = race(base, flags.rates, flags.thorough, flags.peer_way, folder)
    results = {"machine": watch.describe(), "data": data.name, "seconds": time.perf_counter() - began, **results}
    table = markdown(results)
    print(f"\n{table}")
    if flags.results is None:
        print("nothing is written: give --results FOLDER to keep what --quick finds")
        return
    from kindling.plots.figures import png

    flags.results.mkdir(parents=True, exist_ok=True)
    write_json(flags.results / "time_to_loss.json", results)
    write_atomic(flags.results / "time_to_loss.md", table)
    partial = flags.results / ".time_to_loss.png.partial"
    partial.write_bytes(png(drawing(results)))
    partial.replace(flags.results / "time_to_loss.png")
    print(f"written to {flags.results}: time_to_loss.json, time_to_loss.md, time_to_loss.png")


if __name__ == "__main__":
    from kindling.cli import run_script

    run_script(main)

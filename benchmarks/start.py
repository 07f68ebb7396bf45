"""Measure how long `python main.py` takes from its start to the end of its first step, with the shards there.

    python benchmarks/start.py                  # 3 minutes; see that nothing else runs

The demo's data are built once; then the command is started as a user does, and ended after its first step: with an empty cache
of compiled code (the first run on a machine), with what that left there (every later run), and with `--train.compile off`.
Writes benchmarks/results/local/start.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]


def has_a_step(metrics: Path) -> bool:
    """Return whether a step is logged; the untrained model's validation is logged before it."""
    return metrics.is_file() and '"loss"' in metrics.read_text(encoding="utf-8")


def first_step_s(folder: Path, cache: Path, *flags: str) -> float:
    """Start the demo in `folder`, and return the seconds until its first step is logged."""
    run = folder / "runs" / "start"
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, str(ROOT / "main.py"), "--name", "start", "--train.log-every", "1", *flags]
    started = time.perf_counter()
    with subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not has_a_step(run / "metrics.jsonl"):
            if process.poll() is not None:
                sys.exit(f"main.py ended with {process.returncode}: {process.stderr.read()}")
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        process.kill()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=3, help="of each kind but the first")
    flags = parser.parse_args()
    from machine import Watch, phrase, results_file

    watch = Watch()
    with tempfile.TemporaryDirectory() as name:
        folder, cache = Path(name), Path(name, "cache")
        build = [sys.executable, str(ROOT / "data_pipeline.py"), "--preset", "demo"]
        subprocess.run(build, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = {"compiled, nothing cached": [first_step_s(folder, cache)]}
        seconds["compiled, from the cache"] = [first_step_s(folder, cache) for _ in range(flags.starts)]
        off = "--train.compile", "off"
        seconds["not compiled"] = [first_step_s(folder, cache, *off) for _ in range(flags.starts)]
    results = {"machine": watch.describe(), "seconds": seconds}
    path = results_file("start.json")
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for kind, found in seconds.items():
        print(f"{kind}: {statistics.median(found):.1f} s to the first step ({', '.join(f'{s:.1f}' for s in found)})")
    print(f"{phrase(results['machine'])}; written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    from kindling.cli import run_script

    run_script(main)

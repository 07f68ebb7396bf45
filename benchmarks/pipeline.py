"""Measure what the README promises of the pipeline, on this machine.

    python benchmarks/pipeline.py            # about 8 minutes on two cores; see that nothing else runs

Runs the real scripts in an empty folder: the demo from files to samples, the data pipeline alone with two workers, one
step of code-50m with its memory, and the logits against transformers. Writes `benchmarks/results/local/pipeline.json`
and the same as a Markdown table.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import results_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def run(name: str, *args: str, cwd: str) -> tuple[str, float, float]:
    """Run a script; return what it printed, its seconds, and its peak resident memory in GiB."""
    started = time.perf_counter()
    log = Path(cwd) / "log.txt"
    with open(log, "w", encoding="utf-8") as f:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / name), *args], cwd=cwd, stdout=f, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
    out = log.read_text(encoding="utf-8")
    if status:
        sys.exit(f"{name} {' '.join(args)} failed:\n{out}")
    return out, time.perf_counter() - started, usage.ru_maxrss / 2**20


def demo(cwd: str) -> dict[str, float | str]:
    """Train the demo as `make run` does, watching for its first step."""
    started = time.perf_counter()
    log = open(Path(cwd) / "log.txt", "w", encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), "--train.log-every", "1"], cwd=cwd, stdout=log, stderr=subprocess.STDOUT
    )
    metrics, first = Path(cwd) / "runs/demo/metrics.jsonl", None
    while process.poll() is None:
        if first is None and metrics.is_file() and '"loss"' in metrics.read_text(encoding="utf-8"):
            first = time.perf_counter() - started
        time.sleep(0.1)
    total = time.perf_counter() - started
    log.close()
    out = (Path(cwd) / "log.txt").read_text(encoding="utf-8")
    if process.returncode or first is None:
        sys.exit(out)
    lines = [json.loads(x) for x in metrics.read_text(encoding="utf-8").splitlines()]
    return {
        "first training step after, s": first,
        "whole run, s": total,
        "validation bits per byte": [x["val_bits_per_byte"] for x in lines if "val_bits_per_byte" in x][-1],
        "tokens/s, median": statistics.median(x["tokens_per_s"] for x in lines if "tokens_per_s" in x),
    }


def data_speed() -> float:
    """Return the median MB/s of three builds of the demo's data with two workers, tokenizer training included."""
    speeds = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as cwd:
            out, _, _ = run("data_pipeline.py", "--data.workers", "2", cwd=cwd)
            speeds.append(float(re.search(r"([\d.]+) MB/s from files to shards", out)[1]))
    return statistics.median(speeds)


def logits_difference() -> dict[str, float]:
    """Return the largest difference of logits from transformers', over tied and untied, multi-head and grouped-query."""
    from dataclasses import replace

    import torch
    from test_model import SEEDS, as_gpt2, as_llama, randomise, tokens

    from model import GPT

    worst = {"GPT-2": 0.0, "Llama": 0.0}
    for name, base, convert in (("GPT-2", "code-50m", as_gpt2), ("Llama", "smallcoder-1", as_llama)):
        for tied in (True, False):
            for n_kv_head in (4,) if name == "GPT-2" else (4, 2, 1):
                cfg = replace(SEEDS[base], tie_embeddings=tied, n_kv_head=n_kv_head)
                model = randomise(GPT(cfg)).eval()
                with torch.no_grad():
                    difference = (model(tokens(cfg)) - convert(model)(tokens(cfg)).logits).abs().max().item()
                worst[name] = max(worst[name], difference)
    return {f"largest logit difference from {name}": value for name, value in worst.items()}


def main() -> None:
    figures: dict[str, float | str] = {"machine": f"{os.cpu_count()} cores, Python {platform.python_version()}"}
    figures["files to shards, MB/s, two workers"] = data_speed()
    with tempfile.TemporaryDirectory() as cwd:
        figures |= demo(cwd)
        _, seconds, _ = run("main.py", cwd=cwd)
        figures["the same command again, s"] = seconds
        _, _, memory = run(
            "main.py",
            "--preset",
            "code-50m",
            "--dry-run",
            "--train.batch-size",
            "4",
            "--train.micro-batch-size",
            "4",
            cwd=cwd,
        )
        figures["code-50m, step of 4 x 1024, peak process memory, GiB"] = memory
    figures |= logits_difference()
    results_file("pipeline.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    table = "| figure | measured |\n| --- | ---: |\n" + "".join(
        f"| {name} | {value if isinstance(value, str) else f'{value:.3g}' if value < 100 else f'{value:,.0f}'} |\n"
        for name, value in figures.items()
    )
    results_file("pipeline.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    from kindling.cli import run_script

    run_script(main)

"""Measures the evaluation: sandboxed programs a minute, and generation in batches beside one prompt at a time.

    python benchmarks/evaluation.py [RUN]

Programs are the 164 reference solutions of HumanEval, 20 times each, with 1, 2 and 4 workers; verdicts must be the same.
Without RUN the model is one of the demo preset's shape with random weights, which costs the same time. Generation is greedy,
without end of text, and alternates between the ways. Writes `evaluation.json` into
`benchmarks/results/local/`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

from machine import results_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kindling.evaluation.check_correctness import Verdict, check_answers
from kindling.evaluation.tasks import Problem, load
from kindling.pool import map_jobs

ROUNDS, NEW_TOKENS, BATCH = 3, 64, 32


def reference(problem: Problem, slot: int) -> Verdict:
    """Judge a problem's own solution."""
    return check_answers(problem, problem.solution, slot=slot)


def sandbox_seconds(n_workers: int, times: int) -> tuple[float, list[Verdict]]:
    """Return how long all reference solutions take, so many times each, and their verdicts."""
    jobs = [problem for problem in load("humaneval") for _ in range(times)]
    started = time.perf_counter()
    verdicts = list(map_jobs(reference, jobs, n_workers, 60.0))
    return time.perf_counter() - started, verdicts


def generation(path: str | None) -> dict[str, float]:
    """Return tokens a second, by one prompt at a time and in batches, medians of alternating rounds."""
    import torch

    from kindling.generation.decoding import stream_batch
    from kindling.generation.sampling import Sampling
    from kindling.runs.loading import find_run, load_model
    from model import build_model
    from presets import preset

    torch.manual_seed(0)
    if path is None:
        model = build_model(preset("demo").model).eval()
    else:
        model, _ = load_model(find_run(Path(path)), torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, model.cfg.vocab_size, (64,), generator=generator).tolist() for _ in range(BATCH)]
    greedy = Sampling(max_new_tokens=NEW_TOKENS, greedy=True)
    rates: dict[int, list[float]] = {1: [], BATCH: []}
    texts = {}
    for _ in range(ROUNDS):
        for n_rows in rates:
            some = prompts if n_rows == BATCH else prompts[:8]
            started = time.perf_counter()
            rows = [row for row in stream_batch(model, some, greedy, -1, n_rows=n_rows) if row.ended]
            texts[n_rows] = [row.out for row in sorted(rows, key=lambda row: row.number)]
            rates[n_rows].append(sum(map(len, texts[n_rows])) / (time.perf_counter() - started))
    one, many = (statistics.median(rates[n]) for n in (1, BATCH))
    same = sum(a == b for a, b in zip(texts[1], texts[BATCH]))
    return {
        "tokens_s_at_1": one,
        "tokens_s_at_32": many,
        "ratio": many / one,
        "same_texts": same,
        "of_texts": len(texts[1]),
    }


def main() -> None:
    """Measure, print, and write."""
    results: dict[str, object] = {"generation": generation(sys.argv[1] if len(sys.argv) > 1 else None)}
    print(results["generation"], flush=True)
    seconds, verdicts = sandbox_seconds(2, 20)
    results["sandbox"] = {
        "programs": len(verdicts),
        "seconds_2_workers": seconds,
        "passed": sum(v.verdict == "passed" for v in verdicts),
    }
    print(results["sandbox"], flush=True)
    found = {n: sandbox_seconds(n, 2) for n in (1, 2, 4)}
    results["workers"] = {str(n): {"programs": len(v), "seconds": s} for n, (s, v) in found.items()}
    results["same_verdicts"] = found[1][1] == found[2][1] == found[4][1]
    print(results["workers"], "same verdicts:", results["same_verdicts"])
    results_file("evaluation.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from kindling.cli import run_script

    run_script(main)

"""Grades the samples of an earlier evaluation, which may have been made on a machine without a sandbox.

python evaluate.py runs/demo --sandbox later        # there: the samples are written, none is run
python evaluate.py runs/demo --grade                # here: they are run, and the results are added

Whether a sample compiles was said there, by that machine's Python (`syntax` in eval.json, `compiles` in samples.jsonl), and
stays as it is. Verdicts are this machine's, and `functional` in eval.json names its Python.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kindling.evaluation.check_correctness import check_samples
from kindling.evaluation.code_eval import functional_figures, verdict_columns
from kindling.evaluation.references import left_out_problems
from kindling.evaluation.results_file import ResultsError, file_name, read_results, save_results
from kindling.evaluation.samples import ChatFormat, Sample
from kindling.evaluation.tasks import FILES, Problem, load, source_of
from kindling.files import write_atomic
from kindling.sandbox.process import Mode

if TYPE_CHECKING:
    from config import EvalConfig
    from kindling.evaluation.intervals import LossLines
    from kindling.evaluation.report import Results

Line = dict[str, Any]


def grade_written(
    run: Path,
    split: str,
    chat: ChatFormat | None,
    mode: Mode,
    cfg: EvalConfig,
    progress: Callable[[int], object] | None = None,
) -> tuple[Results, LossLines, list[str]]:
    """Run the samples of benchmarks in a run's samples.jsonl. Return the results with them, and the names of the files written.

    Verdicts go to samples.jsonl, figures to eval.json and eval.md. The benchmarks are read from the files of `cfg`, which must
    be those that the samples were made for. `progress` is called after each sample. Raises ResultsError if there are no such
    samples, or a problem is not in its benchmark.
    """
    results, losses = read_results(run, split)
    path = run / file_name("samples.jsonl", split)
    lines = read_samples(path)
    places = [i for i, line in enumerate(lines) if line["benchmark"] in FILES]
    if not places:
        raise ResultsError(
            f"{path} must hold samples of a benchmark, but holds none; write some with `python evaluate.py {run} --sandbox later`"
        )
    samples = rebuild([lines[i] for i in places], path, cfg)
    asked: dict[str, dict[str, Problem]] = {}
    for s in samples:
        asked.setdefault(s.problem.benchmark, {})[s.problem.task_id] = s.problem
    left_out = left_out_problems({name: list(tasks.values()) for name, tasks in asked.items()}, mode, cfg)
    graded = check_samples(samples, chat, mode, cfg, progress)
    for i, g in zip(places, graded):
        lines[i] |= verdict_columns(g) | {"program": g.program}
    skipped = {name: part for name, part in results.get("functional", {}).items() if _is_skipped(part)}
    results["functional"] = functional_figures(samples, graded, list(asked), mode, left_out) | skipped
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=True) + "\n" for line in lines))
    return results, losses, [*save_results(run, results, losses), path.name]


def _is_skipped(part: Any) -> bool:
    """Return whether a benchmark's prompts did not fit into the context, so that it has no samples."""
    return isinstance(part, dict) and "skipped" in part


def read_samples(path: Path) -> list[Line]:
    """Return the lines of a samples.jsonl. Raises ResultsError if it cannot be read."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as e:
        raise ResultsError(
            f"{path} must be as evaluate.py writes it, but cannot be read ({e}); evaluate the run again"
        ) from None


def rebuild(lines: list[Line], path: Path, cfg: EvalConfig) -> list[Sample]:
    """Return the samples of these lines of `path`, each with its problem. Raises ResultsError if a problem is not known."""
    problems: dict[tuple[str, str], Problem] = {}
    for name in dict.fromkeys(line["benchmark"] for line in lines):
        problems |= {(name, problem.task_id): problem for problem in load(name, source_of(name, cfg))}
    samples = []
    for line in lines:
        problem = problems.get((line["benchmark"], line["task_id"]))
        if problem is None:
            raise ResultsError(
                f"{path} must be of problems that are in their benchmarks, but {line['task_id']} is not in {line['benchmark']}; "
                f"name the file that it is in with --eval.humaneval or --eval.mbpp"
            )
        samples.append(Sample(problem, line["sample"], line["text"], [], line["cut_short"], line["prompt_cropped"]))
    return samples

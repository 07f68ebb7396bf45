"""Runs the reference solutions of a problem file, before any model is asked.

    left_out = left_out_problems({"humaneval": problems}, "bwrap", cfg)
    left_out["humaneval"]["HumanEval/9"]     # why its reference does not pass

A problem whose reference does not pass would count against every model. It is left out, and the run says so. The references of
`problems/` pass by the project's own tests and are not run again; those of other files are, each time. That costs one sample for
each problem. A stored result would be out of date when Python, a limit or the sandbox changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from kindling.evaluation.check_correctness import Verdict, check_answers, program_limits
from kindling.evaluation.tasks import Problem, TaskError, source_of
from kindling.pool import FailedJob, map_jobs
from kindling.sandbox.process import START_S, Limits, Mode

if TYPE_CHECKING:
    from config import EvalConfig


def left_out_problems(
    problems: Mapping[str, Sequence[Problem]], mode: Mode, cfg: EvalConfig
) -> dict[str, dict[str, str]]:
    """Return the problems whose reference does not pass, by benchmark and task, with the reason.

    Only of benchmarks that the settings read from elsewhere. Raises TaskError if no reference of a benchmark passes.
    """
    limits, found = program_limits(cfg), {}
    for name, asked in problems.items():
        if source_of(name, cfg) is None:
            continue
        whole = {problem.of: problem for problem in asked}  # lines to be filled in have one reference together
        jobs = map_jobs(
            partial(_run, mode=mode, limits=limits), whole.values(), cfg.n_workers, limits.wall_s + START_S + 10
        )
        results = {task: _reason(result) for task, result in zip(whole, jobs)}
        reasons = {problem.task_id: results[problem.of] for problem in asked}
        found[name] = {task: reason for task, reason in reasons.items() if reason}
        if asked and len(found[name]) == len(asked):
            task, reason = next(iter(found[name].items()))
            raise TaskError(
                f"{source_of(name, cfg)} must hold problems whose references pass their tests, but none does ({task}: {reason}); "
                f"correct --eval.{name.partition('-')[0]}"
            )
    return found


def _run(problem: Problem, slot: int, mode: Mode, limits: Limits) -> Verdict:
    return check_answers(problem, problem.solution, mode, limits, slot)


def _reason(result: Verdict | FailedJob) -> str:
    """Return why a reference does not pass, or an empty text."""
    if isinstance(result, FailedJob):
        return f"its reference ends in {result.reason}"
    if result.verdict == "passed":
        return ""
    if result.verdict == "sandbox":
        return f"it cannot be asked across the sandbox: {result.reason}"
    return f"its reference ends in {result.verdict}: {result.reason}"

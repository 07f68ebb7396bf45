"""Checks whether samples solve their problems: programs run in the sandbox, and their answers are compared here.

    graded = check_samples(samples, chat, "bwrap", cfg)
    verdict, reason = check_answers(problem, program)

The tests and the expected values stay in this process. Where a test calls a function of the program, only the arguments go
into the sandbox and only values come back. So a program cannot see the expected values or claim that it passed. Limit: it can
change its arguments, as any function can. A test that compares with an argument after the call (`f(x) == sorted(x)`) compares
with what the program has left of it.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from kindling.data.filters import syntax_error
from kindling.evaluation.answer_extraction import extract_from_answer
from kindling.evaluation.extraction import extract_from_completion, is_empty, is_trivial
from kindling.evaluation.samples import ChatFormat, Sample
from kindling.evaluation.tasks import Problem
from kindling.output import wants_color
from kindling.pool import FailedJob, map_jobs
from kindling.sandbox.arguments import NotPlain
from kindling.sandbox.bubblewrap import SandboxError
from kindling.sandbox.process import DEFAULT, START_S, Limits, Mode, Program, ProgramError, one_line

if TYPE_CHECKING:
    from config import EvalConfig

When = Mode | Literal["later"]
"""How programs are run; later: they are only compiled now."""
VERDICTS = ("passed", "wrong", "exception", "timeout", "memory", "syntax", "sandbox")


class Verdict(NamedTuple):
    """The verdict on a program, one of VERDICTS, and the reason."""

    verdict: str
    reason: str = ""


@dataclass(frozen=True)
class GradedSample:
    """The verdict on a sample."""

    program: str
    verdict: str
    reason: str
    compiles: bool
    """It compiles and has a statement that the model wrote."""
    non_trivial: bool
    """It also has a statement other than a docstring, `pass`, `...` or NotImplementedError."""


def program_limits(cfg: EvalConfig) -> Limits:
    """Return the limits of each program."""
    return Limits(cfg.cpu_s, 2.0 * cfg.cpu_s + 8, cfg.memory_mb * 2**20)


def sandbox_refusal(mode: When, cfg: EvalConfig) -> str | None:
    """Return why no program can be run here, or None. Warn if programs will run without a sandbox."""
    from kindling.sandbox.self_test import self_test

    if mode == "later" or not cfg.n_samples:
        return None
    try:
        self_test(mode, program_limits(cfg))
    except SandboxError as e:
        return str(e)
    if mode == "none":
        warning = "warning: generated code runs WITHOUT A SANDBOX and can do whatever you can"
        print(f"\033[31;1m{warning}\033[0m" if wants_color(sys.stderr) else warning, file=sys.stderr)
    return None


def check_samples(
    samples: Sequence[Sample],
    chat: ChatFormat | None,
    mode: When,
    cfg: EvalConfig,
    progress: Callable[[int], object] | None = None,
) -> list[GradedSample]:
    """Return the verdict of `check_sample`, in worker processes, on each sample, in their order.

    The same text for the same problem is judged once.
    """
    limits = program_limits(cfg)
    unique = {_key(sample): sample for sample in samples}
    grade_one = partial(check_sample, is_answer=chat is not None, mode=mode, limits=limits)
    results: dict[tuple[str, str, str, bool], GradedSample] = {}
    # in worker processes, in the same order; a FailedJob for one that kills its process or hangs
    jobs = map_jobs(grade_one, unique.values(), cfg.n_workers, limits.wall_s + START_S + 10)
    for (key, sample), result in zip(unique.items(), jobs):
        if isinstance(result, FailedJob):  # the text, or an answer, killed the worker process
            verdict = "timeout" if result.reason == "timeout" else "exception"
            result = GradedSample(sample.text, verdict, f"while judging it: {result.reason}", False, False)
        results[key] = result
        if progress is not None:
            progress(1)
    return [results[_key(sample)] for sample in samples]


def _key(sample: Sample) -> tuple[str, str, str, bool]:
    """Return everything in a sample that its verdict depends on."""
    return sample.problem.benchmark, sample.problem.task_id, sample.text, sample.cut_short


def check_sample(sample: Sample, slot: int, is_answer: bool, mode: When, limits: Limits) -> GradedSample:
    """Extract the program from a sample, compile it, and check its answers if its problem has tests.

    `is_answer`: the sample answers an instruction, rather than continuing the prompt. Call this in a worker (pool.map_jobs),
    because parsing untrusted text can kill the process.
    """
    problem = sample.problem
    head = problem.answer_head if is_answer else problem.head
    if problem.after is not None:
        program = problem.head + sample.text + problem.after
    else:
        cut = extract_from_answer if is_answer else extract_from_completion
        program = cut(head, sample.text, problem.entry_point, sample.cut_short)
    error = syntax_error(program)
    if error is not None:
        return GradedSample(program, "syntax", error, False, False)
    verdict = Verdict("")
    if problem.tests and mode != "later":
        verdict = check_answers(problem, program, mode, limits, slot)
    name = problem.entry_point
    return GradedSample(program, *verdict, not is_empty(program, head, name), not is_trivial(program, name))


def check_answers(
    problem: Problem, program: str, mode: Mode = "bwrap", limits: Limits = DEFAULT, slot: int = 0
) -> Verdict:
    """Run the problem's tests against a program. Every failure is a verdict; only Ctrl-C raises."""
    module = ModuleType("tests_of_problem")
    sys.modules[module.__name__] = module  # where dataclasses look up the names in their types
    scope = module.__dict__
    try:
        exec(_compiled(problem.trusted), scope)
        with Program(program, mode, limits, slot, own_classes(scope, problem)) as loaded:
            scope |= {name: loaded.function(name) for name in problem.remote}
            random.seed(0)  # some tests use random arguments
            try:
                exec(_compiled(problem.tests), scope)
            except BaseException:
                if loaded.failure is None:
                    raise
            if loaded.failure is not None:  # also if the test has caught it
                raise loaded.failure
    except ProgramError as e:
        return Verdict(e.kind, e.reason)
    except (SandboxError, NotPlain) as e:
        return Verdict("sandbox", str(e))
    except KeyboardInterrupt:
        raise
    except BaseException as e:
        raised = getattr(e, "of_program", None)
        if isinstance(raised, ProgramError):
            return Verdict(raised.kind, raised.reason)
        if isinstance(e, AssertionError):
            return Verdict("wrong", "a test failed")
        # the test cannot compare an answer of this type
        said = type(e).__name__
        with contextlib.suppress(Exception, ProgramError):  # its text may be asked of the program, which has ended
            said += f": {e}"
        return Verdict("wrong", one_line(f"an answer does not fit its test ({said})"))
    return Verdict("passed")


def own_classes(scope: dict[str, Any], problem: Problem) -> dict[str, type]:
    """Return the classes that the problem gives to its tests and to programs, by name; not those that a program is to write."""
    return {
        name: value
        for name, value in scope.items()
        if isinstance(value, type) and value.__module__ == scope["__name__"] and name not in problem.remote
    }


@lru_cache(maxsize=2048)
def _compiled(source: str) -> CodeType:
    return compile(source, "<tests>", "exec", dont_inherit=True)

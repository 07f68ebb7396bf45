"""Decides whether a program solves a problem: the program runs in the sandbox, its answers are compared here.

    verdict, reason = judge(problem, program)

The tests and what they expect stay in this process; where they call the program's functions, only arguments go in and only
values come out. So a program cannot see what is expected of it, patch what compares, or say that it has passed: to pass, it
must give the right answers.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType
from typing import Any, NamedTuple

from kindling.data.filters import syntax_error
from kindling.evaluation.extraction import from_answer, from_completion, is_empty, is_trivial
from kindling.evaluation.tasks import Problem
from kindling.sandbox.bubblewrap import SandboxError
from kindling.sandbox.process import DEFAULT, Limits, Mode, Program, ProgramError, one_line

VERDICTS = ("passed", "wrong", "exception", "timeout", "memory", "syntax", "sandbox")


class Verdict(NamedTuple):
    """What came of a program, one of VERDICTS, and why."""

    verdict: str
    reason: str = ""


@dataclass(frozen=True)
class Sample:
    """What a model wrote for a problem, on its way to be judged."""

    problem: Problem
    text: str
    chat: bool
    """It answers an instruction, rather than continuing the prompt."""
    cut_short: bool
    """It was ended by a limit."""
    mode: Mode
    limits: Limits


@dataclass(frozen=True)
class Graded:
    """What came of a sample."""

    program: str
    verdict: str
    reason: str
    compiles: bool
    """It compiles, and has a statement of the model's own."""
    non_trivial: bool
    """And that is not only a docstring, `pass`, `...` or NotImplementedError."""


@lru_cache(maxsize=2048)
def _compiled(source: str) -> CodeType:
    return compile(source, "<tests>", "exec", dont_inherit=True)


def judge(problem: Problem, program: str, mode: Mode = "bwrap", limits: Limits = DEFAULT, slot: int = 0) -> Verdict:
    """Run the problem's tests against a program. Every failure is a verdict; only a Ctrl-C gets out."""
    try:
        with Program(program, mode, limits, slot) as loaded:

            def remote(name: str) -> Any:
                return lambda *args, **named: loaded.call(name, *args, **named)

            scope: dict[str, Any] = {"__name__": "tests"}
            exec(_compiled(problem.trusted), scope)
            scope |= {name: remote(name) for name in problem.remote}
            random.seed(0)  # some tests draw their arguments
            exec(_compiled(problem.tests), scope)
    except ProgramError as e:
        return Verdict(e.kind, e.reason)
    except SandboxError as e:
        return Verdict("sandbox", str(e))
    except AssertionError:
        return Verdict("wrong", "a test failed")
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # an answer of another kind than the test can compare
        return Verdict("wrong", one_line(f"an answer does not fit its test ({type(e).__name__}: {e})"))
    return Verdict("passed")


def grade(sample: Sample, slot: int = 0) -> Graded:
    """Cut the program out of a sample, compile it, and judge it where its problem has tests.

    To be called in a worker (pool.map_jobs), since the text is a stranger's.
    """
    problem = sample.problem
    head = problem.answer_head if sample.chat else problem.head
    if sample.chat:
        program = from_answer(head, sample.text, problem.entry_point, sample.cut_short)
    else:
        program = from_completion(head, sample.text, problem.entry_point, sample.cut_short)
    error = syntax_error(program)
    if error is not None:
        return Graded(program, "syntax", error, False, False)
    verdict = judge(problem, program, sample.mode, sample.limits, slot) if problem.tests else Verdict("")
    name = problem.entry_point
    return Graded(program, *verdict, not is_empty(program, head, name), not is_trivial(program, name))

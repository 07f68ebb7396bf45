import ast
import json
import shutil
import signal
from functools import partial

import pytest
from mutants import mutant
from test_extraction import NASTY

from config import EvalConfig
from kindling.evaluation import check_correctness, tasks
from kindling.evaluation.check_correctness import VERDICTS, GradedSample, check_answers, check_sample, check_samples
from kindling.evaluation.samples import ChatFormat, Sample
from kindling.evaluation.tasks import PROBLEMS, Problem, load
from kindling.pool import FailedJob, map_jobs
from kindling.sandbox.process import Limits

pytestmark = pytest.mark.usefixtures("forked_workers")

MODE = "bwrap" if shutil.which("bwrap") else "none"  # nothing but references and their mutants runs here
LIMITS = Limits(cpu_s=15, wall_s=90)  # the reference of MBPP/123 takes 3 s, on a slow machine 7
LIMIT_S = 90
OURS = load("problems")[30:]  # from level 1 on
GRADED_ROWS = [json.loads(line) for line in (PROBLEMS / "graded.jsonl").read_text(encoding="utf-8").splitlines()]


def sample(problem: Problem, number: int, text: str, cut_short: bool = False) -> Sample:
    return Sample(problem, number, text, [], cut_short, cropped=False)


def graded(texts: list[tuple[Problem, str]], chat: bool) -> list[GradedSample]:
    jobs = [sample(problem, 0, text) for problem, text in texts]
    grade_one = partial(check_sample, is_answer=chat, mode=MODE, limits=LIMITS)
    return list(map_jobs(grade_one, jobs, n_workers=2, limit_s=LIMIT_S))


def failures(texts: list[tuple[Problem, str]], chat: bool) -> list[str]:
    results = zip(texts, graded(texts, chat))
    return [f"{p.task_id}: {g}" for (p, _), g in results if not (isinstance(g, GradedSample) and g.verdict == "passed")]


def completion(problem: Problem) -> str:
    """Return the reference as a base model would write it, which does not stop there."""
    return problem.solution.removeprefix(problem.head).rstrip() + "\n\n\nprint('''\nand more\n"


def answer(problem: Problem) -> str:
    return f"Here it is:\n\n```python\n{problem.solution}\n```\nIt's right."


def all_of_mbpp(monkeypatch) -> list[Problem]:
    monkeypatch.setattr(tasks, "MBPP_TEST", range(1, 975))
    return load("mbpp")


@pytest.mark.parametrize("step", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_every_reference_passes(step):
    problems = [*load("humaneval")[::step], *load("problems")[::step]]
    assert failures([(p, completion(p)) for p in problems], chat=False) == []


@pytest.mark.parametrize("step", [36, pytest.param(12, marks=pytest.mark.slow)])
def test_references_pass_as_answers(step):
    problems = [*load("humaneval")[2::step], *load("problems")[2::step], *load("mbpp-3shot")[:: 4 * step]]
    assert failures([(p, answer(p)) for p in problems], chat=True) == []


@pytest.mark.slow
def test_every_reference_of_mbpp_passes(monkeypatch):
    problems = all_of_mbpp(monkeypatch)
    assert len(problems) == 974
    assert failures([(p, completion(p)) for p in problems], chat=False) == []


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_wrong_bodies_fail(step):
    texts = [(p, body) for p, row in zip(load("problems"), GRADED_ROWS) for body in row["wrong"][:2]][::step]
    passed = [(p.task_id, text) for (p, text), g in zip(texts, graded(texts, chat=False)) if g.verdict == "passed"]
    assert passed == []


@pytest.mark.parametrize("step", [40, pytest.param(18, marks=pytest.mark.slow)])
def test_trivial_bodies_fail_and_are_counted_as_such(step):
    problems = [*load("problems")[::step], *load("humaneval")[:: 2 * step]]
    failed = {"wrong", "exception"}
    expected = [
        ("    pass\n", failed, True),
        ("    # nothing\n", failed, False),
        ("    return (\n", {"syntax"}, False),
        ("", failed, False),
    ]
    cases = [(p, *row) for row in expected for p in problems]
    for (*_, verdicts, passes), g in zip(cases, graded([case[:2] for case in cases], chat=False), strict=True):
        assert g.verdict in verdicts, g
        assert (g.compiles, g.non_trivial) == (passes, False)


def plainly(job: tuple[Problem, str], slot: int) -> str:
    """Run a program and its tests in one namespace, as the benchmarks' own scripts do; no stranger wrote it."""
    problem, program = job
    scope: dict = {"__name__": "plain"}
    signal.setitimer(signal.ITIMER_PROF, 15)  # ends a mutant's loop after this CPU time, however busy the machine
    try:
        exec(compile(problem.trusted + program, "<program>", "exec"), scope)
        import random

        random.seed(0)
        exec(compile(problem.tests, "<tests>", "exec"), scope)
    except BaseException:
        return "failed"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return "passed"


def compare_mutants(problems: list[Problem]) -> tuple[list[str], int]:
    """Judge a mutant of each problem; return where a plain run of its tests says otherwise, and how many passed."""
    made = [mutant(p.solution, p.entry_point) for p in problems]
    jobs = [(p, program) for p, (program, _) in zip(problems, made)]
    judged = graded([(p, f"```python\n{program}```") for p, program in jobs], chat=True)
    plain = list(map_jobs(plainly, jobs, n_workers=2, limit_s=900))
    assert {g.verdict for g in judged} <= set(VERDICTS) - {"syntax", "sandbox"}
    different = []
    for p, (_, kind), g, result in zip(problems, made, judged, plain):
        passed = not isinstance(result, FailedJob) and result == "passed"
        if (g.verdict == "passed") != passed:
            different.append(f"{p.task_id} ({kind}): {g.verdict} {g.reason}, plainly {result}")
    return different, sum(g.verdict == "passed" for g in judged)


def test_mutants_fail_unless_no_test_sees_them():
    problems = [*load("humaneval")[1::32], *load("problems")[::20], *load("mbpp")[::120]]
    different, passed = compare_mutants(problems)
    assert different == [] and passed < len(problems) / 5


@pytest.mark.slow
def test_every_mutant_fails_unless_no_test_sees_it(monkeypatch):
    problems = [*load("humaneval"), *load("problems"), *all_of_mbpp(monkeypatch)]
    different, passed = compare_mutants(problems)
    print(f"{len(problems)} mutants, {passed} passed")
    assert different == [] and passed < len(problems) / 5


def test_a_mutant_is_one_change_and_always_the_same():
    for p in [*load("problems")[::2], *load("mbpp")[::20]]:
        program, kind = mutant(p.solution, p.entry_point)
        assert (program, kind) == mutant(p.solution, p.entry_point)
        assert ast.dump(ast.parse(program)) != ast.dump(ast.parse(p.solution)), kind


def test_a_sample_without_tests_is_only_compiled():
    p = OURS[0]
    prompt = Problem("syntax", "x", "add", p.prompt, p.prompt, "", "", "", "", ())
    (good, bad, empty) = graded([(prompt, "    return a\nx"), (prompt, "    return (\n"), (prompt, "")], chat=False)
    assert (good.verdict, good.compiles, good.non_trivial) == ("", True, True)
    assert (bad.verdict, bad.compiles) == ("syntax", False)
    assert (empty.compiles, empty.non_trivial) == (False, False)


def test_nasty_texts_are_verdicts_or_lost_and_nothing_else():
    p = OURS[0]
    jobs = [sample(p, 0, f"    {text}") for text in NASTY.values()]
    for is_answer in (False, True):
        grade_one = partial(check_sample, is_answer=is_answer, mode=MODE, limits=Limits(cpu_s=2))
        for job, result in zip(jobs, map_jobs(grade_one, jobs, n_workers=2, limit_s=LIMIT_S)):
            assert isinstance(result, FailedJob) or result.verdict != "passed", job.text[:50]


def test_verdicts_name_what_happened():
    p = OURS[0]
    for body, verdict in {
        "    return a + b\n": "passed",
        "    return a\n": "wrong",
        "    return a + \n": "syntax",
        "    raise AssertionError\n": "exception",
        "    return missing\n": "exception",
        "    return 'x' * 2**40\n": "memory",
        "    while True:\n        pass\n": "timeout",
    }.items():
        verdict_of = check_answers(p, p.head + body, MODE, Limits(cpu_s=1, wall_s=20))
        assert verdict_of.verdict == verdict, (body, verdict_of)


def test_each_text_is_judged_once_and_results_keep_their_order(monkeypatch):
    right, wrong = "    return a + b\n", "    return a\n"
    written = [
        sample(OURS[0], 0, wrong),
        sample(OURS[1], 0, right),  # of another problem it is another program
        sample(OURS[0], 1, right),
        sample(OURS[0], 2, wrong),
        sample(OURS[0], 3, right),
        sample(OURS[0], 4, right + "    x = (", cut_short=True),
        sample(OURS[0], 5, right + "    x = ("),
    ]
    jobs_seen = []
    real = check_correctness.map_jobs

    def counted(function, jobs, n_workers, limit_s):
        jobs_seen.extend(jobs)
        return real(function, jobs_seen, n_workers, limit_s)

    monkeypatch.setattr(check_correctness, "map_jobs", counted)
    told: list[int] = []
    found = check_samples(written, None, MODE, EvalConfig(workers=2), told.append)
    assert [g.verdict for g in found] == ["wrong", "exception", "passed", "wrong", "passed", "passed", "syntax"]
    assert len(jobs_seen) == 5 == sum(told)


def test_answers_are_judged_as_answers():
    text = "```python\ndef add(a, b):\n    return a + b\n```"
    (as_answer,) = check_samples([sample(OURS[0], 0, text)], ChatFormat("alpaca", False), MODE, EvalConfig(workers=2))
    (as_completion,) = check_samples([sample(OURS[0], 0, text)], None, MODE, EvalConfig(workers=2))
    assert (as_answer.verdict, as_completion.verdict) == ("passed", "syntax")


def test_what_is_lost_while_it_is_judged_is_a_verdict(monkeypatch):
    lost = [FailedJob("timeout"), FailedJob("crash"), FailedJob("MemoryError: ")]
    monkeypatch.setattr(check_correctness, "map_jobs", lambda *_: iter(lost))
    found = check_samples([sample(OURS[0], i, str(i)) for i in range(3)], None, MODE, EvalConfig(workers=2))
    assert [g.verdict for g in found] == ["timeout", "exception", "exception"]
    assert [g.reason for g in found] == [f"while judging it: {one.reason}" for one in lost]
    assert not any(g.compiles or g.non_trivial for g in found)

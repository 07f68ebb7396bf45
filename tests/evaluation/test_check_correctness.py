import ast
import json
import shutil

import pytest
from mutants import mutant
from test_extraction import NASTY

from kindling.evaluation import tasks
from kindling.evaluation.check_correctness import VERDICTS, Graded, Sample, grade, judge
from kindling.evaluation.tasks import PROBLEMS, Problem, load
from kindling.pool import Lost, map_jobs
from kindling.sandbox.process import Limits

MODE = "bwrap" if shutil.which("bwrap") else "none"  # nothing but references and their mutants runs here
LIMITS = Limits(cpu_s=6, wall_s=60)  # the reference of MBPP/123 takes 3 s
LIMIT_S = 90
GRADED_ROWS = [json.loads(line) for line in (PROBLEMS / "graded.jsonl").read_text(encoding="utf-8").splitlines()]


def grade_all(texts: list[tuple[Problem, str]], chat: bool) -> list[Graded]:
    jobs = [Sample(problem, text, chat, False, MODE, LIMITS) for problem, text in texts]
    return list(map_jobs(grade, jobs, n_workers=2, limit_s=LIMIT_S))


def failures(texts: list[tuple[Problem, str]], chat: bool) -> list[str]:
    results = zip(texts, grade_all(texts, chat))
    return [f"{p.task_id}: {g}" for (p, _), g in results if not (isinstance(g, Graded) and g.verdict == "passed")]


def completion(problem: Problem) -> str:
    """Return the reference as a base model would write it, which does not stop there."""
    return problem.solution.removeprefix(problem.head).rstrip() + "\n\n\nprint('''\nand more\n"


def answer(problem: Problem) -> str:
    return f"Here it is:\n\n```python\n{problem.solution}\n```\nIt's right."


def all_of_mbpp(monkeypatch) -> list[Problem]:
    monkeypatch.setattr(tasks, "MBPP_TEST", range(1, 975))
    return load("mbpp")


def test_every_reference_passes():
    problems = [*load("humaneval"), *load("problems")]
    assert failures([(p, completion(p)) for p in problems], chat=False) == []


def test_references_pass_as_answers():
    problems = [*load("humaneval")[::6], *load("problems")[::6], *load("mbpp-3shot")[::25]]
    assert failures([(p, answer(p)) for p in problems], chat=True) == []


@pytest.mark.slow
def test_every_reference_of_mbpp_passes(monkeypatch):
    problems = all_of_mbpp(monkeypatch)
    assert len(problems) == 974
    assert failures([(p, completion(p)) for p in problems], chat=False) == []


def test_wrong_bodies_fail():
    texts = [(p, body) for p, row in zip(load("problems"), GRADED_ROWS) for body in row["wrong"][:2]]
    passed = [(p.task_id, text) for (p, text), g in zip(texts, grade_all(texts, chat=False)) if g.verdict == "passed"]
    assert passed == []


def test_trivial_bodies_fail_and_are_counted_as_such():
    problems = [*load("problems")[::18], *load("humaneval")[::40]]
    failed = {"wrong", "exception"}
    for body, verdicts, passes in (
        ("    pass\n", failed, True),
        ("    # nothing\n", failed, False),
        ("    return (\n", {"syntax"}, False),
        ("", failed, False),
    ):
        for g in grade_all([(p, body) for p in problems], chat=False):
            assert g.verdict in verdicts, g
            assert (g.compiles, g.non_trivial) == (passes, False)


def plainly(job: tuple[Problem, str], slot: int) -> str:
    """Run a program and its tests in one namespace, as the benchmarks' own scripts do; no stranger wrote it."""
    problem, program = job
    scope: dict = {"__name__": "plain"}
    try:
        exec(compile(problem.trusted + program, "<program>", "exec"), scope)
        import random

        random.seed(0)
        exec(compile(problem.tests, "<tests>", "exec"), scope)
    except BaseException:
        return "failed"
    return "passed"


def compare_mutants(problems: list[Problem]) -> tuple[list[str], int]:
    """Judge a mutant of each problem; return where a plain run of its tests says otherwise, and how many passed."""
    made = [mutant(p.solution, p.entry_point) for p in problems]
    jobs = [(p, program) for p, (program, _) in zip(problems, made)]
    judged = grade_all([(p, f"```python\n{program}```") for p, program in jobs], chat=True)
    plain = list(map_jobs(plainly, jobs, n_workers=2, limit_s=15))
    assert {g.verdict for g in judged} <= set(VERDICTS) - {"syntax", "sandbox"}
    different = []
    for p, (_, kind), g, result in zip(problems, made, judged, plain):
        passed = not isinstance(result, Lost) and result == "passed"
        if (g.verdict == "passed") != passed:
            different.append(f"{p.task_id} ({kind}): {g.verdict} {g.reason}, plainly {result}")
    return different, sum(g.verdict == "passed" for g in judged)


def test_mutants_fail_unless_no_test_sees_them():
    problems = [*load("humaneval")[1::16], *load("problems")[::10], *load("mbpp")[::60]]
    different, passed = compare_mutants(problems)
    assert different == [] and passed < len(problems) / 5


@pytest.mark.slow
def test_every_mutant_fails_unless_no_test_sees_it(monkeypatch):
    problems = [*load("humaneval"), *load("problems"), *all_of_mbpp(monkeypatch)]
    different, passed = compare_mutants(problems)
    print(f"{len(problems)} mutants, {passed} passed")
    assert different == [] and passed < len(problems) / 5


def test_a_mutant_is_one_change_and_always_the_same():
    for p in [*load("problems"), *load("mbpp")[::5]]:
        program, kind = mutant(p.solution, p.entry_point)
        assert (program, kind) == mutant(p.solution, p.entry_point)
        assert ast.dump(ast.parse(program)) != ast.dump(ast.parse(p.solution)), kind


def test_a_sample_without_tests_is_only_compiled():
    p = load("problems")[0]
    prompt = Problem("syntax", "x", "add", p.prompt, p.prompt, "", "", "", "", ())
    (good, bad, empty) = grade_all([(prompt, "    return a\nx"), (prompt, "    return (\n"), (prompt, "")], chat=False)
    assert (good.verdict, good.compiles, good.non_trivial) == ("", True, True)
    assert (bad.verdict, bad.compiles) == ("syntax", False)
    assert (empty.compiles, empty.non_trivial) == (False, False)


def test_nasty_texts_are_verdicts_or_lost_and_nothing_else():
    p = load("problems")[0]
    jobs = [
        Sample(p, f"    {text}", chat, False, MODE, Limits(cpu_s=2))
        for text in NASTY.values()
        for chat in (False, True)
    ]
    for job, result in zip(jobs, map_jobs(grade, jobs, n_workers=2, limit_s=LIMIT_S)):
        assert isinstance(result, Lost) or result.verdict != "passed", job.text[:50]


def test_verdicts_name_what_happened():
    p = load("problems")[0]
    for body, verdict in {
        "    return a + b\n": "passed",
        "    return a\n": "wrong",
        "    return a + \n": "syntax",
        "    raise AssertionError\n": "exception",
        "    return missing\n": "exception",
        "    return 'x' * 2**40\n": "memory",
        "    while True:\n        pass\n": "timeout",
    }.items():
        verdict_of = judge(p, p.head + body, MODE, Limits(cpu_s=1, wall_s=20))
        assert verdict_of.verdict == verdict, (body, verdict_of)

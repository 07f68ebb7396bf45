import math
import platform

import pytest

from kindling.evaluation.check_correctness import GradedSample
from kindling.evaluation.code_eval import functional_figures, syntax
from kindling.evaluation.samples import Sample
from kindling.evaluation.tasks import load

GRADED, MBPP = load("problems")[30:], load("mbpp")


def sample(problem, number, text, cropped=False) -> Sample:
    return Sample(problem, number, text, [], False, cropped)


def result(verdict, compiles=True, non_trivial=True) -> GradedSample:
    return GradedSample("", verdict, "", compiles, non_trivial)


def test_the_figures_of_a_benchmark_by_hand():
    passes = {GRADED[0]: 2, GRADED[1]: 0, GRADED[20]: 5}  # of 5 samples; levels 1, 1 and 2
    written = [sample(p, n, "", cropped=p is GRADED[1]) for p in passes for n in range(5)]
    graded = [result("passed" if w.number < passes[w.problem] else "wrong") for w in written]
    graded[-6] = result("timeout")  # of the second problem
    out = functional_figures(written, graded, ["problems"], "bwrap", {})["problems"]
    assert out["problems"] == 3 and out["samples_per_problem"] == 5 and out["sandbox"] == "bwrap"
    assert out["cropped"] == 1
    assert out["pass_at"] == pytest.approx({"1": (2 / 5 + 0 + 1) / 3, "5": 2 / 3})
    assert {v: n for v, n in out["verdicts"].items() if n} == {"passed": 7, "wrong": 7, "timeout": 1}
    assert out["counts"] == [["Kindling/1", 5, 2], ["Kindling/2", 5, 0], ["Kindling/21", 5, 5]]
    assert out["python"] == platform.python_version()
    assert out["by_level"]["1"]["counts"] == out["counts"][:2] and out["by_level"]["2"]["counts"] == out["counts"][2:]
    assert {level: group["problems"] for level, group in out["by_level"].items()} == {"1": 2, "2": 1}
    assert out["by_level"]["1"]["pass_at"] == pytest.approx({"1": 1 / 5, "5": 1 / 2})
    assert out["by_level"]["2"]["pass_at"] == {"1": 1.0, "5": 1.0}


def test_pass_at_k_is_given_up_to_the_number_of_samples():
    for n, ks in {1: ["1"], 4: ["1"], 5: ["1", "5"], 10: ["1", "5", "10"], 100: ["1", "5", "10", "100"]}.items():
        written = [sample(MBPP[0], i, "") for i in range(n)]
        graded = [result("passed"), *[result("wrong")] * (n - 1)]
        out = functional_figures(written, graded, ["mbpp"], "bwrap", {})["mbpp"]
        assert list(out["pass_at"]) == ks and "by_level" not in out
        for k in ks:
            assert math.isclose(out["pass_at"][k], int(k) / n)  # one of n is right: the chance that k hold it


def test_the_figures_of_nothing_are_empty():
    out = functional_figures([], [], ["mbpp"], "bwrap", {})["mbpp"]
    assert out["problems"] == 0 and out["pass_at"] == {} and out["counts"] == []


def test_the_syntax_figures_by_hand():
    ok, empty, broken = result("passed"), result("wrong", True, False), result("syntax", False, False)
    written = [sample(GRADED[0], 0, ""), sample(GRADED[0], 1, ""), sample(GRADED[1], 0, ""), sample(MBPP[0], 0, "")]
    out = syntax(written, [ok, broken, empty, ok], "3.11.7")
    first, second, other = GRADED[0].task_id, GRADED[1].task_id, MBPP[0].task_id
    assert out == {
        "samples": 4,
        "passes": 3,
        "non_trivial": 2,
        "python": "3.11.7",
        "by_prompt": {
            "problems": {"samples": 3, "passes": 2, "non_trivial": 1, "counts": [[first, 2, 1, 1], [second, 1, 1, 0]]},
            "mbpp": {"samples": 1, "passes": 1, "non_trivial": 1, "counts": [[other, 1, 1, 1]]},
        },
    }

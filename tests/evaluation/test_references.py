"""Problem files of one's own: references run first, and what cannot be asked is said and not counted."""

import json
import shutil

import pytest

from config import EvalConfig
from kindling.evaluation.check_correctness import GradedSample
from kindling.evaluation.code_eval import functional_figures
from kindling.evaluation.references import left_out_problems
from kindling.evaluation.report import describe_left_out
from kindling.evaluation.samples import Sample
from kindling.evaluation.tasks import TaskError, load

pytestmark = pytest.mark.usefixtures("forked_workers")

MODE = "bwrap" if shutil.which("bwrap") else "none"
GOOD = ("    return [f for f in fs]\n", "    assert candidate([1]) == [1]\n")
UNASKABLE = {
    "a function": "    assert candidate([lambda x: x]) == [1]\n",
    "a function, its error caught": "    try:\n        candidate([lambda: 0])\n    except TypeError:\n        pass\n",
    "an iterator": "    assert candidate(iter([1])) == [1]\n",
    "an object": "    candidate([object()])\n",
    "a class of the test's own": "    class A:\n        pass\n    candidate([A()])\n",
    "a list of a class of the test's own": "    class A(list):\n        pass\n    candidate([A([1])])\n",
    "very deep nesting": "    x = []\n    for _ in range(5000):\n        x = [x]\n    candidate(x)\n",
}


def write(path, rows: list[tuple[str, str]]) -> str:
    prompt = 'def f(fs):\n    """Do it."""\n'
    lines = [
        {"task_id": f"HumanEval/{9000 + i}", "prompt": prompt, "entry_point": "f", "canonical_solution": solution}
        | {"test": f"def check(candidate):\n{test}"}
        for i, (solution, test) in enumerate(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def test_what_cannot_be_asked_is_said_by_problem(tmp_path):
    path = write(tmp_path / "own.jsonl", [GOOD, *((GOOD[0], test) for test in UNASKABLE.values())])
    found = left_out_problems({"humaneval": load("humaneval", path)}, MODE, EvalConfig(humaneval=path, workers=1))
    assert list(found["humaneval"]) == [f"HumanEval/{9001 + i}" for i in range(len(UNASKABLE))]
    for reason in found["humaneval"].values():
        assert reason.startswith("it cannot be asked across the sandbox: an argument must be plain data, but is ")


def test_a_reference_that_does_not_pass_is_said_with_its_reason(tmp_path):
    rows = [GOOD, ("    return 1\n", GOOD[1]), ("    return fs[9]\n", GOOD[1]), ("    while True: pass\n", GOOD[1])]
    path = write(tmp_path / "own.jsonl", rows)
    cfg = EvalConfig(humaneval=path, workers=1, cpu_s=1)
    found = left_out_problems({"humaneval": load("humaneval", path)}, MODE, cfg)["humaneval"]
    assert [reason.partition(":")[0] for reason in found.values()] == [
        f"its reference ends in {verdict}" for verdict in ("wrong", "exception", "timeout")
    ]
    assert describe_left_out(found).startswith("3 problems left out: HumanEval/9001 (its reference ends in wrong: ")


def test_a_file_of_which_no_reference_passes_is_refused(tmp_path):
    path = write(tmp_path / "own.jsonl", [("    return 1\n", GOOD[1])])
    with pytest.raises(
        TaskError, match=r"references pass their tests, but none does \(HumanEval/9000: .*--eval.humaneval"
    ):
        left_out_problems({"humaneval": load("humaneval", path)}, MODE, EvalConfig(humaneval=path, workers=1))


def test_the_projects_own_files_are_not_run_again(monkeypatch):
    monkeypatch.setattr("kindling.evaluation.references.map_jobs", lambda *_: pytest.fail("they pass by other tests"))
    assert left_out_problems({"humaneval": load("humaneval")}, MODE, EvalConfig()) == {}


def test_what_is_left_out_does_not_count(tmp_path):
    path = write(tmp_path / "own.jsonl", [GOOD, GOOD])
    problems = load("humaneval", path)
    samples = [Sample(problem, 0, "", [], False, False) for problem in problems]
    graded = [GradedSample("", verdict, "", True, True) for verdict in ("passed", "sandbox")]
    figures = functional_figures(samples, graded, ["humaneval"], MODE, {"humaneval": {"HumanEval/9001": "a reason"}})
    assert figures["humaneval"]["pass_at"]["1"] == 1.0 and figures["humaneval"]["problems"] == 1
    assert figures["humaneval"]["left_out"] == {"HumanEval/9001": "a reason"}

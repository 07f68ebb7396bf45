import json

import pytest

from config import EvalConfig
from kindling.evaluation import code_eval, grade_written
from kindling.evaluation.check_correctness import GradedSample
from kindling.evaluation.results_file import read_results, save_results

SKIPPED = {"mbpp-3shot": {"skipped": "500 of 500 prompts do not fit"}}


@pytest.fixture
def run(tmp_path):
    """A run that was evaluated with `--sandbox later` on another machine, whose Python compiles both samples."""
    lines = [
        {"benchmark": "problems", "task_id": task, "sample": 0, "verdict": "", "reason": "", "compiles": True}
        | {
            "non_trivial": True,
            "tokens": 3,
            "cut_short": False,
            "prompt_cropped": False,
            "text": "",
            "program": "there",
        }
        for task in ("Kindling/1", "Kindling/2")
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    counts = [[line["task_id"], 1, 1, 1] for line in lines]
    syntax = {"samples": 2, "passes": 2, "non_trivial": 2}
    results = {
        "format": 2,
        "split": "val",
        "syntax": {**syntax, "python": "3.14.0", "by_prompt": {"problems": {**syntax, "counts": counts}}},
        "functional": {"skipped": "the samples were not run", **SKIPPED},
    }
    save_results(tmp_path, results)
    return tmp_path


def test_what_compiles_stays_with_the_python_that_said_so_and_verdicts_name_theirs(run, monkeypatch):
    before = read_results(run)[0]["syntax"]
    here = [GradedSample("here", "syntax", "an error", False, False), GradedSample("here", "passed", "", True, True)]
    monkeypatch.setattr(grade_written, "check_samples", lambda *_: here)
    monkeypatch.setattr(code_eval.platform, "python_version", lambda: "3.11.7")
    grade_written.grade_written(run, "val", None, "none", EvalConfig())
    found = read_results(run)[0]
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert found["syntax"] == before and before["passes"] == sum(line["compiles"] for line in lines)
    assert [(line["verdict"], line["program"]) for line in lines] == [("syntax", "here"), ("passed", "here")]
    assert found["functional"]["problems"]["verdicts"] == found["functional"]["problems"]["verdicts"] | {
        "syntax": 1,
        "passed": 1,
    }
    assert found["functional"]["problems"]["python"] == "3.11.7"
    table = (run / "eval.md").read_text(encoding="utf-8")
    assert "by the syntax of Python 3.14.0" in table and "run by Python 3.11.7" in table


def test_a_benchmark_that_was_skipped_stays_so(run, monkeypatch):
    monkeypatch.setattr(
        grade_written, "check_samples", lambda s, *_: [GradedSample("", "wrong", "", True, True)] * len(s)
    )
    for _ in range(2):  # also when it is graded again
        grade_written.grade_written(run, "val", None, "none", EvalConfig())
        assert read_results(run)[0]["functional"]["mbpp-3shot"] == SKIPPED["mbpp-3shot"]

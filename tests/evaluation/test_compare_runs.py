import json
import math
import random
import re
from pathlib import Path

import pytest
from test_report import benchmark, full, gold, language_modelling, made_losses, rates
from test_tables import assert_valid_tables

from kindling.evaluation.compare_runs import compare
from kindling.evaluation.intervals import paired_difference, paired_ratio_difference, pass_at_k
from kindling.evaluation.results_file import ResultsError, save_results
from kindling.tables import WIDTH

LOSSES = made_losses()


def saved(tmp_path: Path, name: str, results: dict | None = None, losses: list[dict] | None = LOSSES) -> Path:
    (tmp_path / name).mkdir()
    save_results(tmp_path / name, full(LOSSES) if results is None else results, losses)
    return tmp_path / name


def changed(losses: list[dict], by: float, seed: int = 1) -> list[dict]:
    rng = random.Random(seed)
    return [line | {"nll": line["nll"] * (1 + by * rng.gauss(1, 0.5))} for line in losses]


def cells(document: str, metric: str, place: int) -> list[str]:
    """Return value and difference of a run's row in the Markdown, under the row that names the metric."""
    name = ""
    for line in document.splitlines():
        parts = [part.strip() for part in line.replace("\\*", "*").strip("|").split("|")]
        name = parts[0] or name
        if len(parts) == 4 and name == metric and parts[1].startswith(f"{place} "):
            return parts[2:]
    raise AssertionError(f"no {metric} of run {place} in\n{document}")


def starred(document: str) -> list[str]:
    """Return the metrics whose rows have a *."""
    found, name = [], ""
    for line in document.splitlines():
        if line.startswith("|"):
            name = line.split("|")[1].strip() or name
            found += [name] if line.endswith("\\* |") else []
    return found


def test_equal_results_have_no_star(tmp_path):
    text, document = compare([saved(tmp_path, "a"), saved(tmp_path, "b")])
    assert starred(document) == [] and " *" not in text.split("How to read this")[0]
    assert cells(document, "all", 2)[1] == "+0.0000"
    assert cells(document, "problems pass@1", 2)[1] == "+0.0"


def test_exactly_what_differs_has_a_star(tmp_path):
    losses = [new if old["language"] == "c" else old for old, new in zip(LOSSES, changed(LOSSES, -0.02))]
    results = full(LOSSES) | {"language_modelling": language_modelling(losses)}
    results["syntax"]["passes"], results["syntax"]["by_prompt"]["humaneval"] = 83, rates(50, 43, 18)
    results["functional"]["humaneval"] = benchmark([[f"HumanEval/{i}", 10, int(i < 12)] for i in range(164)])
    results["harness"]["arc_easy"]["value"] = 0.31
    document = compare([saved(tmp_path, "a"), saved(tmp_path, "b", results, losses)])[1]
    assert starred(document) == [
        "all", "c", "all: pass", "humaneval: pass",
        "humaneval pass@1", "humaneval pass@5", "humaneval pass@10", "arc_easy acc_norm"
    ]  # fmt: skip


def test_bits_per_byte_are_paired_by_document_whatever_their_order(tmp_path):
    losses = changed(LOSSES, 0.01)
    results = full(LOSSES) | {"language_modelling": language_modelling(losses)}
    document = compare([saved(tmp_path, "a"), saved(tmp_path, "b", results, losses[::-1])])[1]
    new, old = ([line["nll"] / math.log(2) for line in side[::-1]] for side in (losses, LOSSES))
    known = paired_ratio_difference(new, old, [line["bytes"] for line in LOSSES[::-1]])
    assert known.significant
    assert cells(document, "all", 2)[1] == f"{known.difference:+.4f} [{known.low:+.4f}, {known.high:+.4f}] *"
    values = [[float(n) for n in re.findall(r"[\d.]+", cells(document, "all", place)[0])] for place in (1, 2)]
    assert values[1][1] < values[0][2]  # their own intervals overlap


def test_pass_at_k_is_paired_by_task_on_the_problems_of_both(tmp_path):
    rng = random.Random(3)
    first = [[f"p{i}", 5, int(rng.random() < 0.2)] for i in range(60)]
    second = [[f"p{i}", 10, rng.randint(0, 4)] for i in range(89, 19, -1)]
    a = saved(tmp_path, "a", {"format": 2, "functional": {"problems": benchmark(first)}}, None)
    b = saved(tmp_path, "b", {"format": 2, "functional": {"problems": benchmark(second)}}, None)
    text, document = compare([a, b])
    own, other = {t: (n, c) for t, n, c in second}, {t: (n, c) for t, n, c in first}
    shared = [task for task in own if task in other]
    known = paired_difference(*([pass_at_k(*side[task], 5) for task in shared] for side in (own, other)))
    ends = f"[{100 * known.low:+.1f}, {100 * known.high:+.1f}]"
    assert cells(document, "problems pass@5", 2)[1] == f"{100 * known.difference:+.1f} {ends} *"
    assert "problems: run 2 is compared with run 1 on the 40 problems of both" in text
    assert cells(document, "problems pass@10", 2)[1] == "-"  # of which the first took too few samples


def test_bits_per_byte_of_texts_are_paired_by_document(tmp_path):
    def evaluated(name: str, by: float) -> Path:
        lines = [[i, 100 + i, (100 + i) * (1 + 0.01 * i) * by] for i in range(20)]
        bits = sum(line[2] for line in lines) / math.log(2) / sum(line[1] for line in lines)
        texts = {
            "a.jsonl": {"all": {"bits_per_byte": bits}, "losses": lines},
            "b.txt": {"all": {"bits_per_byte": bits}},
        }
        return saved(tmp_path, name, full(LOSSES) | {"texts": texts})

    text, document = compare([evaluated("a", 1.0), evaluated("b", 1.1)])
    value, difference = cells(document, "a.jsonl", 2)
    assert "[" in value and re.fullmatch(r"\+0\.\d{4} \[\+0\.\d{4}, \+0\.\d{4}\] \*", difference)
    assert cells(document, "b.txt", 2)[1] == "-"  # saved by an earlier version, without the losses of documents
    assert "Bits per byte of texts" in text


def test_gold_bits_per_byte_are_paired_by_problem(tmp_path):
    results = full(LOSSES) | {"gold": {"problems": gold(100, gain=0.9) | {"by_level": {"0": gold(30, gain=0.9)}}}}
    text, document = compare([saved(tmp_path, "a"), saved(tmp_path, "b", results)])
    first, second = gold(100), gold(100, gain=0.9)
    new, old = ([nll / math.log(2) for *_, nll in side["losses"]] for side in (second, first))
    known = paired_ratio_difference(new, old, [size for _, size, _ in first["losses"]])
    ends = f"[{known.low:+.4f}, {known.high:+.4f}]"
    assert cells(document, "problems", 2)[1] == f"{known.difference:+.4f} {ends} *" and known.significant
    assert cells(document, "problems, level 0", 2)[1].endswith("*")
    assert "Gold bits per byte" in text
    other = gold(100)
    other["losses"] = [[task, size + 1, nll] for task, size, nll in other["losses"]]  # other solutions
    document = compare([tmp_path / "a", saved(tmp_path, "c", full(LOSSES) | {"gold": {"problems": other}})])[1]
    assert cells(document, "problems", 2)[1] == "-"


def test_levels_are_compared_at_the_most_samples(tmp_path):
    runs = []
    for name, solved in (("a", 0), ("b", 8)):
        counts = [[f"p{i}", 10, int(i < solved)] for i in range(30)]
        level = {"problems": 30, "pass_at": {"1": solved / 300, "10": solved / 30}, "counts": counts}
        part = {"problems": benchmark(counts, by_level={"0": level})}
        runs.append(saved(tmp_path, name, {"format": 2, "functional": part}, None))
    document = compare(runs)[1]
    known = paired_difference([i < 8 for i in range(30)], [0] * 30)
    ends = f"[{100 * known.low:+.1f}, {100 * known.high:+.1f}]"
    assert cells(document, "problems, level 0 pass@10", 2)[1] == f"{100 * known.difference:+.1f} {ends} *"


def test_results_of_an_earlier_version_are_compared(tmp_path):
    """They have no gold losses, no counts of levels, no Python of the verdicts and no benchmark that was skipped."""
    old = full(LOSSES)
    del old["gold"]
    new = full(LOSSES)
    new["functional"]["problems"] |= {"python": "3.11.7"}
    new["functional"]["mbpp-3shot"] = {"skipped": "500 of 500 prompts do not fit"}
    text, document = compare([saved(tmp_path, "a", old), saved(tmp_path, "b", new)])
    assert cells(document, "problems pass@1", 2)[1] == "+0.0"
    assert cells(document, "problems, level 1 pass@5", 2) == ["25.0%", "-"]
    assert cells(document, "problems", 2)[1] == "-" and "not evaluated for this: run 1" in text
    assert "mbpp-3shot: skipped for run 2, 500 of 500 prompts do not fit" in text


def test_syntax_rates_are_compared_prompt_by_prompt(tmp_path):
    results = full(LOSSES)
    results["syntax"]["by_prompt"]["humaneval"] = rates(50, 40, 18)
    document = compare([saved(tmp_path, "a"), saved(tmp_path, "b", results)])[1]
    known = paired_difference([i < 40 for i in range(50)], [i < 21 for i in range(50)])
    ends = f"[{100 * known.low:+.1f}, {100 * known.high:+.1f}]"
    assert cells(document, "humaneval: pass", 2) == ["80.0% [67.0, 88.8]", f"{100 * known.difference:+.1f} {ends} *"]


def test_each_run_is_set_against_the_first(tmp_path):
    runs = [saved(tmp_path, "a")]
    for name, by in (("b", 0.05), ("c", -0.05)):
        losses = changed(LOSSES, by)
        runs.append(saved(tmp_path, name, full(LOSSES) | {"language_modelling": language_modelling(losses)}, losses))
    document = compare(runs)[1]
    assert [cells(document, "all", place)[1][:1] for place in (1, 2, 3)] == ["", "+", "-"]


def test_different_held_out_documents_are_shown_and_not_compared(tmp_path):
    losses = changed(LOSSES, -0.1)
    results = full(LOSSES) | {"data": "other-1", "language_modelling": language_modelling(losses)}
    text, document = compare([saved(tmp_path, "a"), saved(tmp_path, "b", results, losses)])
    value, difference = cells(document, "all", 2)
    assert "[" in value and difference == "-"
    assert "run 2 is of other held-out documents than run 1, not compared: other-1, not demo-abc123" in text


def test_documents_that_only_one_run_has_are_left_out_of_the_difference(tmp_path):
    losses = changed(LOSSES, -0.05)[:30]
    results = full(LOSSES) | {"language_modelling": language_modelling(losses)}
    text, document = compare([saved(tmp_path, "a"), saved(tmp_path, "b", results, losses)])
    assert "run 2 is compared with run 1 on the 30 documents that both were evaluated on" in text
    assert starred(document) == ["all", "python", "c"]


@pytest.mark.parametrize("change", [{"bytes": 17}, {"nll": math.nan}])
def test_a_document_that_is_not_the_same_in_both_stops_the_comparison(tmp_path, change):
    losses = [LOSSES[0] | change, *LOSSES[1:]]
    text, document = compare([saved(tmp_path, "a"), saved(tmp_path, "b", losses=losses)])
    assert "run 2 is not compared: a document's bytes differ, or its loss is not finite" in text
    assert cells(document, "all", 2)[1] == "-"


def test_other_prompts_pythons_settings_and_sandboxes_are_said(tmp_path):
    results = full(LOSSES) | {"settings": {"temperature": 0.8, "samples": 5, "top_k": None}}
    results["syntax"] |= {"python": "3.12.1", "by_prompt": {"mbpp": rates(100, 9, 9)}}
    results["functional"]["humaneval"]["sandbox"] = "none"
    results["harness"]["arc_easy"] |= {"shots": 5, "value": 0.9}
    text, document = compare([saved(tmp_path, "a"), saved(tmp_path, "b", results)])
    for known in (
        "run 2 was evaluated with other settings than run 1: temperature 0.8, not 0.2",
        "run 2 has other kinds of prompts than run 1",
        "run 2 is by the syntax of Python 3.12.1, not 3.11.7",
        "humaneval: run 2 was evaluated NOT SANDBOXED",
        "arc_easy: runs of another metric, number of questions or of shots are not compared",
    ):
        assert known in text
    assert cells(document, "all: pass", 2)[1] == "-" and cells(document, "arc_easy acc_norm", 2)[1] == "-"


def test_a_part_that_a_run_lacks_is_said(tmp_path):
    sparse = {"format": 2, "harness": {"skipped": "lm_eval is not installed"}}
    text, document = compare([saved(tmp_path, "a"), saved(tmp_path, "b", sparse, None)])
    assert text.count("not evaluated for this: run 2") == 6
    assert "None" not in text and not any("| 2 b |" in line[1:] for line in document.splitlines())
    text, document = compare([tmp_path / "b", tmp_path / "a"])
    assert starred(document) == [] and cells(document, "all", 2)[1] == "-"


def test_the_comparison_fits_100_columns_and_its_markdown_is_valid(tmp_path):
    names = [
        f"a-run-whose-name-is-much-too-long-for-any-table-in-a-terminal-and-differs-at-its-end-{i}" for i in range(3)
    ]
    text, document = compare([saved(tmp_path, name) for name in names])
    assert max(map(len, text.splitlines())) <= WIDTH
    assert_valid_tables(document)
    assert re.findall(r"^# .*", document, re.MULTILINE) == ["# Comparison of 3 runs on the validation split"]
    assert all(name in document for name in names)
    assert "3,344,064" in text
    for content in (text, document.replace("\\*", "*")):
        assert "*: the 95% interval of the difference to run 1 excludes 0" in content
    differences = sum(
        "[" in cell for line in document.splitlines() for cell in line.split("|")[4:5] if "| run" not in line
    )
    assert f"{differences} differences have an interval: if no run differed" in text


def error_of(*runs: Path) -> str:
    with pytest.raises(ResultsError) as error:
        compare(list(runs))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_fewer_than_two_different_runs_are_refused(tmp_path):
    a = saved(tmp_path, "a")
    b = saved(tmp_path, "b")
    for runs in ([], [a], [a, a], [a, b, a], [a, tmp_path / "a" / ".." / "a"]):
        assert "a comparison must be of two or more different runs" in error_of(*runs)


def test_a_run_that_was_not_evaluated_is_refused_with_the_command(tmp_path):
    (tmp_path / "b").mkdir()
    message = error_of(saved(tmp_path, "a"), tmp_path / "b")
    assert "holds no eval.json" in message and f"python evaluate.py {tmp_path / 'b'}" in message


@pytest.mark.parametrize("content", [b'{"format": 2,', b"", b"[1]", b"\xff\xfe", b'{"format": 2, "split": "val", "syntax": 7}',
                                     b'{"format": 2, "split": "val", "functional": {"x": {"counts": [[1]]}}}',
                                     b'{"format": 2, "split": "val", "language_modelling": {"all": []}}'])  # fmt: skip
def test_a_damaged_result_is_refused(tmp_path, content):
    b = saved(tmp_path, "b")
    (b / "eval.json").write_bytes(content)
    message = error_of(saved(tmp_path, "a"), b)
    assert str(b) in message and "evaluate" in message


def test_a_result_of_another_format_is_refused(tmp_path):
    a, b = saved(tmp_path, "a"), saved(tmp_path, "b")
    (b / "eval.json").write_text(json.dumps({"run": "runs/demo", "split": "val", "loss": 2.0}), encoding="utf-8")
    assert "must be of format 2, but is of the old format; evaluate again with `python evaluate.py" in error_of(a, b)
    (b / "eval.json").write_text(json.dumps({"format": 3}), encoding="utf-8")
    assert "is of format 3" in error_of(a, b)


def test_losses_of_another_evaluation_are_refused(tmp_path):
    a, b = saved(tmp_path, "a"), saved(tmp_path, "b")
    (b / "losses.jsonl").write_text("{}\n", encoding="utf-8")
    assert "losses.jsonl must be the file that eval.json was saved with" in error_of(a, b)
    (b / "losses.jsonl").unlink()
    assert "losses.jsonl must be there" in error_of(a, b)

import json
import math
import random
import re

import pytest
from test_tables import assert_valid_tables

from kindling.evaluation.intervals import Z, bootstrap_ratio, pass_at_k, pass_interval, wilson
from kindling.evaluation.report import markdown, table
from kindling.evaluation.results_file import ResultsError, save_results, with_earlier
from kindling.tables import WIDTH

HEADINGS = [
    "Language modelling, held-out documents",
    "Language modelling, texts",
    "Reference solutions, given their prompts",
    "Syntax of samples",
    "Functional correctness",
    "Verdicts on the samples",
    "Memorisation",
    "Benchmark problems in the training data",
    "lm-evaluation-harness",
]


def made_losses(n: int = 40, seed: int = 0, gain: float = 1.0) -> list[dict]:
    """Return losses of documents in two languages from two sources, each `gain` times as high."""
    rng = random.Random(seed)
    lines = []
    for i in range(n):
        tokens = rng.randint(50, 3000)
        line = {"document": i, "language": ["python", "c"][i % 2], "source": ["stack", "local-python"][i % 3 == 0]}
        lines.append(line | {"tokens": tokens, "bytes": 3 * tokens, "nll": gain * tokens * rng.gauss(2, 0.4)})
    return lines


def figures(losses: list[dict]) -> dict:
    nll, tokens, size = (sum(line[key] for line in losses) for key in ("nll", "tokens", "bytes"))
    bits = nll / math.log(2) / size
    loss = nll / tokens
    return {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": bits, "tokens": tokens, "bytes": size} | {
        "documents": len(losses)
    }


def language_modelling(losses: list[dict]) -> dict:
    part = {"all": figures(losses), "stride": None}
    for key in ("language", "source"):
        values = dict.fromkeys(line[key] for line in losses)
        part[f"by_{key}"] = {value: figures([line for line in losses if line[key] == value]) for value in values}
    return part


def benchmark(counts: list[list], **more) -> dict:
    n, c = [n for _, n, _ in counts], [c for _, _, c in counts]
    ks = [k for k in (1, 5, 10) if all(k <= each for each in n)]
    return {
        "problems": len(counts),
        "samples_per_problem": n[0],
        "pass_at": {str(k): float(pass_at_k(n, c, k).mean()) for k in ks},
        "verdicts": {"passed": sum(c), "wrong": sum(n) - sum(c), "sandbox": 0},
        "cropped": 0,
        "sandbox": "bwrap",
        "counts": counts,
    } | more


def gold(n: int, name: str = "p", gain: float = 1.0, seed: int = 0) -> dict:
    """Gold losses of `n` solutions."""
    rng = random.Random(seed)
    losses = [[f"{name}{i}", size := rng.randint(10, 200), gain * size * rng.gauss(1.2, 0.3)] for i in range(n)]
    n_bytes, nll = (sum(line[column] for line in losses) for column in (1, 2))
    return {"bits_per_byte": nll / math.log(2) / n_bytes, "problems": n, "bytes": n_bytes, "losses": losses}


def rates(n: int, passes: int, non_trivial: int) -> dict:
    """Syntax of one sample for each of `n` prompts."""
    counts = [[f"prompt {i}", 1, int(i < passes), int(i < non_trivial)] for i in range(n)]
    return {"samples": n, "passes": passes, "non_trivial": non_trivial, "counts": counts}


def full(losses: list[dict], seed: int = 0) -> dict:
    rng = random.Random(seed)
    return {
        "format": 2, "run": "runs/demo", "checkpoint": "step_001100", "weights_sha256": "ab12" * 16, "preset": "demo",
        "parameters": 3344064, "split": "val", "device": "cpu", "precision": "fp32", "python": "3.11.7", "seconds": 212.0,
        "data": "demo-abc123", "settings": {"temperature": 0.2, "samples": 5, "top_k": None},
        "language_modelling": language_modelling(losses),
        "texts": {"a.txt": {"all": figures(losses[:1])}},
        "gold": {"problems": gold(100) | {"by_level": {"0": gold(30), "5": gold(4)}}, "mbpp": gold(50, "MBPP/")},
        "syntax": {"samples": 100, "passes": 61, "non_trivial": 55, "python": "3.11.7",
                   "by_prompt": {"held-out functions": rates(50, 40, 37), "humaneval": rates(50, 21, 18)},
                   "notes": ["a note on syntax"]},
        "functional": {
            "problems": benchmark([[f"p{i}", 5, int(rng.random() < 0.3)] for i in range(70)],
                                  by_level={"1": {"problems": 14, "pass_at": {"1": 0.1, "5": 0.25}}}),
            "humaneval": benchmark([[f"HumanEval/{i}", 10, 0] for i in range(164)])},
        "memorisation": {"samples": 500, "longest": 61, "median": 12, "over_50": 3, "share_over_50": 0.006,
                         "training_tokens": 7171584},
        "contamination": {"humaneval": {"problems": 164, "hit": 2, "examples": ["HumanEval/3", "HumanEval/9"]},
                          "read_tokens": 7171584, "of_tokens": 7171584},
        "harness": {"arc_easy": {"metric": "acc_norm", "value": 0.27, "stderr": 0.009, "n": 2376, "shots": 0}},
    }  # fmt: skip


def row(text: str, name: str) -> str:
    """Return the first line of a table that begins with `name`."""
    line, *_ = [line for line in text.splitlines() if re.match(rf"\s*\|? ?{re.escape(name)}( |$)", line)]
    return line


def test_the_table_of_a_full_result_has_every_part_within_100_columns():
    losses = made_losses()
    text = table(full(losses), losses)
    assert [line for line in text.splitlines() if line in HEADINGS] == HEADINGS
    assert max(map(len, text.splitlines())) <= WIDTH
    for known in (
        "runs/demo",
        "step_001100",
        "3,344,064 parameters",
        "val split",
        "demo-abc123",
        "212 s",
        "temperature 0.2",
    ):
        assert known in text
    assert "top_k" not in text and "\x1b" not in text


def test_intervals_are_those_of_the_documents_of_each_row():
    losses = made_losses()
    text = table(full(losses), losses)
    for name, own in (
        ("all", losses),
        ("python", losses[::2]),
        ("from stack", [line for line in losses if line["source"] == "stack"]),
    ):
        bits = bootstrap_ratio([line["nll"] / math.log(2) for line in own], [line["bytes"] for line in own])
        nats = bootstrap_ratio([line["nll"] for line in own], [line["tokens"] for line in own])
        known = figures(own)
        found = row(text, name)
        assert f"{known['bits_per_byte']:.3f} [{bits.low:.3f}, {bits.high:.3f}]" in found
        assert f"{known['perplexity']:.2f} [{math.exp(nats.low):.2f}, {math.exp(nats.high):.2f}]" in found
        assert f"{known['loss']:.4f}" in found and f"{known['tokens']:,}" in found


def test_gold_bits_per_byte_have_intervals_over_problems():
    text = table(full(made_losses()))
    for name, part in (("problems", gold(100)), ("level 0", gold(30)), ("mbpp", gold(50, "MBPP/"))):
        bits = bootstrap_ratio(
            [nll / math.log(2) for *_, nll in part["losses"]], [size for _, size, _ in part["losses"]]
        )
        assert f"{part['bits_per_byte']:.3f} [{bits.low:.3f}, {bits.high:.3f}]" in row(text, name)
    assert re.search(r"level 5 +\d\.\d{3} +4 ", text)  # of four problems there is no interval
    part = gold(8)
    part["losses"][0][2] = part["bits_per_byte"] = None  # as it is saved, if it is not finite
    assert row(table({"gold": {"mbpp": part}}), "mbpp").split()[:3] == ["mbpp", "-", "8"]


def test_a_level_has_its_interval_if_its_counts_are_known():
    counts = [[f"p{i}", 10, i % 4] for i in range(30)]
    level = {"problems": 30, "pass_at": {"10": 0.75}, "counts": counts}
    text = table({"functional": {"problems": benchmark(counts, by_level={"0": level, "1": {**level, "counts": []}})}})
    low, high = pass_interval([10] * 30, [c for *_, c in counts], 10)
    assert f"75.0% [{100 * low:.1f}, {100 * high:.1f}]" in row(text, "level 0")
    assert "75.0% " in row(text, "level 1") and "[" not in row(text, "level 1")


def test_a_skipped_benchmark_is_a_line_with_its_reason_whether_or_not_the_others_were_run():
    skipped = {"mbpp-3shot": {"skipped": "500 of 500 prompts do not fit"}}
    ran = {"problems": benchmark([["a", 1, 0]] * 8, python="3.13.1")} | skipped
    text = table({"functional": ran})
    assert "mbpp-3shot: skipped, 500 of 500 prompts do not fit" in text and "run by Python 3.13.1" in text
    assert not re.search(r"^ *mbpp-3shot +[-\d]", text, re.MULTILINE)
    later = table({"functional": {"skipped": "the samples were not run", **skipped}})
    assert "not computed: the samples were not run" in later and "mbpp-3shot: skipped, 500 of" in later


def test_rates_and_pass_at_k_have_their_intervals():
    losses = made_losses()
    results = full(losses)
    text = table(results, losses)
    low, high = wilson(40, 50)
    assert f"80.0% [{100 * low:.1f}, {100 * high:.1f}]" in row(text, "held-out functions")
    counts = results["functional"]["problems"]["counts"]
    low, high = pass_interval([n for _, n, _ in counts], [c for _, _, c in counts], 5)
    value = results["functional"]["problems"]["pass_at"]["5"]
    assert f"{value:.1%} [{100 * low:.1f}, {100 * high:.1f}]" in row(text[text.index("Functional") :], "problems")
    assert "0.0% [0.0, 2.3]" in text  # of 164 problems none solved
    assert row(text, "their share").endswith(" 0.6%")
    assert f"0.2700 [{0.27 - Z * 0.009:.4f}, {0.27 + Z * 0.009:.4f}]" in row(text, "arc_easy")


def test_the_markdown_has_the_same_figures_in_valid_tables_under_one_heading():
    losses = made_losses()
    text, document = table(full(losses), losses), markdown(full(losses), losses)
    assert_valid_tables(document)
    assert re.findall(r"^# .*", document, re.MULTILINE) == ["# Evaluation of runs/demo"]
    assert [line[3:] for line in document.splitlines() if line.startswith("## ")] == HEADINGS

    def numbers(content):
        return sorted(re.findall(r"[\d.,]*\d", content))

    assert numbers(document) == numbers(text)


def test_what_is_absent_is_left_out_and_what_was_skipped_says_why():
    losses = made_losses()
    sparse = {"format": 2, "run": "runs/x", "split": "val", "language_modelling": {"all": figures(losses)}}
    text = table(sparse | {"memorisation": {"skipped": "the training data is gone"}})
    assert [line for line in text.splitlines() if line in HEADINGS] == [HEADINGS[0], "Memorisation"]
    assert "not computed: the training data is gone" in text
    assert "no intervals: the losses of single documents are missing" in text
    assert "None" not in text
    assert "Nothing was evaluated" in table({})
    assert_valid_tables(markdown(sparse))


@pytest.mark.parametrize("part", [p for p in full(made_losses()) if isinstance(full(made_losses())[p], dict)])
def test_each_part_alone_makes_a_table(part):
    losses = made_losses()
    text = table({part: full(losses)[part]}, losses)
    assert "None" not in text and max(map(len, text.splitlines())) <= WIDTH
    assert_valid_tables(markdown({part: full(losses)[part]}, losses))


@pytest.mark.parametrize("part", [p for p in full(made_losses()) if isinstance(full(made_losses())[p], dict)])
def test_a_part_of_which_only_the_name_is_known_makes_a_table(part):
    for content in ({}, {"name": {}}):
        if part == "settings" or (part in ("syntax", "memorisation", "language_modelling") and content):
            continue
        assert "None" not in table({part: content})


def test_one_language_and_one_source_are_named_and_not_repeated():
    losses = [line | {"language": "python", "source": "here"} for line in made_losses()]
    text = table({"language_modelling": language_modelling(losses)}, losses)
    assert "all of one language: python" in text and "all of one source: here" in text
    assert sum(f"{figures(losses)['loss']:.4f}" in line for line in text.splitlines()) == 1


def test_few_documents_have_no_interval_and_a_note():
    losses = made_losses() + [line | {"document": 90 + i, "language": "go"} for i, line in enumerate(made_losses(3))]
    text = table({"language_modelling": language_modelling(losses)}, losses)
    assert "[" not in row(text, "go") and "go: no interval, of fewer than 6 documents" in text


def test_no_samples_have_no_rate():
    results = {"syntax": {"samples": 0, "passes": 0, "non_trivial": 0, "by_prompt": {}}}
    text = table(results | {"memorisation": {"samples": 0, "longest": None, "median": None, "over_50": 0}})
    assert row(text, "all").split() == ["all", "0", "-", "-"]
    assert "no samples were taken" in text
    assert row(text, "their share").endswith(" -")


def test_pass_at_more_than_the_samples_taken_has_no_figure_and_a_note():
    asked = benchmark([[f"p{i}", 5, 1] for i in range(20)])
    asked["pass_at"]["10"] = 0.9
    text = table({"functional": {"problems": asked}})
    assert row(text, "problems").split()[-3:] == ["-", "20", "5"]
    assert "problems: pass@k needs at least k samples of each problem, and 5 were taken" in text


def test_cropped_prompts_and_a_missing_sandbox_are_said():
    counts = [[i, 1, 0] for i in range(10)]
    results = {"functional": {"mbpp": benchmark(counts, cropped=3, sandbox="none"), "humaneval": benchmark(counts)}}
    text = table(results)
    assert "mbpp: 3 prompts cropped to the model's context" in text and "humaneval: 0" not in text
    assert "mbpp: NOT SANDBOXED" in text and "humaneval: NOT SANDBOXED" not in text
    assert "\x1b" not in text and "\x1b[1;31m  mbpp: NOT SANDBOXED" in table(results, color=True)
    assert "**mbpp: NOT SANDBOXED" in markdown(results)


def test_training_data_that_was_read_in_part_is_said():
    part = {"mbpp": {"problems": 974, "hit": 9, "examples": [1, 2, 3, 4, 5, 6, 7, 8, 9]}, "of_tokens": 7000}
    assert "ONLY 1,000 of 7,000 tokens" in table({"contamination": part | {"read_tokens": 1000}})
    text = table({"contamination": part | {"read_tokens": 7000}})
    assert "all 7,000 tokens" in text and "mbpp: 1, 2, 3, 4, 5 and 4 more" in text


def test_a_loss_that_is_not_finite_costs_the_intervals_and_not_the_table(tmp_path):
    for bad in (None, math.nan, math.inf):
        losses = made_losses()
        losses[4]["nll"] = bad
        results = {
            "language_modelling": {"all": {"loss": bad, "perplexity": bad, "bits_per_byte": bad, "documents": 40}}
        }
        text = table(results, losses)
        assert "[" not in text and "no intervals where the loss of a document is not finite" in text
        save_results(tmp_path, results, losses)
        assert (
            json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))["language_modelling"]["all"]["loss"]
            is None
        )
        assert "NaN" not in (tmp_path / "losses.jsonl").read_text(encoding="utf-8")


def test_a_saved_result_is_the_one_that_was_given(tmp_path):
    losses = made_losses()
    save_results(tmp_path, full(losses), losses)
    saved = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    assert {key: value for key, value in saved.items() if key != "losses_sha256"} == full(losses)
    assert [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text(encoding="utf-8").splitlines()] == losses
    assert (tmp_path / "eval.md").read_text(encoding="utf-8") == markdown(full(losses), losses)
    assert {path.name for path in tmp_path.iterdir()} == {"eval.json", "eval.md", "losses.jsonl"}


def test_another_split_has_files_of_its_own(tmp_path):
    losses = made_losses()
    assert save_results(tmp_path, full(losses), losses) == ["eval.json", "eval.md", "losses.jsonl"]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    names = ["eval-test.json", "eval-test.md", "losses-test.jsonl"]
    assert save_results(tmp_path, full(losses) | {"split": "test"}, losses) == names
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())
    assert {path.name for path in tmp_path.iterdir()} == {*before, *names}


def test_what_was_not_asked_for_again_is_kept_for_the_same_weights_only(tmp_path):
    earlier = full(made_losses())
    save_results(tmp_path, earlier)
    fewer = {key: value for key, value in earlier.items() if key not in ("syntax", "functional")}
    now = with_earlier(fewer, tmp_path)
    assert now["functional"] == earlier["functional"] and now["kept"] == ["syntax", "functional"]
    assert "kept from an earlier evaluation of the same weights: syntax, functional" in table(now)
    assert with_earlier(fewer | {"weights_sha256": "cd"}, tmp_path) == fewer | {"weights_sha256": "cd"}
    (tmp_path / "eval.json").write_text("{", encoding="utf-8")
    assert with_earlier(fewer, tmp_path) == fewer


def test_saving_without_losses_leaves_none_of_an_earlier_evaluation(tmp_path):
    save_results(tmp_path, full(made_losses()), made_losses())
    save_results(tmp_path, {"format": 2, "run": "runs/demo"})
    assert {path.name for path in tmp_path.iterdir()} == {"eval.json", "eval.md"}


@pytest.mark.parametrize("name", ["eval.json", "eval.md", "losses.jsonl"])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, name):
    (tmp_path / name).mkdir()  # where the file should be; a read-only folder would not stop root
    (tmp_path / name / "full").touch()
    with pytest.raises(ResultsError) as error:
        save_results(tmp_path, full(made_losses()), made_losses())
    assert f"{tmp_path} must be writable for {name}, but is not" in str(error.value)
    assert "\n" not in str(error.value)

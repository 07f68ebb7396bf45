"""The real evaluation, run as a user would run it, on a small base and what was fine-tuned of it."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import assert_one_clear_line, script, started, tiny_flags
from test_sft_train import mined

import evaluate
from config import FULL_EVAL, EvalConfig
from kindling.errors import ConfigError
from kindling.evaluation.code_eval import asked_problems

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap, which is not on this machine")
LITTLE = ["--eval.limit", "3", "--eval.signatures", "5", "--eval.max-new-tokens", "16", "--eval.workers", "2"]
LITTLE += ["--eval.benchmarks", "problems:2", "humaneval:1", "mbpp:1", "mbpp-3shot:1", "problems-infill"]
LITTLE += ["--device", "cpu"]
FILES = ["eval.json", "eval.md", "losses.jsonl", "samples.jsonl"]


@pytest.fixture(scope="module")
def work(tmp_path_factory, corpus) -> Path:
    """A folder in which `base` was pre-trained, fine-tuned, and both were evaluated."""
    folder = tmp_path_factory.mktemp("work")
    flags = [*tiny_flags(corpus), "--model.block-size", "512", "--train.max-steps", "4"]
    for command in (
        ("main.py", *flags, "--name", "base"),
        ("sft_train.py", *mined(corpus), "--train.held-out-answers", "0", "--train.sample-prompts"),
        ("evaluate.py", "runs/base", *LITTLE),
        ("evaluate.py", "runs/base-sft", *LITTLE),
    ):
        result = script(*command, cwd=folder)
        if command[0] == "evaluate.py" and shutil.which("bwrap") is None:
            continue  # what it says then is tested below
        assert result.returncode == 0, result.stderr
        for suffix, said in ((".txt", result.stdout), (".err", result.stderr)):
            (folder / f"{command[0]}-{command[1].replace('/', '-')}{suffix}").write_text(said, encoding="utf-8")
    return folder


def without_programs(folder: Path) -> str:
    """Return code for `before` that makes an empty folder the only one where programs are found."""
    folder.mkdir()
    return f"import os; os.environ['PATH'] = {str(folder)!r}"


def results(run: Path) -> dict:
    return json.loads((run / "eval.json").read_text(encoding="utf-8"))


def samples(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


@needs_bwrap
@pytest.mark.parametrize("name", ["base", "base-sft"])
def test_the_whole_table_is_printed_and_saved(work, name):
    run = work / "runs" / name
    out = (work / f"evaluate.py-runs-{name}.txt").read_text(encoding="utf-8")
    for heading in ("Language modelling", "Syntax", "Functional correctness", "Verdicts", "Memorisation", "Benchmark"):
        assert re.search(rf"^{heading}", out, re.MULTILINE), heading
    assert "sandbox: bwrap" in out and f"written to runs/{name}" in out
    assert all((run / file).is_file() for file in FILES)
    assert max(map(len, out.splitlines())) <= 130
    found = results(run)
    assert found["language_modelling"]["by_language"] and found["language_modelling"]["by_source"]
    asked = {k: v["samples_per_problem"] for k, v in found["functional"].items() if "skipped" not in v}
    assert asked == {"problems": 2} | {name: 1 for name in asked if name != "problems"}
    lines = ["problems-infill", "problems-infill-no-suffix"]
    assert asked.keys() == {"problems", "humaneval", "mbpp", *lines, *(["mbpp-3shot"] if name == "base-sft" else [])}
    assert "problems-infill: 3 lines of 3 problems" in " ".join(out.split())
    assert list(found["gold"]) == ["problems", "humaneval", "mbpp"]
    assert found["gold"]["problems"]["by_level"].keys() == {"0"} and found["gold"]["mbpp"]["problems"] == 3
    for part in (out, (run / "eval.md").read_text(encoding="utf-8")):
        assert "gold bits per byte" in part and part.index("gold bits per byte") < part.index("Syntax of samples")


@needs_bwrap
def test_a_benchmark_whose_prompts_do_not_fit_is_skipped_and_said_before_anything_is_written(work):
    out, err = ((work / f"evaluate.py-runs-base.{s}").read_text(encoding="utf-8") for s in ("txt", "err"))
    why = "3 of 3 prompts do not fit into the model's context of 512 (496 tokens, beside 16 new ones)"
    assert err.index(f"note: mbpp-3shot is skipped: {why}") < err.index("writing samples")
    assert results(work / "runs/base")["functional"]["mbpp-3shot"] == {"skipped": why}
    assert f"mbpp-3shot: skipped, {why}" in " ".join(out.split())
    assert "mbpp-3shot" not in {s["benchmark"] for s in samples(work / "runs/base")}


def test_the_default_is_small_and_full_and_named_benchmarks_are_whole():
    small = evaluate.parse([]).eval
    assert small == EvalConfig() and small.n_samples == {"problems": 10} and small.max_level == 1
    assert evaluate.parse(["--eval.full"]).eval == FULL_EVAL
    named = evaluate.parse(["runs/x", "--eval.benchmarks", "problems:10", "--eval.signatures", "3"])
    assert named.run == Path("runs/x") and not named.eval.full
    assert named.eval == replace(FULL_EVAL, full=False, benchmarks=("problems:10",), signatures=3)
    assert evaluate.parse(["--eval.full", "--eval.max-level", "0"]).eval == replace(FULL_EVAL, max_level=0)
    assert evaluate.parse(["--eval.temperature", "0.5"]).eval == replace(small, temperature=0.5)
    assert {p.level for p in asked_problems("problems", small)} == {0, 1}
    assert len(asked_problems("problems", FULL_EVAL)) == 100 and len(asked_problems("mbpp", FULL_EVAL)) == 500


@needs_bwrap
@pytest.mark.parametrize("name", ["base", "base-sft"])
def test_every_sample_is_kept_and_the_figures_are_counts_of_them(work, name):
    kept, found = samples(work / "runs" / name), results(work / "runs" / name)
    assert len(kept) == 5 + 3 * 2 + 3 + 3 + 2 * 3 + 3 * (name == "base-sft")
    for benchmark, figures in found["functional"].items():
        if "skipped" in figures:
            continue
        verdicts = [s["verdict"] for s in kept if s["benchmark"] == benchmark]
        assert figures["verdicts"] == {v: verdicts.count(v) for v in figures["verdicts"]}
        assert sum(figures["verdicts"].values()) == len(verdicts)
    whole = [s for s in kept if "-infill" not in s["benchmark"]]  # of the others, most is not the model's
    assert found["syntax"]["samples"] == len(whole)
    assert found["syntax"]["passes"] == sum(s["compiles"] for s in whole)
    assert found["syntax"]["non_trivial"] == sum(s["non_trivial"] for s in whole)
    assert found["memorisation"]["longest"] == max(s["overlap"] for s in kept)


@pytest.mark.slow
@needs_bwrap
def test_the_same_evaluation_gives_the_same_samples_with_another_batch_and_other_workers(work, tmp_path):
    shutil.copytree(work / "runs/base", tmp_path / "runs/base")
    shutil.copytree(work / "data", tmp_path / "data")
    flags = [*LITTLE, "--eval.batch-size", "3", "--eval.workers", "1"]
    result = script("evaluate.py", "base", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert samples(tmp_path / "runs/base") == samples(work / "runs/base")


@needs_bwrap
def test_runs_are_compared_side_by_side(work):
    result = script("evaluate.py", "--compare", "base", "runs/base-sft", cwd=work)
    assert result.returncode == 0, result.stderr
    assert "runs/base-sft" in result.stdout and "Comparison of 2 runs on the validation split" in result.stdout
    assert (work / "runs/base/compare.md").read_text(encoding="utf-8").startswith("# ")
    same = script("evaluate.py", "base", "--compare", "base-sft", cwd=work)
    assert same.stdout == result.stdout
    assert_one_clear_line(script("evaluate.py", "--compare", "base", cwd=work), "two")


@pytest.mark.slow
def test_texts_of_the_user_are_predicted_with_the_same_figures_for_any_stride_that_is_whole(work, corpus):
    flags = ["--eval.benchmarks", "none", "--eval.signatures", "0", "--text", str(corpus / "json/decoder.py")]
    shutil.copytree(work / "runs/base", work / "runs/texts")
    result = script("evaluate.py", "texts", *flags, cwd=work)
    assert result.returncode == 0, result.stderr
    plain = results(work / "runs/texts")["texts"]
    result = script("evaluate.py", "texts", *flags, "--eval.stride", "16", cwd=work)
    assert result.returncode == 0, result.stderr
    closer = results(work / "runs/texts")["texts"]
    (path,) = plain
    assert path.endswith("decoder.py") and "decoder.py" in result.stdout
    assert plain[path]["all"]["tokens"] == closer[path]["all"]["tokens"]
    assert plain[path]["all"]["loss"] != closer[path]["all"]["loss"]
    assert_one_clear_line(script("evaluate.py", "texts", "--text", "nowhere.txt", *flags[:4], cwd=work), "nowhere.txt")


def test_without_bubblewrap_losses_are_saved_and_no_code_is_run(work, tmp_path):
    shutil.copytree(work / "runs/base", tmp_path / "runs/base")
    result = script("evaluate.py", "base", *LITTLE, cwd=tmp_path, before=without_programs(tmp_path / "bin"))
    assert_one_clear_line(result, "bubblewrap", "apt install bubblewrap", "--sandbox none")
    found = results(tmp_path / "runs/base")
    assert found["language_modelling"]["all"]["loss"] > 0 and "bubblewrap" in found["functional"]["skipped"]
    assert found["gold"]["mbpp"]["bits_per_byte"] > 0 and "contamination" in found  # which need no sandbox
    assert {s["benchmark"] for s in samples(tmp_path / "runs/base")} == {"held-out functions"}


@needs_bwrap
@pytest.mark.parametrize("name", [pytest.param("base", marks=pytest.mark.slow), "base-sft"])
def test_samples_can_be_written_without_a_sandbox_and_graded_later(work, tmp_path, name):
    """Then all files are those of one evaluation, but for its time."""
    shutil.copytree(work / f"runs/{name}", tmp_path / f"runs/{name}")
    shutil.copytree(work / "data", tmp_path / "data")
    run, before = tmp_path / "runs" / name, without_programs(tmp_path / "bin")
    result = script("evaluate.py", name, *LITTLE, "--sandbox", "later", cwd=tmp_path, before=before)
    assert result.returncode == 0, result.stderr
    assert "--grade" in results(run)["functional"]["skipped"] and "--grade" in result.stdout
    assert {s["verdict"] for s in samples(run)} <= {"", "syntax"}
    for checkpoint in run.glob("step_*"):
        shutil.rmtree(checkpoint)  # grading needs no weights
    result = script("evaluate.py", name, "--grade", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert samples(run) == samples(work / "runs" / name)
    found, expected = results(run), results(work / "runs" / name)
    assert found.pop("seconds") != expected.pop("seconds") and found == expected
    assert "pass@1" in (run / "eval.md").read_text(encoding="utf-8")


def test_samples_that_cannot_be_graded_are_one_clear_line(work, tmp_path):
    shutil.copytree(work / "runs/base", tmp_path / "runs/base")
    run = tmp_path / "runs/base"
    assert_one_clear_line(script("evaluate.py", "base", "--grade", "--sandbox", "later", cwd=tmp_path), "--grade")
    line = json.loads((run / "samples.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    (run / "samples.jsonl").write_text(json.dumps({**line, "task_id": "none/1"}) + "\n", encoding="utf-8")
    flags = ["--grade", "--sandbox", "none"]
    assert_one_clear_line(script("evaluate.py", "base", *flags, cwd=tmp_path), "none/1", "--eval.humaneval")
    (run / "samples.jsonl").write_text("{", encoding="utf-8")
    assert_one_clear_line(script("evaluate.py", "base", *flags, cwd=tmp_path), "samples.jsonl")
    (run / "eval.json").unlink()
    assert_one_clear_line(script("evaluate.py", "base", *flags, cwd=tmp_path), "eval.json")


@pytest.mark.slow
def test_without_a_sandbox_it_says_so_and_the_results_carry_it(work, tmp_path):
    shutil.copytree(work / "runs/base", tmp_path / "runs/base")
    flags = [*LITTLE, "--eval.benchmarks", "problems:1", "--sandbox", "none"]
    result = script("evaluate.py", "base", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "WITHOUT A SANDBOX" in result.stderr and "NOT SANDBOXED" in result.stdout
    assert results(tmp_path / "runs/base")["functional"]["problems"]["sandbox"] == "none"


@needs_bwrap
def test_ctrl_c_ends_it_with_a_line_and_leaves_no_process_and_the_old_results(work):
    shutil.copytree(work / "runs/base", work / "runs/stopped")
    before = {name: (work / "runs/stopped" / name).read_bytes() for name in FILES}
    process = started("evaluate.py", "stopped", *LITTLE, "--eval.benchmarks", "problems:1000", cwd=work)
    seen = b""
    while b"writing samples" not in seen and (piece := process.stderr.read(100)):
        seen += piece
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    rest = process.communicate()[1].decode()
    assert process.returncode == 130, seen.decode() + rest
    assert "Traceback" not in rest and "interrupted" in rest
    assert {name: (work / "runs/stopped" / name).read_bytes() for name in FILES} == before
    for _ in range(600):  # the tracker of multiprocessing goes when it sees that its parent has gone
        left = subprocess.run(["pgrep", "-a", "-g", str(process.pid)], capture_output=True, text=True).stdout
        if not left:
            break
        time.sleep(0.1)
    assert not left


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"benchmarks": ("humanevil",)}, "mbpp-3shot, problems-infill, humaneval-infill, mbpp-infill, or none"),
        ({"benchmarks": ("humaneval:x",)}, "NAME:SAMPLES"),
        ({"benchmarks": ("humaneval:0",)}, "NAME:SAMPLES"),
        ({"benchmarks": ("humaneval:",)}, "NAME:SAMPLES"),
        ({"benchmarks": ("humaneval:2", "humaneval:5")}, "each once"),
        ({"benchmarks": ("none", "mbpp")}, "none alone"),
        ({"max_level": 6}, "eval.max_level must be at least 0 and at most 5"),
        ({"workers": 0}, "eval.workers must be at least 1"),
        ({"top_p": 0}, "eval.top_p must be above 0"),
        ({"memory_mb": 1}, "eval.memory_mb must be at least 64"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        EvalConfig(**settings)


def test_samples_are_counted_by_benchmark():
    assert EvalConfig(benchmarks=("problems:3", "mbpp")).n_samples == {"problems": 3, "mbpp": 1}
    assert EvalConfig(benchmarks=("none",)).n_samples == {}
    assert EvalConfig(benchmarks=("problems:3",), temperature=0.0).n_samples == {"problems": 1}


@pytest.mark.slow
@needs_bwrap
def test_only_the_losses_again_keep_what_was_measured_before(work, tmp_path):
    shutil.copytree(work / "runs/base", tmp_path / "runs/base")
    before, kept = results(tmp_path / "runs/base"), samples(tmp_path / "runs/base")
    flags = ["--eval.benchmarks", "none", "--eval.signatures", "0"]
    assert script("evaluate.py", "base", *flags, cwd=tmp_path).returncode == 0
    now = results(tmp_path / "runs/base")
    assert now["functional"] == before["functional"] and "functional" in now["kept"]
    assert samples(tmp_path / "runs/base") == kept
    result = script("evaluate.py", "base", "--split", "test", *flags, cwd=tmp_path)
    assert result.returncode == 0 and "eval-test.json" in result.stdout
    assert results(tmp_path / "runs/base") == now


def test_what_cannot_be_evaluated_is_refused_before_anything_is_measured(work):
    before = {path: path.read_bytes() for path in (work / "runs/base").glob("*.*") if path.is_file()}
    for flags, words in ((["--text", "nowhere.txt"], ["nowhere.txt"]), (["--harness", ","], ["--harness"])):
        assert_one_clear_line(script("evaluate.py", "base", *flags, cwd=work), *words)
    assert {path: path.read_bytes() for path in before} == before


def test_a_damaged_training_shard_costs_only_what_is_looked_up_in_it(work, tmp_path):
    shutil.copytree(work / "runs/base", tmp_path / "runs/base")
    shutil.copytree(work / "data", tmp_path / "data")
    for shard in (tmp_path / "data").glob("demo-*/train-00000.npy"):
        shard.write_bytes(shard.read_bytes()[:-10])
    flags = ["--eval.benchmarks", "none", "--eval.signatures", "2", "--eval.max-new-tokens", "8"]
    result = script("evaluate.py", "base", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "train-00000.npy" in results(tmp_path / "runs/base")["memorisation"]["skipped"]

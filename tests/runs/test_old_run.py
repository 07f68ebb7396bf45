"""A run and its fine-tuning that an earlier version of the code made (old_run.tar.gz) are still resumed, used and exported.

They were made when settings had other names (config_io.OLD_NAMES) and `kindling/` did not exist.
"""

import json
import re
import tarfile
from pathlib import Path

import pytest
from conftest import assert_one_clear_line, script

from kindling.config_io import with_present_flags
from kindling.runs.checkpoint import RunDirectory, verify
from kindling.runs.loading import load_model

ALIKE = [
    *("--data.sources.0.path", "corpus", "--data.sources.0.max-bytes", "None", "--data.workers", "1"),
    *("--data.val-fraction", "0.2", "--data.test-fraction", "0.2", "--data.decontaminate"),
    *("--train.batch-size", "2", "--train.compile", "off", "--train.device", "cpu", "--train.precision", "fp32"),
    *("--train.threads", "1", "--train.save-every", "4", "--train.eval-every", "4", "--train.keep-checkpoints", "1"),
    *("--train.sample-prompts", "x", "--train.max-steps", "12"),
]
PRETRAINING = [
    *("--model.block-size", "256", "--model.vocab-size", "300", "--model.n-layer", "1", "--model.n-head", "2"),
    *("--model.n-embd", "16", "--model.bigram-rows", "32", "--data.sources.0.kind", "files"),
    *("--data.stopping-strategy", "continue", "--train.log-every", "2", "--train.decay-fraction", "0.5", *ALIKE),
]
FINE_TUNING = ["--preset", "docstrings", "--data.too-long", "cut", "--train.held-out-answers", "1", *ALIKE]


@pytest.fixture
def work(tmp_path) -> Path:
    """A folder with `runs/old`, `runs/old-sft` and their data."""
    with tarfile.open(Path(__file__).with_name("old_run.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def done(result) -> str:
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_command_that_began_it_is_understood():
    old = ["--data.when-dry", "stop", "--model.pair_rows=9", "--train.decay-share", "0.5", "a.when-dry", "--x=when-dry"]
    new = ["--data.stopping-strategy", "stop", "--model.bigram-rows=9", "--train.decay-fraction", "0.5", *old[-2:]]
    assert with_present_flags(old) == new


def test_it_is_resumed_by_the_command_that_began_it(work):
    old = {"--model.bigram-rows": "--model.pair-rows", "--data.stopping-strategy": "--data.when-dry"}
    old |= {"--train.decay-fraction": "--train.decay-share"}
    out = done(script("main.py", *(old.get(word, word) for word in PRETRAINING), "--name", "old", cwd=work))
    assert "resuming at step 8" in out


def test_its_settings_are_read_by_the_names_of_now(work):
    cfg = RunDirectory(work / "runs/old").config()
    assert (cfg.data.stopping_strategy, cfg.train.decay_fraction, cfg.model.bigram_rows) == ("continue", 0.5, 32)


def test_it_is_resumed(work):
    out = done(script("main.py", *PRETRAINING, "--name", "old", cwd=work))
    assert "resuming at step 8" in out and "step 12: val loss" in out
    verify(work / "runs/old/step_000012")


def test_its_fine_tuning_is_resumed(work):
    out = done(script("sft_train.py", "runs/old", *FINE_TUNING, cwd=work))
    assert "resuming at step 8" in out and "step 12: val loss" in out


def test_it_is_fine_tuned_anew(work):
    out = done(script("sft_train.py", "runs/old", *FINE_TUNING, "--name", "new", cwd=work))
    assert "resuming" not in out and re.search(r"loss, nats a token +5\.\d+ +5\.\d+", out)


def test_it_is_evaluated_to_the_loss_that_it_had(work):
    done(script("evaluate.py", "runs/old", "--eval.benchmarks", "none", "--eval.signatures", "0", cwd=work))
    now = json.loads((work / "runs/old/eval.json").read_text(encoding="utf-8"))["language_modelling"]["all"]["loss"]
    last = [json.loads(line) for line in (work / "runs/old/metrics.jsonl").read_text(encoding="utf-8").splitlines()][-1]
    assert last["step"] == 8 and now == pytest.approx(last["val_loss"], rel=1e-4)


@pytest.mark.parametrize("form", ["hf", "int8"])
def test_it_is_exported_in_the_format_that_exports_have(work, form):
    assert "largest difference of a logit" in done(script("export.py", "runs/old-sft", "--to", form, cwd=work))
    content = (work / "runs/old-sft/export" / form / "config.json").read_text(encoding="utf-8")
    assert '"pair_rows": 32' in content and "bigram_rows" not in content


def test_its_weights_have_the_names_of_now(work):
    model, folder = load_model(RunDirectory(work / "runs/old"), "cpu")
    assert folder.name == "step_000008" and model.n_parameters() == 13_232


def test_its_vocabulary_cannot_fill_in_lines_which_is_said_before_anything_is_measured(work):
    result = script("evaluate.py", "old", "--eval.benchmarks", "humaneval-infill", cwd=work)
    assert_one_clear_line(result, "<fim_prefix>", "leave out the benchmarks that end in -infill")
    assert "held-out losses" not in result.stderr

"""The real scripts, run as a user would run them: one small run, and what happens to it."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_clear_line, script, signal_at_step, tiny_flags
from test_build import limited

from config import TokenizerConfig
from kindling.data.shards import TokenDataset
from kindling.files import with_checksum, write_json
from kindling.runs.checkpoint import RunDirectory
from kindling.runs.loading import load_model
from kindling.tokenization.train_tokenizer import train_bpe


@pytest.fixture(scope="module")
def work(tmp_path_factory, corpus) -> Path:
    """A folder in which `main.py` has trained the run `base`."""
    folder = tmp_path_factory.mktemp("work")
    result = script("main.py", *tiny_flags(corpus), "--name", "base", cwd=folder, fresh=True)
    assert result.returncode == 0, result.stderr
    (folder / "stdout.txt").write_text(result.stdout, encoding="utf-8")
    names = sorted(path.name for path in (folder / "runs/base").iterdir())  # other tests evaluate the run
    (folder / "files.txt").write_text("\n".join(names), encoding="utf-8")
    return folder


LOSSES_ONLY = ["--eval.benchmarks", "none", "--eval.signatures", "0"]


def losses_of(run: Path, name: str = "eval.json") -> dict:
    """What an evaluation says of the whole held-out split."""
    return json.loads((run / name).read_text(encoding="utf-8"))["language_modelling"]["all"]


def data_of_base(work: Path) -> Path:
    """The data folder of the run `base`, relative to `work`; other tests build others beside it."""
    manifest = json.loads((work / "runs/base/data/manifest.json").read_text(encoding="utf-8"))
    return Path("data") / manifest["fingerprint"]


def copy_of(work: Path, name: str) -> Path:
    shutil.copytree(work / "runs/base", work / "runs" / name)
    return work / "runs" / name


def test_a_first_run_ends_with_figures_samples_and_the_next_command(work):
    out = (work / "stdout.txt").read_text(encoding="utf-8")
    assert re.search(
        r"validation over the whole held-out split: loss [\d.]+, perplexity [\d.]+, [\d.]+ bits per byte", out
    )
    assert "--- sample 1, from 'import os\\n'" in out
    assert "next: python evaluate.py runs/base" in out
    assert "do not know this shape (model.activation, model.bigram_rows;" in out and "--preset portable-5m\n" in out
    assert (work / "files.txt").read_text(encoding="utf-8").splitlines() == [
        "config.yaml",
        "data",
        "metrics.csv",
        "metrics.jsonl",
        "step_000012",
        "tensorboard",
        "tokenizer.json",
    ]


def test_evaluate_repeats_the_figures_of_training_and_writes_them(work):
    result = script("evaluate.py", "runs/base", *LOSSES_ONLY, cwd=work)
    assert result.returncode == 0, result.stderr
    written = losses_of(work / "runs/base")
    last = [json.loads(x) for x in (work / "runs/base/metrics.jsonl").read_text(encoding="utf-8").splitlines()][-1]
    assert written["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    assert written["bits_per_byte"] == pytest.approx(last["val_bits_per_byte"], rel=1e-6)
    assert re.search(rf"all +{written['loss']:.4f}", result.stdout)


def test_evaluation_needs_nothing_but_the_run_and_equals_the_plain_formula(work, tmp_path):
    shutil.copytree(work / "runs/base", tmp_path / "moved")
    result = script("evaluate.py", "moved", "--split", "test", *LOSSES_ONLY, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    written = losses_of(tmp_path / "moved", "eval-test.json")
    run = RunDirectory(tmp_path / "moved")
    model, _ = load_model(run, torch.device("cpu"))
    dataset = TokenDataset(run.data, "test")
    ids = torch.from_numpy(dataset.read(0, len(dataset)))
    nll = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 32):
            piece = ids[start : start + 33]
            log_p = model(piece[None, :-1]).double().log_softmax(-1)[0]
            nll -= float(log_p.gather(1, piece[1:, None]).sum())
    results = json.loads((tmp_path / "moved/eval-test.json").read_text(encoding="utf-8"))
    assert results["split"] == "test"
    precision = 1e-5 if results["precision"] == "fp32" else 2e-3
    assert written["loss"] == pytest.approx(nll / (len(ids) - 1), rel=precision)
    assert written["bits_per_byte"] == pytest.approx(nll / math.log(2) / dataset.info.bytes, rel=precision)


def test_generate_continues_a_prompt_from_the_newest_run(work):
    first, again = (
        script("generate.py", "base", "--prompt", "def fib(n):", "--max-new-tokens", "20", cwd=work) for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("def fib(n):") and first.stdout == again.stdout


def test_a_second_start_says_that_the_run_is_complete(work, corpus):
    before = (work / "runs/base/metrics.jsonl").read_bytes()
    result = script("main.py", *tiny_flags(corpus), "--name", "base", cwd=work)
    assert result.returncode == 0 and "complete at step 12" in result.stdout
    assert (work / "runs/base/metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_more_steps_go_on_with_a_finished_run(work, corpus):
    copy_of(work, "longer")
    result = script("main.py", *tiny_flags(corpus), "--name", "longer", "--train.max-steps", "15", cwd=work)
    assert result.returncode == 0, result.stderr
    assert "train.max_steps 12 -> 15" in result.stdout and "resuming at step 12" in result.stdout
    assert (work / "runs/longer/step_000015").is_dir()


def test_a_changed_config_is_refused_field_by_field(work, corpus):
    result = script(
        "main.py", *tiny_flags(corpus), "--name", "base", "--model.n-layer", "3", "--train.lr", "0.5", cwd=work
    )
    assert_one_clear_line(result, "model.n_layer 2 -> 3", "train.lr", "-> 0.5", "--fresh")


def test_fresh_starts_over_and_keeps_the_old_run(work, corpus):
    copy_of(work, "again")
    result = script("main.py", *tiny_flags(corpus), "--name", "again", "--fresh", "--train.lr", "0.01", cwd=work)
    assert result.returncode == 0, result.stderr
    assert "kept as runs/again.old-1" in result.stdout and "resuming" not in result.stdout
    assert (work / "runs/again.old-1/step_000012/model.safetensors").is_file()


def digest_of(out: str) -> str:
    return re.search(r"state sha256 (\w+)", out)[1]


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_the_same_command_ends_in_the_same_bits(work, corpus, sent, code):
    command = ["main.py", *tiny_flags(corpus), "--name", f"stopped-{code}"]
    result = script(*command, cwd=work, before=signal_at_step(5, sent))
    assert result.returncode == code, result.stderr
    step = int(re.search(r"stopped and saved at step (\d+)", result.stdout)[1])
    assert 4 <= step <= 6 and (work / f"runs/stopped-{code}/step_{step:06d}").is_dir()
    result = script(*command, cwd=work)
    assert result.returncode == 0 and f"resuming at step {step}" in result.stdout, result.stderr
    # those of the run `base`, which nothing stopped and which has other hashes of strings
    assert digest_of(result.stdout) == digest_of((work / "stdout.txt").read_text(encoding="utf-8"))


def test_a_second_signal_ends_it_at_once(work, corpus):
    both = signal_at_step(3, signal.SIGINT, signal.SIGTERM)
    result = script("main.py", *tiny_flags(corpus), "--name", "twice", cwd=work, before=both)
    assert result.returncode in (130, 143), result.stderr
    assert (work / "runs/twice/metrics.jsonl").is_file() and not list((work / "runs/twice").glob("step_*"))


def test_a_dry_run_measures_and_writes_nothing(tmp_path, corpus):
    result = script("main.py", *tiny_flags(corpus), "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for word in ("parameters", "without positions", "memory", "tokens/s", "time "):
        assert word in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_with_the_document_mask_is_evaluated_with_it_and_not_resumed_without(work, corpus):
    flags = [*tiny_flags(corpus), "--name", "masked", "--model.document-mask"]
    result = script("main.py", *flags, "True", cwd=work)
    assert result.returncode == 0, result.stderr
    result = script("evaluate.py", "runs/masked", *LOSSES_ONLY, cwd=work)
    assert result.returncode == 0, result.stderr
    figures = []
    for name in ("masked", "base"):
        lines = (work / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        figures.append(json.loads(lines[-1])["val_loss"])
    written = losses_of(work / "runs/masked")
    assert written["loss"] == pytest.approx(figures[0], rel=1e-6)
    assert figures[0] != figures[1]
    result = script("main.py", *flags, "False", cwd=work)
    assert_one_clear_line(result, "model.document_mask True -> False", "--fresh")
    result = script("main.py", *flags, "True", "--dry-run", cwd=work)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_weights_of_another_run_start_a_new_one(work, corpus):
    result = script(
        "main.py",
        *tiny_flags(corpus),
        "--name",
        "child",
        "--train.init-from",
        "base",
        "--train.max-steps",
        "1",
        "--train.warmup-steps",
        "0",
        "--train.lr",
        "1e-12",
        "--train.muon-lr",
        "1e-12",
        cwd=work,
    )
    assert result.returncode == 0, result.stderr
    losses = [
        [
            x["val_loss"]
            for x in map(json.loads, (work / f"runs/{n}/metrics.jsonl").read_text(encoding="utf-8").splitlines())
            if "val_loss" in x
        ][-1]
        for n in ("base", "child")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_weights_of_a_run_with_another_tokenizer_are_refused(work, corpus):
    flags = [*tiny_flags(corpus), "--name", "stranger", "--train.init-from", "base", "--tokenizer.train-bytes", "1000"]
    assert_one_clear_line(
        script("main.py", *flags, cwd=work), "same tokenizer", "--tokenizer.path runs/base/tokenizer.json"
    )
    flags += [
        "--tokenizer.kind",
        "pretrained",
        "--tokenizer.path",
        "runs/base/tokenizer.json",
        "--train.max-steps",
        "1",
    ]
    result = script("main.py", *flags, cwd=work)
    assert result.returncode == 0, result.stderr


def test_two_processes_cannot_train_one_run(work, corpus):
    with RunDirectory(work / "runs/base").lock():
        assert_one_clear_line(
            script("main.py", *tiny_flags(corpus), "--name", "base", cwd=work), "one process at a time", "--name"
        )


# -- bad input --------------------------------------------------------------------------------------------------------


def test_a_flipped_byte_in_the_newest_checkpoint_is_found(work):
    run = copy_of(work, "flipped")
    raw = bytearray((run / "step_000012/model.safetensors").read_bytes())
    raw[-9] ^= 1
    (run / "step_000012/model.safetensors").write_bytes(raw)
    for name in ("evaluate.py", "generate.py"):
        assert_one_clear_line(
            script(name, "flipped", cwd=work), "step_000012", "model.safetensors has changed", "--fresh"
        )


def test_a_damaged_training_shard_stops_the_run_before_it_starts(work, corpus, tmp_path):
    shutil.copytree(work / "data", tmp_path / "data")
    shard = tmp_path / data_of_base(work) / "train-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-10])
    assert_one_clear_line(script("main.py", *tiny_flags(corpus), cwd=tmp_path), "train-00000.npy", "delete data/demo-")
    assert not list(tmp_path.glob("runs/[!.]*"))


@pytest.mark.slow
def test_data_of_another_tokenizer_or_past_the_vocabulary_is_refused(work, corpus, tmp_path):
    for content, words in (
        ({"tokenizer_sha256": "0" * 64}, ["tokenizer"]),
        ({"max_id": 512}, ["model.vocab_size=512", "holds 512"]),
    ):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        shutil.copytree(work / "data", tmp_path / "data")
        path = tmp_path / data_of_base(work) / "manifest.json"
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest.update({k: v for k, v in content.items() if k in manifest})
        manifest["splits"]["train"].update({k: v for k, v in content.items() if k not in manifest})
        write_json(path, with_checksum(manifest))
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        assert_one_clear_line(script("main.py", *tiny_flags(corpus), cwd=tmp_path), *words)


@pytest.mark.slow
def test_sources_that_changed_since_a_run_began_are_refused_once_its_shards_are_gone(work, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "repo")
    flags = tiny_flags(Path("repo"))
    assert script("main.py", *flags, cwd=tmp_path).returncode == 0
    (tmp_path / "repo/more.py").write_text("more = 1\n" * 30, encoding="utf-8")
    assert (
        script("main.py", *flags, "--train.max-steps", "13", cwd=tmp_path).returncode == 0
    )  # its own shards are still there
    shutil.rmtree(tmp_path / "data")
    assert_one_clear_line(
        script("main.py", *flags, "--train.max-steps", "14", cwd=tmp_path), "sources have changed", "--fresh"
    )


def test_a_full_disk_while_saving_is_one_line_and_loses_nothing(work, corpus, monkeypatch):
    copy_of(work, "full")
    monkeypatch.chdir(work)
    before = RunDirectory(work / "runs/full").newest()
    result = limited("main.py", 60_000, *tiny_flags(corpus), "--name", "full", "--train.max-steps", "14")
    assert_one_clear_line(result, "checkpoint of step 14", "free some space, the older checkpoints are untouched")
    assert RunDirectory(work / "runs/full").newest() == before
    assert not list((work / "runs/full").glob(".partial*"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.n-embd", "33"], ["model.n_embd", "multiple of n_head=2", "33", "32 or 34"]),
        (["--data.sources.0.path", "nowhere"], ["'nowhere'", "--data.sources.0.path"]),
        (["--model.block-size", "1000000"], ["at least one block of 1000001 tokens", "--model.block-size"]),
        (["--train.device", "cuda"], ["train.device", "cuda", "auto"]),
        (["--train.threads", "100000"], ["train.threads", "100000", "cores"]),
        (["--train.init-from", "nobody"], ["nobody"]),
        (["--preset", "smallcoder-4"], ["instructions", "fine-tuning"]),
    ],
)
def test_bad_settings_are_one_clear_line(work, tmp_path, corpus, flags, words):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    shutil.copytree(work / "data", tmp_path / "data")
    args = flags if "--preset" in flags else [*tiny_flags(corpus), *flags]
    assert_one_clear_line(script("main.py", *args, cwd=tmp_path), *words)
    assert not list(tmp_path.glob("runs/[!.]*"))


def test_fresh_leaves_the_old_run_in_place_when_the_new_one_cannot_start(work, corpus):
    run = copy_of(work, "kept")
    result = script(
        "main.py", *tiny_flags(corpus), "--name", "kept", "--fresh", "--data.sources.0.path", "nowhere", cwd=work
    )
    assert_one_clear_line(result, "'nowhere'")
    assert (run / "config.yaml").is_file() and not list((work / "runs").glob("kept.old*"))


def test_a_run_that_lost_its_config_is_not_taken_for_a_new_one(work, corpus):
    (copy_of(work, "lost") / "config.yaml").unlink()
    result = script("main.py", *tiny_flags(corpus), "--name", "lost", cwd=work)
    assert_one_clear_line(result, "must have its config.yaml", "--fresh")


@pytest.mark.slow
def test_a_foreign_or_missing_tokenizer_in_a_run_is_found(work):
    run = copy_of(work, "foreign")
    other = train_bpe(["another text"], TokenizerConfig(), 300)
    (run / "tokenizer.json").write_text(other.to_json(), encoding="utf-8")
    assert_one_clear_line(script("generate.py", "foreign", cwd=work), "tokenizer.json", "but is another", "data/demo-")
    (run / "tokenizer.json").unlink()
    assert_one_clear_line(script("evaluate.py", "foreign", cwd=work), "tokenizer.json", "but is missing", "data/demo-")


def test_text_that_the_terminal_cannot_show_is_no_error(work):
    ascii_only = "import sys; [s.reconfigure(encoding='ascii', errors='strict') for s in (sys.stdout, sys.stderr)]"
    result = script("generate.py", "base", "--prompt", "é🔥", "--max-new-tokens", "3", cwd=work, before=ascii_only)
    assert result.returncode == 0 and result.stdout.startswith("\\xe9\\U0001f525"), result.stderr


def test_damaged_heldout_data_of_a_run_says_where_it_can_be_had_again(work):
    run = copy_of(work, "heldout")
    shard = run / "data/val-00000.npy"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    result = script("evaluate.py", "heldout", *LOSSES_ONLY, cwd=work)
    assert_one_clear_line(result, "val-00000.npy", "copy the files of the same names from data/demo-")
    source = Path(re.search(r"from (data/demo-\w+)", result.stderr)[1])
    shutil.copy(work / source / "val-00000.npy", shard)
    assert script("evaluate.py", "heldout", *LOSSES_ONLY, cwd=work).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small filesystem")
def test_a_disk_that_is_really_full_loses_nothing(work, corpus, tmp_path):
    """A run on a filesystem with room for its start, but not for another checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", disk], capture_output=True).returncode:
        pytest.skip("cannot mount a small filesystem here")
    try:
        shutil.copytree(work / "data", tmp_path / "data")
        os.symlink(disk, tmp_path / "runs")
        shutil.copytree(work / "runs/base", disk / "base")
        free = shutil.disk_usage(disk).free
        (disk / "filler").write_bytes(bytes(free - 4096))
        flags = [
            *tiny_flags(corpus),
            "--name",
            "base",
            "--train.max-steps",
            "20",
            "--train.save-every",
            "2",
            "--train.log-every",
            "1",
        ]
        result = script("main.py", *flags, cwd=tmp_path)
        assert_one_clear_line(result)
        assert RunDirectory(disk / "base").newest().name == "step_000012"
        (disk / "filler").unlink()
        result = script("main.py", *flags, cwd=tmp_path)
        assert result.returncode == 0 and "resuming at step 12" in result.stdout, result.stderr
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_run_without_checkpoints_says_how_to_get_one(work):
    run = copy_of(work, "bare")
    shutil.rmtree(run / "step_000012")
    assert_one_clear_line(script("generate.py", "bare", cwd=work), "must have a checkpoint", "--name bare")


def test_help_comes_without_loading_torch(tmp_path):
    code = (
        f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r})\n"
        "for name in 'main.py', 'generate.py', 'evaluate.py', 'data_pipeline.py':\n"
        "    sys.argv = [name, '--help']\n"
        f"    try: runpy.run_path({str(ROOT)!r} + '/' + name, run_name='__main__')\n"
        "    except SystemExit as e: assert not e.code\n"
        "    assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), name\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("usage: ") == 4


MISTAKES = (
    "main.py --data.sources.0.kind files --data.sources.0.path nowhere",
    "main.py --train.init-from nosuch",
    "main.py --train.init-from bare",
    "main.py --tokenizer.kind pretrained --tokenizer.path /nowhere/tokenizer.json",
    "main.py --name old --model.n-layer 3",
    "main.py --preset tinystories",
    "main.py --tokenizer.kind pretrained --tokenizer.path nobody/nothing",
    "sft_train.py nosuch",
    "sft_train.py bare",
    "sft_train.py old --model.n-layer 3",
    "sft_train.py old --run old",
    "sft_train.py old --name new --preset alpaca --data.sources.0.kind jsonl --data.sources.0.path nowhere.jsonl",
    "evaluate.py bare",
    "evaluate.py old --text nofile",
    "evaluate.py old --eval.humaneval nobody/nothing",
    "evaluate.py --compare old bare",
    "generate.py bare",
    "generate.py old --chat",
    "export.py bare",
    "export.py old --type q8_0",
    "visualize.py bare",
    "visualize.py old --file nofile",
    "visualize.py --compare old",
    "visualize.py --compare old bare",
    "data_pipeline.py --run bare --explain x",
)


def test_a_mistake_is_answered_before_torch_is_imported(tmp_path):
    with tarfile.open(ROOT / "tests/runs/old_run.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    shutil.copytree(tmp_path / "runs/old", tmp_path / "runs/bare")
    shutil.rmtree(tmp_path / "runs/bare/step_000008")
    (tmp_path / "runs/bare/metrics.jsonl").write_text("", encoding="utf-8")
    shutil.rmtree(tmp_path / "data")
    code = (
        "import importlib, sys\nfrom kindling.errors import KindlingError\n"
        f"for line in {MISTAKES!r}:\n"
        "    name, *argv = line.split()\n"
        "    try: importlib.import_module(name.removesuffix('.py')).main(argv)\n"
        "    except KindlingError as e: print(e)\n"
        "    else: raise AssertionError(f'{line} is no mistake')\n"
        "    assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), line\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    answers = result.stdout.splitlines()
    assert len(answers) == len(MISTAKES), result.stdout  # one line each
    assert sum("http://127.0.0.1:9 does not answer" in answer for answer in answers) == 3, result.stdout


def test_config_py_lists_the_presets(tmp_path):
    result = script("config.py", cwd=tmp_path)
    assert "50,910,208" in result.stdout and "bigcode/the-stack-dedup" in result.stdout


def test_the_validation_files_are_not_in_the_training_shards(work):
    folder = work / data_of_base(work)
    train, val = (TokenDataset(folder, split) for split in ("train", "val"))
    eos = train.manifest["eos_id"]
    documents = [
        {tuple(d) for d in np.split(ids, np.flatnonzero(ids == eos) + 1) if len(d)}
        for ids in (s.read(0, len(s)) for s in (train, val))
    ]
    assert documents[0].isdisjoint(documents[1]) and documents[1]

"""The real fine-tuning script, run as a user runs it, on a small base run."""

import json
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import assert_one_clear_line, script, signal_at_step, tiny_flags
from test_examples import TASKS

from export import sample
from kindling.data import prompts
from kindling.data.build import fingerprint
from kindling.files import with_checksum, write_json
from kindling.runs.checkpoint import RunDirectory
from kindling.runs.metrics import read_metrics
from presets import preset

SMALL = ["--data.workers", "1", "--train.batch-size", "4", "--train.compile", "off", "--train.device", "cpu"]
SMALL += ["--data.val-fraction", "0.2", "--data.test-fraction", "0.2", "--data.template", "user-assistant"]
SMALL += ["--train.held-out-answers", "3", "--train.sample-prompts", "Add two numbers.", "--data.decontaminate"]


def mined(corpus: Path) -> list[str]:
    """Fine-tuning on the functions of the test corpus."""
    return [*SMALL, "--data.sources.0.path", str(corpus), "--train.max-steps", "6", "--train.eval-every", "6"]


def rows_of(path: Path, rows: list) -> list[str]:
    """Fine-tuning on the rows of a JSONL file with the columns of seed 000's data set."""
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    flags = [
        "--preset",
        "alpaca",
        "--train.micro-batch-size",
        "None",
        "--data.sources.0.kind",
        "jsonl",
        "--data.sources.0.path",
        str(path),
        "--data.near-dedup",
        "None",
    ]
    return [*SMALL, *flags, "--train.max-steps", "3"]


def good(n: int) -> dict[str, str]:
    task, answer = TASKS[n % len(TASKS)]
    return {"instruction": f"{task} ({n})", "input": "", "output": f"{answer}  # {n}"}


def digest_of(out: str) -> str:
    return re.search(r"state sha256 (\w+)", out)[1]


@pytest.fixture(scope="module")
def work(tmp_path_factory, corpus) -> Path:
    """A folder in which `base` was pre-trained and then fine-tuned."""
    folder = tmp_path_factory.mktemp("work")
    flags = [*tiny_flags(corpus), "--model.block-size", "128", "--train.max-steps", "4"]
    result = script("main.py", *flags, "--name", "base", cwd=folder)
    assert result.returncode == 0, result.stderr
    result = script("sft_train.py", *mined(corpus), cwd=folder)
    assert result.returncode == 0, result.stderr
    (folder / "stdout.txt").write_text(result.stdout, encoding="utf-8")
    return folder


@pytest.fixture
def out(work) -> str:
    return (work / "stdout.txt").read_text(encoding="utf-8")


def test_it_fine_tunes_the_newest_pre_trained_run_and_says_what_changed(work, out):
    run = RunDirectory(work / "runs/base-sft")
    cfg, base = run.config(), RunDirectory(work / "runs/base")
    assert cfg.train.init_from == "runs/base" and cfg.model == base.config().model
    assert run.tokenizer().sha256 == base.tokenizer().sha256
    assert re.search(r"loss, nats a token +[\d.]+ +[\d.]+ +[-+]\d+%\n +perplexity +[\d.]+ +[\d.]+ +[-+]\d+%", out)
    assert "--- sample 1: Add two numbers.\n" in out
    assert "next: python generate.py runs/base-sft --chat" in out
    evals = [line for line in read_metrics(run.path / "metrics.jsonl") if "val_loss" in line]
    assert [line["step"] for line in evals] == [0, 6] and evals[1]["val_loss"] < evals[0]["val_loss"]


def test_the_audit_comes_first_and_adds_up(out):
    table = out[: out.index("--- one example")]
    counts = {k.strip(): int(n.replace(",", "")) for k, n in re.findall(r"^( *\S.*?) +([\d,]+)$", table, re.MULTILINE)}
    dropped = sum(n for name, n in counts.items() if name.startswith("dropped: "))
    assert counts["read"] == counts["kept"] + dropped and counts["dropped: too long"] > 0
    splits = [
        int(n.replace(",", "")) for n in re.search(r"^examples +([\d,]+) +([\d,]+) +([\d,]+)$", table, re.M).groups()
    ]
    assert sum(splits) == counts["kept"] and min(splits) > 0
    assert f"audit: all {counts['kept']:,} examples are supervised on their response and its end" in out
    assert re.search(r"\[\[    .*<\|endoftext\|>\]\]", out, re.DOTALL)


def test_the_answers_to_held_out_instructions_are_kept(work, out):
    lines = (work / "runs/base-sft/answers.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line) for line in lines]
    assert len(answers) == 3 and all(a["prompt"].startswith("User: ") for a in answers)
    stopped = sum(a["stopped"] for a in answers)
    assert f"{stopped} of 3 answers to held-out instructions stopped by themselves" in out


def test_the_mined_examples_of_a_file_are_all_in_one_split(work, corpus):
    import gzip

    (folder,) = (work / "data").glob("docstrings-*")
    with gzip.open(folder / "documents.jsonl.gz", "rt", encoding="utf-8") as f:
        kept = [line for line in map(json.loads, f) if "split" in line]
    splits: dict[str, set[str]] = {}
    for line in kept:
        splits.setdefault(line["key"].split(":")[0], set()).add(line["split"])
    assert len(splits) > 10 and all(len(s) == 1 for s in splits.values())
    assert set.union(*splits.values()) == {"train", "val", "test"}


def test_two_builds_with_one_and_two_workers_are_the_same_bytes(work, corpus, tmp_path):
    (expected,) = (work / "data").glob("docstrings-*")
    (tmp_path / "runs").mkdir()
    shutil.copytree(work / "runs/base", tmp_path / "runs/base")
    result = script("sft_train.py", *mined(corpus), "--data.workers", "2", "--audit", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (found,) = (tmp_path / "data").glob("docstrings-*")
    assert [p.name for p in sorted(found.iterdir())] == [p.name for p in sorted(expected.iterdir())]
    for path in found.iterdir():
        assert path.read_bytes() == (expected / path.name).read_bytes(), path.name
    assert "this was the audit alone" in result.stdout and not (tmp_path / "runs/base-sft").exists()


def test_the_same_command_says_that_the_run_is_complete(work, corpus, out):
    result = script("sft_train.py", *mined(corpus), cwd=work)
    assert result.returncode == 0, result.stderr
    assert "the run is complete at step 6" in result.stdout
    assert digest_of(result.stdout) == digest_of(out)
    before = re.search(r"perplexity +([\d.]+)", out)[1]
    assert re.search(
        rf"perplexity +{before} ", result.stdout
    )  # the value from before the first step is known after resuming too


@pytest.mark.parametrize("packing", ["True", pytest.param("False", marks=pytest.mark.slow)])
def test_ctrl_c_saves_and_the_same_command_ends_in_the_same_bits(work, corpus, packing):
    flags = [*mined(corpus), "--train.max-steps", "12", "--train.packing", packing, "--train.log-every", "1"]
    flags += ["--train.held-out-answers", "0", "--train.sample-prompts"]
    whole = script("sft_train.py", "runs/base", *flags, "--name", f"whole-{packing}", cwd=work)
    assert whole.returncode == 0, whole.stderr
    command = ["sft_train.py", "runs/base", *flags, "--name", f"stopped-{packing}"]
    result = script(*command, cwd=work, before=signal_at_step(6, signal.SIGINT))
    assert result.returncode == 130, result.stderr
    step = int(re.search(r"stopped and saved at step (\d+)", result.stdout)[1])
    result = script(*command, cwd=work)
    assert result.returncode == 0 and f"resuming at step {step}" in result.stdout, result.stderr
    assert digest_of(result.stdout) == digest_of(whole.stdout)


@pytest.mark.slow
def test_a_run_does_not_go_on_from_a_base_that_has_changed(work, corpus, tmp_path):
    shutil.copytree(work / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("whole*", "stopped*"))
    shutil.copytree(work / "data", tmp_path / "data")
    flags = [*tiny_flags(corpus), "--model.block-size", "128", "--train.max-steps", "5", "--name", "base"]
    assert script("main.py", *flags, cwd=tmp_path).returncode == 0
    result = script("sft_train.py", *mined(corpus), "--train.max-steps", "8", cwd=tmp_path)
    assert_one_clear_line(result, "runs/base-sft", "runs/base has been trained since", "--fresh")
    result = script("sft_train.py", *mined(corpus), "--fresh", cwd=tmp_path)
    assert result.returncode == 0 and "the old run is kept as runs/base-sft.old-1" in result.stdout, result.stderr


def test_evaluation_of_a_fine_tuned_run_is_that_of_its_responses(work, out):
    flags = ["--eval.benchmarks", "none", "--eval.signatures", "0"]
    result = script("evaluate.py", "runs/base-sft", *flags, cwd=work)
    assert result.returncode == 0, result.stderr
    after = re.search(r"loss, nats a token +[\d.]+ +([\d.]+)", out)[1]
    assert re.search(rf"all +{after} ", result.stdout) and "bits per byte" in result.stdout


def test_an_export_is_compared_on_held_out_text_that_holds_no_padding(work):
    run = RunDirectory(work / "runs/base-sft")
    rows = sample(run)  # (B, T)
    heldout = run.heldout("val")
    padded = next(iter(heldout.in_order(run.config().model, len(rows)))).idx
    assert rows.flatten().tolist() == heldout.read(0, rows.numel()).tolist()
    assert padded[:, -1].tolist() == [1] * len(padded)  # that id is of padding: what is evaluated is no text throughout


def test_a_chat_answers_over_a_pipe(work):
    flags = ("runs/base-sft", "--chat", "--max-new-tokens", "5")
    result = script("generate.py", *flags, cwd=work, given="Add two numbers.\n")
    assert result.returncode == 0 and result.stdout.strip(), result.stderr


# -- rows of all kinds ------------------------------------------------------------------------------------------------


def test_bad_rows_are_counted_by_their_reason_and_the_others_are_trained_on(work, tmp_path):
    bad = [
        ("unreadable", {"instruction": "x"}),
        ("unreadable", {"instruction": 7, "input": "", "output": "y"}),
        ("unreadable", {"instruction": "x", "input": [], "output": "y"}),
        ("unreadable", ["not", "an", "object"]),
        ("unreadable", "{ cut off\n"),
        ("empty instruction", {"instruction": " ", "output": "y"}),
        ("empty response", {"instruction": "x", "output": "\n"}),
        ("template marker", {"instruction": "x", "output": "y\nUser: z"}),
        ("control token", {"instruction": "x", "output": "y<|endoftext|>"}),
        ("not UTF-8", {"instruction": "x", "output": "\ud800"}),
        ("NUL", {"instruction": "x", "output": "a\0b"}),
        ("prompt too long", {"instruction": "why " * 200, "output": "y"}),
        ("too long", {"instruction": "x", "output": "why " * 200}),
        ("duplicate", good(0)),
    ]
    rows = [*map(good, range(60)), {"instruction": "Print <|endoftext|>.", "output": "print(1)"}, *(r for _, r in bad)]
    result = script("sft_train.py", "runs/base", *rows_of(tmp_path / "rows.jsonl", rows), "--name", "rows", cwd=work)
    assert result.returncode == 0, result.stderr
    found = dict(re.findall(r"^  dropped: (.*?) +(\d+)$", result.stdout, re.MULTILINE))
    rules = [rule for rule, _ in bad]
    assert found == {rule: str(rules.count(rule)) for rule in rules}
    assert re.search(r"^kept +61$", result.stdout, re.MULTILINE)
    assert re.search(r"^  control token kept as text +1$", result.stdout, re.MULTILINE)


def test_cut_responses_are_counted_and_pass_the_audit(work, tmp_path):
    rows = [good(n) | {"output": good(n)["output"] * (1 + n % 9)} for n in range(60)]
    flags = [*rows_of(tmp_path / "rows.jsonl", rows), "--data.too-long", "cut", "--audit"]
    result = script("sft_train.py", "runs/base", *flags, "--name", "cut", cwd=work)
    assert result.returncode == 0, result.stderr
    assert int(re.search(r"response cut to the context +(\d+)", result.stdout)[1]) > 3
    assert "audit: all 60 examples" in result.stdout and re.search(r"longest, in tokens +129 ", result.stdout)


def test_conversations_train_and_chat_with_their_history(work, tmp_path):
    chats = [
        [{"role": role, "content": f"{text} {n}"} for text in ("one", "two") for role in ("user", "assistant")]
        for n in range(60)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": c}) + "\n" for c in chats), encoding="utf-8")
    source = [*rows_of(tmp_path / "rows.jsonl", []), "--data.sources.0.path", str(path)]
    source += ["--data.sources.0.messages-field", "messages"]
    source += [f"--data.sources.0.{field}-field=None" for field in ("input", "response")]
    result = script("sft_train.py", "runs/base", *source, "--name", "chats", cwd=work)
    assert result.returncode == 0, result.stderr
    assert "[[one 0<|endoftext|>]]\nUser: two 0\nAssistant:[[two 0<|endoftext|>]]" in re.sub(r"\d+", "0", result.stdout)
    manifest = json.loads((work / "runs/chats/data/manifest.json").read_text(encoding="utf-8"))
    assert manifest["max_exchanges"] == 2


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["nowhere"], ["nowhere", "must be the folder of a run", "runs/base"]),
        (["runs/base", "--model.n-layer", "3"], ["model.n_layer", "base run's", "--model.n-layer"]),
        (["runs/base", "--tokenizer.kind", "handwritten"], ["tokenizer.kind", "base run's"]),
        (["runs/base", "--preset", "demo"], ["demo", "holds documents", "docstrings"]),
        (["runs/base", "--name", "new", "--data.sources.0.path", "nowhere"], ["'nowhere'", "--data.sources.0.path"]),
        (["runs/base", "--train.epochs", "0"], ["train.epochs", "above 0"]),
        (["runs/base", "--name", "a/b"], ["name", "a/b", "slashes"]),
        (["runs/base", "--name", "base"], ["name", "differ from the base run's"]),
        (
            ["runs/base", "--data.sources.0.kind", "jsonl", "--data.sources.0.path", "x"],
            ["docstrings", "--preset alpaca"],
        ),
        (["--preset", "smallcoder-4"], ["smallcoder-3", "must be the folder of a run"]),
    ],
)
def test_what_cannot_be_done_is_one_clear_line(work, flags, words):
    assert_one_clear_line(script("sft_train.py", *flags, cwd=work), *words)


def test_without_a_pre_trained_run_it_says_how_to_get_one(tmp_path):
    assert_one_clear_line(script("sft_train.py", cwd=tmp_path), "pre-trained run", "python main.py")


def test_a_base_without_its_tokenizer_is_one_clear_line(work, tmp_path):
    (tmp_path / "runs").mkdir()
    shutil.copytree(work / "runs/base", tmp_path / "runs/base")
    (tmp_path / "runs/base/tokenizer.json").unlink()
    assert_one_clear_line(script("sft_train.py", cwd=tmp_path), "tokenizer.json", "missing", "copy it back")


def test_a_base_with_the_tokenizer_of_another_is_one_clear_line(work, tmp_path):
    (tmp_path / "runs").mkdir()
    shutil.copytree(work / "runs/base", tmp_path / "runs/base")
    path = tmp_path / "runs/base/tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["merges"].pop()
    path.write_text(json.dumps(content), encoding="utf-8")
    assert_one_clear_line(script("sft_train.py", cwd=tmp_path), "tokenizer.json", "another", "copy it back")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], ["train split must not be empty"]),
        ([{"question": "x", "answer": "y"}] * 3, ["unreadable 3", "the column 'instruction'", "question, answer"]),
        ([{"instruction": "x", "output": ""}] * 3, ["empty response 3"]),
    ],
)
def test_a_file_without_one_good_row_is_one_clear_line_that_says_why(work, tmp_path, rows, words):
    result = script("sft_train.py", "runs/base", *rows_of(tmp_path / "rows.jsonl", rows), "--name", "none", cwd=work)
    assert_one_clear_line(result, *words)
    assert not (work / "runs/none").exists()


@pytest.mark.slow
def test_a_changed_template_is_noticed_wherever_it_would_be_used(work, corpus):
    folder = work / "runs/base-sft/data"
    saved = (folder / "manifest.json").read_text(encoding="utf-8")
    manifest = json.loads(saved)
    before = dict(manifest)
    manifest["template"] = manifest["template"].replace("Assistant:", "Assistant: ")  # as if prompts.py had been edited
    try:
        write_json(folder / "manifest.json", with_checksum(manifest))
        assert_one_clear_line(script("generate.py", "runs/base-sft", "--chat", cwd=work), "user-assistant", "--fresh")
        shards = work / "data" / manifest["fingerprint"] / "manifest.json"
        write_json(shards, with_checksum(manifest))
        assert_one_clear_line(script("sft_train.py", *mined(corpus), cwd=work), "user-assistant", "--fresh")
    finally:
        for path in (folder / "manifest.json", shards):
            path.write_text(json.dumps(before), encoding="utf-8")


def test_what_became_of_a_function_can_be_asked(work, corpus):
    result = script("sft_train.py", *mined(corpus), "--explain", "json/decoder.py", cwd=work)
    assert result.returncode == 0, result.stderr
    assert "json/decoder.py:JSONDecoder." in result.stdout and "dropped by the rule 'prompt too long'" in result.stdout


@pytest.mark.slow
def test_a_sample_instruction_that_does_not_fit_loses_nothing(work, corpus):
    flags = [*mined(corpus), "--train.sample-prompts", "why " * 300]
    result = script("sft_train.py", *flags, cwd=work)
    assert result.returncode == 0, result.stderr
    assert "(a question must leave room" in result.stdout and "stopped by themselves" in result.stdout


def test_examples_are_built_anew_for_another_context_or_another_wording_of_the_template(corpus, monkeypatch):
    cfg = preset("docstrings")
    same = fingerprint(cfg, [None])
    assert fingerprint(replace(cfg, train=replace(cfg.train, lr=1.0)), [None]) == same
    assert fingerprint(replace(cfg, model=replace(cfg.model, block_size=128)), [None]) != same
    monkeypatch.setattr(prompts, "ALPACA_INPUT", prompts.ALPACA_INPUT + " ")
    assert fingerprint(cfg, [None]) != same


@pytest.mark.slow
def test_an_extended_fine_tuning_ends_with_the_bits_of_one_that_was_planned_for_its_end(work, corpus):
    plan = [*SMALL, "--data.sources.0.path", str(corpus), "--train.warmup-steps", "1", "--train.decay-fraction", "0.4"]
    for name, steps in (("planned", "9"), ("short", "6")):
        result = script("sft_train.py", "base", *plan, "--name", name, "--train.max-steps", steps, cwd=work)
        assert result.returncode == 0, result.stderr
        (work / f"{name}.txt").write_text(result.stdout, encoding="utf-8")
    longer = script("sft_train.py", "--train.extend", "short", "--train.max-steps", "9", cwd=work)
    assert longer.returncode == 0, longer.stderr
    assert re.search(r"runs/short-longer goes on from step \d of runs/short", longer.stdout)
    assert digest_of(longer.stdout) == digest_of((work / "planned.txt").read_text(encoding="utf-8"))

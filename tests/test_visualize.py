"""The script on a small run, called as main() and once as a user would."""

import html
import json
import re
import shutil

import pytest
from conftest import assert_one_clear_line, make_run, script

import visualize
from config import ModelConfig
from kindling.errors import KindlingError
from kindling.files import with_checksum, write_json
from kindling.plots import figures, run_report
from kindling.plots.inspection import given_text
from kindling.runs.checkpoint import RunDirectory, weights_sha256
from visualize import main, write_all

PLOTS = {"training_curves", "attention", "weights", "spectral_norms", "token_loss", "layer_0", "layer_1"}
METRICS = [
    {"step": 2, "tokens": 256, "loss": 5.5, "lr": 0.1, "grad_norm": 1.0, "elapsed_s": 1.0, "skipped_steps": 0},
    {"step": 4, "tokens": 512, "loss": None, "lr": 0.1, "grad_norm": 1.0, "elapsed_s": 2.0, "skipped_steps": 1},
    {"step": 4, "val_loss": 5.0, "val_perplexity": 148.4, "val_bits_per_byte": 2.5},
]


def drawable(path, corpus, model: ModelConfig | None = None) -> RunDirectory:
    """Write a run with the record of a training."""
    run = make_run(path, corpus, model)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS), encoding="utf-8")
    return run


@pytest.fixture(scope="module")
def original(tmp_path_factory, corpus) -> RunDirectory:
    """A run that was drawn once; tests that change it take a copy."""
    run = drawable(tmp_path_factory.mktemp("runs") / "tiny", corpus)
    assert main([str(run.path)]) == 0
    return run


@pytest.fixture
def run(original, tmp_path) -> RunDirectory:
    """A copy of the run as it was before it was drawn."""
    shutil.copytree(original.path, tmp_path / "tiny", ignore=shutil.ignore_patterns("plots", "report.html"))
    return RunDirectory(tmp_path / "tiny")


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves out the drawing, which takes seconds, where the test is of something else."""
    monkeypatch.setattr(visualize, "draw", lambda subject, text: {})
    monkeypatch.setattr(run_report, "NEW_TOKENS", 2)


def drawn(run: RunDirectory) -> set:
    return {p.stem for p in (run.path / "plots").rglob("*.png")}


def untouched(run: RunDirectory) -> bool:
    return not (run.path / "plots").exists() and not (run.path / "report.html").exists()


def test_all_plots_and_the_report_are_written_and_nothing_else(original):
    assert drawn(original) == PLOTS
    assert not list(original.path.rglob("*.partial"))
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (original.path / "plots").rglob("*.png"))


def test_the_report_is_one_file_that_loads_nothing(original):
    text = (original.path / "report.html").read_text(encoding="utf-8")
    assert len(text) < 2_000_000
    assert not re.search(r"<script|<link|url\(|https?://", re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL))
    assert text.count('src="data:image/png;base64,') == text.count("<img ") == 5


def test_the_report_has_facts_validation_data_config_and_samples(original):
    text = html.unescape((original.path / "report.html").read_text(encoding="utf-8"))
    wanted = [weights_sha256(original.checkpoints()[0]), "perplexity 148.40", "not evaluated yet", "kept", "n_layer: 2"]
    for words in [*wanted, "Sample 1", "2 layers, 32 wide", "files"]:
        assert words in text, words


def test_what_the_model_wrote_is_no_markup_in_the_report(run, undrawn):
    evil = "</pre><script>alert(1)</script>\x1b[2J"
    results = {"format": 2, "weights_sha256": weights_sha256(run.checkpoints()[0]), "run": evil}
    (run.path / "eval.json").write_text(json.dumps(results), encoding="utf-8")
    row = {
        "benchmark": evil,
        "task_id": "1",
        "verdict": evil,
        "compiles": False,
        "text": evil,
        "program": f"def f():{evil}",
    }
    (run.path / "samples.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert main([str(run.path)]) == 0
    text = (run.path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text and "\x1b" not in text and "&lt;script&gt;" in text


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"verdict": "", "compiles": True, "non_trivial": True}, "compiles"),
        ({"verdict": "", "compiles": True, "non_trivial": False}, "compiles, but does nothing"),
        ({"verdict": "", "compiles": False}, "no statement of its own"),
        ({"verdict": "syntax", "reason": "line 7: odd", "compiles": False}, "does not compile, line 7: odd"),
        ({"verdict": "wrong", "reason": "a test failed", "compiles": True}, "wrong, a test failed"),
        ({"verdict": "passed", "compiles": True}, "passed"),
    ],
)
def test_every_sample_of_an_evaluation_has_a_verdict(row, said):
    row = {"benchmark": "held-out functions", "task_id": "1", "reason": "", "text": "x", "program": "x", **row}
    assert run_report._graded(row).verdict == said


def test_samples_that_the_report_makes_say_how_they_ended(original):
    text = (original.path / "report.html").read_text(encoding="utf-8")
    said = re.findall(r"<p>Sample \d <strong>(.*?)</strong></p>", text)
    assert len(said) == 3 and set(said) <= {"ended by itself", "cut after 120 tokens"}


def test_the_report_shows_what_the_run_wrote_to_one_prompt_during_training(run, undrawn):
    rows = [
        {"step": step, "prompt": p, "text": f"{p}<{step}>"} for step in range(10, 100, 10) for p in ("a = ", "b = ")
    ]
    lines = [json.dumps(row) for row in rows] + ["torn", json.dumps({"step": None})]
    (run.path / run_report.DURING).write_text("\n".join(lines), encoding="utf-8")
    assert main([str(run.path)]) == 0
    text = (run.path / "report.html").read_text(encoding="utf-8")
    section = re.search(r"<h2>What it wrote during training</h2>.*?</section>", text, re.DOTALL)[0]
    assert "The last 6 of 9 times, always from the same prompt." in section
    shown = re.findall(r"<p>Step (\d+)</p>\n<pre><span class=\"prompt\">a = </span>&lt;(\d+)&gt;</pre>", section)
    assert shown == [(str(step), str(step)) for step in range(40, 100, 10)]


def test_a_run_without_samples_from_training_has_no_section_for_them(original):
    assert "during training</h2>" not in (original.path / "report.html").read_text(encoding="utf-8")


def test_the_report_says_which_text_is_drawn_and_why_the_losses_differ(original):
    text = html.unescape((original.path / "report.html").read_text(encoding="utf-8"))
    assert re.search(
        r"The text is \d+ of [\d,]+ tokens of document \d+ of the val split.*; a typical one: its loss of", text
    )
    assert "A gap between them is not overfitting; a validation loss that rises is." in text


def test_results_of_other_weights_are_not_shown(run, undrawn):
    results = {"format": 2, "weights_sha256": "0" * 64, "syntax": {"samples": 77, "passes": 1, "non_trivial": 1}}
    (run.path / "eval.json").write_text(json.dumps(results), encoding="utf-8")
    (run.path / "samples.jsonl").write_text(json.dumps({"benchmark": "stale", "text": "x"}) + "\n", encoding="utf-8")
    assert main([str(run.path)]) == 0
    text = (run.path / "report.html").read_text(encoding="utf-8")
    assert "of other weights" in text and "stale" not in text


def test_a_file_longer_than_the_context_is_drawn_from_its_beginning(run, tmp_path):
    (tmp_path / "long.py").write_text("def f(x):\n    return x\n" * 100, encoding="utf-8")
    flags = visualize.Flags(file=tmp_path / "long.py")
    given = visualize.require(flags, run)
    assert given_text(run.tokenizer(), given, 32, "it", crop=True).what == "the first 32 tokens of it"


@pytest.mark.parametrize("raw", ["x = 1\n".encode("utf-16-le"), "x = 1\n".encode("utf-16"), b"caf\xe9"])
def test_a_file_that_is_not_utf_8_is_refused_before_any_work(raw, run, tmp_path):
    (tmp_path / "a.py").write_bytes(raw)
    with pytest.raises(KindlingError, match="--file must be a readable text in UTF-8"):
        visualize.require(visualize.Flags(file=tmp_path / "a.py"), run)


@pytest.mark.slow  # draws all again
def test_a_run_without_metrics_is_drawn_and_says_so_and_a_text_must_be_utf_8(run, capsys):
    (run.path / "metrics.jsonl").unlink()
    with pytest.raises(KindlingError, match="--text must be a text in UTF-8"):
        main([str(run.path), "--text", "caf\udce9"])  # a byte of Latin-1
    assert main([str(run.path)]) == 0
    assert drawn(run) == PLOTS - {"training_curves"}
    assert "no metrics.jsonl" in capsys.readouterr().err


@pytest.mark.slow  # imports transformers
def test_a_transformers_backbone_with_one_head_is_drawn(tmp_path, corpus):
    model = ModelConfig(
        block_size=32, vocab_size=512, n_layer=1, n_head=1, n_embd=16, backbone="transformers", activation="gelu_new"
    )
    run = drawable(tmp_path / "gpt2", corpus, model)
    assert main([str(run.path), "--text", "x = 'é'\n"]) == 0
    assert drawn(run) == PLOTS - {"layer_1"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--text", ""], "--text must hold some text"),
        (["--text", "x = 1\n" * 200], "context of 32 tokens"),
        (["--file", "missing.py"], "--file must be a readable text"),
        (["--file", "missing.py", "--text", "x"], "only one of --text and --file"),
    ],
)
def test_a_text_that_cannot_be_drawn_is_refused_in_one_line(run, flags, words):
    with pytest.raises(KindlingError, match=words) as error:
        main([str(run.path), *flags])
    assert "\n" not in str(error.value) and untouched(run)


def test_a_run_without_checkpoints_is_refused(run):
    shutil.rmtree(run.checkpoints()[0])
    with pytest.raises(KindlingError, match="must have a checkpoint"):
        main([str(run.path)])
    assert untouched(run)


def test_a_damaged_checkpoint_is_one_clear_line(run, tmp_path):
    weights = run.checkpoints()[0] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    result = script("visualize.py", run.path, cwd=tmp_path)
    assert_one_clear_line(result, "model.safetensors has changed")
    assert untouched(run)


def test_a_place_that_cannot_be_written_is_refused_and_leaves_what_was_there(run, monkeypatch):
    (run.path / "plots").write_text("a file", encoding="utf-8")
    monkeypatch.setattr(visualize, "draw", lambda subject, text: {"layer.png": b"x"})
    with pytest.raises(KindlingError, match="must be writable for the plots"):
        main([str(run.path)])
    assert (run.path / "plots").read_text(encoding="utf-8") == "a file"
    assert not (run.path / "report.html").exists()


def test_all_files_are_written_or_none(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "b").write_bytes(b"a file, where a folder is wanted")
    with pytest.raises(KindlingError):
        write_all(tmp_path, {"a": b"new", "b/c": b"x"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"] and (tmp_path / "a").read_bytes() == b"old"


def test_curves_of_several_runs_are_drawn_in_the_folder_of_the_first(run, original, capsys):
    assert main(["--compare", str(run.path), str(original.path)]) == 0
    assert drawn(run) == {"compare_curves"}
    assert "different" not in capsys.readouterr().err


def test_a_comparison_says_when_tokenizers_and_texts_differ(run, original, capsys):
    manifest = json.loads((run.data / "manifest.json").read_text(encoding="utf-8"))
    manifest["tokenizer_sha256"] = "0" * 64
    manifest["splits"]["val"]["bytes"] += 1
    write_json(run.data / "manifest.json", with_checksum(manifest))
    assert main([str(run.path), "--compare", str(original.path)]) == 0
    said = capsys.readouterr().err
    assert "different tokenizers" in said and "hold out different texts" in said


def test_curves_of_different_parts_of_a_split_are_drawn_apart(run, original, monkeypatch, capsys):
    n_whole = run.heldout("val").n_targets
    drawn_figures, real = [], figures.compare_curves
    monkeypatch.setattr(
        figures, "compare_curves", lambda *given: drawn_figures.append(real(*given)) or drawn_figures[-1]
    )
    for n_read, n_panels in ((n_whole, 1), (64, 2)):
        lines = [{"step": 0, "val_loss": 9.0, "val_bits_per_byte": 8.0, "val_tokens": n_read}]
        (run.path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
        assert main([str(run.path), "--compare", str(original.path)]) == 0
        titles = [ax.get_title(loc="left") for ax in drawn_figures[-1].axes]
        for measure in ("Validation loss", "Validation bits per byte"):
            assert sum(title.startswith(measure) for title in titles) == n_panels
        said = capsys.readouterr().err
        assert ("on 64 tokens" in said and "on the whole" in said) == (n_panels == 2)


@pytest.mark.parametrize("twice", [False, True])
def test_a_comparison_of_one_run_is_refused(run, twice):
    with pytest.raises(KindlingError, match="two or more different runs"):
        main(["--compare", *[str(run.path)] * (1 + twice)])
    assert visualize.CURVES not in {p.name for p in run.path.rglob("*")}

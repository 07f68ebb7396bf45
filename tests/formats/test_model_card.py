"""The card of a run: figures that are in the run's files, front matter that parses, and code that runs as it stands."""

import json
import re
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import tiny_config
from test_report import benchmark, language_modelling, made_losses
from test_tables import assert_valid_tables

from config import SourceConfig
from kindling.config_io import to_yaml
from kindling.data.build import prepare
from kindling.evaluation import report, results_file
from kindling.files import write_atomic
from kindling.formats import hf_format
from kindling.formats.model_card import card
from kindling.runs.checkpoint import CheckpointError, RunDirectory, weights_sha256
from model import build_model

LINES = [
    {"step": 10, "tokens": 1280, "loss": 5.5, "elapsed_s": 3.0, "skipped_steps": 0},
    {"step": 12, "tokens": 1536, "loss": 5.25, "elapsed_s": 4.4, "skipped_steps": 2},
    {"step": 12, "val_loss": 5.125, "val_perplexity": 168.2, "val_bits_per_byte": 2.5},
    {"step": 20, "tokens": 2560, "loss": 1.0, "elapsed_s": 9.0, "skipped_steps": 7},
]
STATE = {"environment": {"device": "cuda", "precision": "bf16", "threads": 1, "torch": "2.13.0", "compiled": True}}


@pytest.fixture(scope="module")
def data(corpus, tmp_path_factory):
    """A config and the shards that it describes."""
    cfg = tiny_config(corpus)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("data"))
        return cfg, prepare(cfg).resolve()


@pytest.fixture
def made(data, tmp_path):
    """A run with one checkpoint, and the checkpoint's folder."""
    cfg, folder = data
    run = RunDirectory(tmp_path / "runs" / "tiny")
    run.create(cfg, folder)
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
    return run, run.save(12, build_model(cfg.model), STATE)


def evaluate(run, folder, **more):
    losses = made_losses()
    results = {"format": results_file.FORMAT, "run": "tiny", "checkpoint": folder.name, "split": "val"}
    results |= {"weights_sha256": weights_sha256(folder), "language_modelling": language_modelling(losses)}
    results |= {"functional": {"problems": benchmark([["a", 10, 3]] * 8)}, **more}
    results_file.save_results(run.path, results, losses)
    return report.markdown(results, losses)


def front(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)---\n", text, re.DOTALL)[1])


def cells(text: str) -> dict[str, list[str]]:
    """Return the rows of all tables by their first cell; of two with the same, the first."""
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in reversed(rows)}


def test_every_figure_is_that_of_the_runs_files_up_to_the_checkpoint(made):
    run, checkpoint = made
    text = card(run, "tiny", checkpoint, ["model.safetensors"])
    assert_valid_tables(text)
    found = cells(text)
    assert found["parameters"] == [f"{run.config().model.n_parameters:,}"]
    assert (found["steps"], found["tokens"], found["seconds of training"]) == (["12"], ["1,536"], ["4"])
    assert found["on"] == ["cuda, bf16, torch 2.13.0"]
    assert found["last training loss"] == ["5.2500 nats a token"]
    assert found["validation loss"] == ["5.1250 nats a token"]
    assert found["steps skipped, their gradient being no number"] == ["2"]
    ledger = json.loads((run.data / "ledger.json").read_text(encoding="utf-8"))
    assert found["read"][0] == f"{sum(row['read'][0] for row in ledger['rows']):,}"
    assert found["kept"][0] == f"{sum(row['kept'][0] for row in ledger['rows']):,}"
    manifest = json.loads((run.data / "manifest.json").read_text(encoding="utf-8"))
    assert found["train"][1] == f"{manifest['splits']['train']['tokens']:,}"
    assert "`model.safetensors`" in text


def test_what_is_not_known_is_left_out(made):
    run, checkpoint = made
    (run.path / "metrics.jsonl").unlink()
    (checkpoint / "state.pt").unlink()
    text = card(run, "tiny", checkpoint)
    assert not {"tokens", "on", "validation loss", "last training loss", "seconds of training"} & cells(text).keys()
    assert "Evaluation on" not in text and "None" not in text and "nan" not in text and "Files" not in text


def test_the_front_matter_is_what_the_hub_wants(made):
    run, checkpoint = made
    text = card(run, "tiny", checkpoint)
    assert front(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["kindling", "code", "python"],
        "language": ["code"],
    }
    assert "# license: choose one" in text and "No licence is chosen here" in text


def test_data_sets_of_the_hub_are_named_and_paths_of_this_machine_are_not(made):
    run, checkpoint = made
    cfg = run.config()
    hub = SourceConfig(kind="datasets", path="bigcode/the-stack-dedup", data_dir="data/python")
    local = SourceConfig(kind="datasets", path="/home/someone/secret/stories")
    train = replace(cfg.train, init_from="/home/someone/runs/base")
    sources = (*cfg.data.sources, hub, local)
    cfg = replace(cfg, data=replace(cfg.data, sources=sources), train=train)
    write_atomic(run.path / "config.yaml", to_yaml(cfg))
    evaluate(run, checkpoint, texts={"/home/someone/book.txt": {"all": {"loss": 1.0}}})
    text = card(run, "tiny", checkpoint)
    assert front(text)["datasets"] == ["bigcode/the-stack-dedup"]
    assert "bigcode/the-stack-dedup/data/python" in cells(text)
    for private in ("/home", "someone", cfg.data.sources[0].path):
        assert private not in text
    assert "trained from the weights of `base`" in text and "book.txt" in text and "| stories |" in text


@pytest.mark.parametrize("path", ["./set", "../set", "~/sets/stories", "here/set", "./a b", "sub/./set"])
def test_a_folder_laid_out_as_a_data_set_is_none_of_the_hub(made, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here/set").mkdir(parents=True)
    run, checkpoint = made
    cfg = run.config()
    source = SourceConfig(kind="datasets", path=path)
    cfg = replace(cfg, data=replace(cfg.data, sources=(*cfg.data.sources, source)))
    write_atomic(run.path / "config.yaml", to_yaml(cfg))
    assert "datasets" not in front(card(run, "tiny", checkpoint))


def test_the_evaluation_is_that_of_the_report(made):
    run, checkpoint = made
    markdown = evaluate(run, checkpoint)
    text = card(run, "tiny", checkpoint)
    rows = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert rows and all(row in text.splitlines() for row in rows)
    assert "other weights" not in text


def test_figures_of_other_weights_are_said_to_be_of_others(made):
    run, checkpoint = made
    evaluate(run, checkpoint, weights_sha256="0" * 64, checkpoint="step_000007")
    assert "**These figures are of other weights than those here: of step_000007, not of step_000012.**" in card(
        run, "tiny", checkpoint
    )


@pytest.mark.parametrize("damage", ["eval.json", "losses.jsonl", "format"])
def test_a_damaged_evaluation_is_left_out_with_a_warning(made, capsys, damage):
    run, checkpoint = made
    evaluate(run, checkpoint)
    if damage == "format":
        path = run.path / "eval.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"format": 1}), encoding="utf-8")
    else:
        (run.path / damage).write_text("{", encoding="utf-8")
    assert "Evaluation on" not in card(run, "tiny", checkpoint)
    said = capsys.readouterr().err
    assert said.startswith("warning: ") and said.count("\n") == 1 and "evaluate.py" in said


def test_a_damaged_ledger_is_one_clear_line(made):
    run, checkpoint = made
    (run.data / "ledger.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="copy it back"):
        card(run, "tiny", checkpoint)


@pytest.mark.parametrize("own", [True, False])
def test_the_code_in_the_card_runs_as_it_stands(made, monkeypatch, capsys, own):
    run, _ = made
    if own:
        cfg = run.config()
        cfg = replace(cfg, model=replace(cfg.model, qk_norm=True, bigram_rows=50))
        write_atomic(run.path / "config.yaml", to_yaml(cfg))
    torch.manual_seed(0)
    model = build_model(run.config().model).eval()
    checkpoint = run.save(12, model, STATE)
    folder = run.path.parent / "my model"
    folder.mkdir()
    text = card(run, folder.name, checkpoint)
    hf_format.write(folder, model, run.tokenizer(), text)
    assert ("trust_remote_code=True" in text) == ("| pair embedding | 50 rows |" in text) == own
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    monkeypatch.chdir(folder)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("import os\n")

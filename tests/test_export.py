import os
import shutil
from dataclasses import replace

import pytest
from conftest import make_run, script

from autocomplete import Completer, Sampling
from config import ModelConfig
from export import ExportError, main, require_close, require_exact, written
from kindling.errors import KindlingError
from kindling.formats.parity import Difference
from kindling.runs.checkpoint import CheckpointError, RunDirectory

STOCK = ModelConfig(block_size=32, vocab_size=512, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus) -> RunDirectory:
    return make_run(tmp_path_factory.mktemp("runs") / "stock", corpus, STOCK)


def leftovers(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize(
    ("flags", "name", "files"),
    [
        (
            ["--to", "hf"],
            "hf",
            {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"},
        ),
        (["--to", "int8"], "int8", {"config.json", "model.safetensors", "tokenizer.json"}),
        (["--to", "gguf"], "stock-f16.gguf", set()),
        (["--to", "gguf", "--type", "f32"], "stock-f32.gguf", set()),
        (["--to", "gguf", "--type", "q8_0"], "stock-q8_0.gguf", set()),
    ],
)
def test_a_run_is_exported_into_its_own_folder_and_checked(run, tmp_path, capsys, flags, name, files):
    shutil.copytree(run.path, tmp_path / "stock")
    assert main([str(tmp_path / "stock"), *flags]) == 0
    out = tmp_path / "stock" / "export" / name
    assert leftovers(out.parent) == [name]
    assert not files or files <= set(leftovers(out))
    said = capsys.readouterr().out
    assert "largest difference of a logit" in said and str(out) in said


def test_the_int8_export_completes_a_text(run, tmp_path):
    assert main([str(run.path), "--to", "int8", "--out", str(tmp_path / "x")]) == 0
    completer = Completer(tmp_path / "x")
    assert "".join(completer.complete(completer.prompt_ids("import ", 5)[0], Sampling(0.0, 0, 5, 0)))


def test_an_export_that_is_there_is_replaced_only_when_asked(run, tmp_path):
    out = tmp_path / "x"
    assert main([str(run.path), "--to", "int8", "--out", str(out)]) == 0
    (out / "mine.txt").write_text("kept", encoding="utf-8")
    with pytest.raises(ExportError, match="--replace"):
        main([str(run.path), "--to", "int8", "--out", str(out)])
    assert "mine.txt" in leftovers(out)
    assert main([str(run.path), "--to", "int8", "--out", str(out), "--replace"]) == 0
    assert "mine.txt" not in leftovers(out) and leftovers(tmp_path) == ["x"]
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode


@pytest.mark.parametrize("what", ["a run", "a folder", "a file", "a link", "."])
def test_nothing_but_an_export_is_ever_replaced(run, tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "x"
    if what == "a run":
        shutil.copytree(run.path, out)
    elif what in ("a folder", "a link"):
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "mine.txt").write_text("mine", encoding="utf-8")
        out = tmp_path / "real" if what == "a folder" else out
        if what == "a link":
            out.symlink_to(tmp_path / "real")
    elif what == "a file":
        out.write_text("mine", encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ExportError, match=r"--replace must be of an export|--out must be"):
        main([str(run.path), "--to", "int8", "--out", "." if what == "." else str(out), "--replace"])
    assert sorted(tmp_path.rglob("*")) == before


def test_of_two_exports_to_one_place_the_first_stays(tmp_path):
    with pytest.raises(ExportError, match="must not exist yet"), written(tmp_path / "x", False) as partial:
        partial.write_text("slow", encoding="utf-8")
        (tmp_path / "x").write_text("fast", encoding="utf-8")
    assert leftovers(tmp_path) == ["x"] and (tmp_path / "x").read_text(encoding="utf-8") == "fast"


@pytest.mark.parametrize("to", ["hf", "int8", "gguf"])
def test_an_export_that_computes_something_else_is_deleted(run, tmp_path, monkeypatch, to):
    module = {"hf": "hf_format", "int8": "int8_format", "gguf": "gguf_format"}[to]
    monkeypatch.setattr(f"kindling.formats.{module}.difference", lambda *_: Difference(1e-3, 2.0, 2.02))
    with pytest.raises(ExportError, match="and is deleted"):
        main([str(run.path), "--to", to, "--out", str(tmp_path / "x")])
    assert leftovers(tmp_path) == []


def test_an_interrupted_export_leaves_nothing_and_what_was_there(tmp_path):
    old = tmp_path / "x.gguf"
    old.write_text("old", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt), written(old, replace=True) as partial:
        partial.write_text("half", encoding="utf-8")
        raise KeyboardInterrupt
    assert leftovers(tmp_path) == ["x.gguf"] and old.read_text(encoding="utf-8") == "old"


def test_a_difference_that_is_no_number_is_never_small():
    nan = float("nan")
    for check, found in ((require_exact, Difference(nan, 2.0, 2.0)), (require_close, Difference(0.1, 2.0, nan))):
        with pytest.raises(ExportError):
            check(found)
    assert "1.0e-05" in require_exact(Difference(1e-5, 2.0, 2.0))
    assert "+0.05%" in require_close(Difference(0.1, 2.0, 2.001))


def test_a_folder_that_cannot_be_written_is_one_line(run, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ExportError, match="must be writable"):
        main([str(run.path), "--to", "int8", "--out", str(tmp_path / "file" / "x")])


def test_a_shape_that_llama_cpp_has_not_is_refused_by_its_settings(tmp_path, corpus):
    run = make_run(tmp_path / "odd", corpus, replace(STOCK, activation="relu2", qk_norm=True))
    with pytest.raises(KindlingError, match=r"qk_norm.*--to"):
        main([str(run.path), "--to", "gguf"])
    assert leftovers(run.path / "export") == []


def test_a_run_without_checkpoints_and_a_damaged_one_are_refused(run, tmp_path):
    for name, harm in (
        ("none", shutil.rmtree),
        ("torn", lambda folder: os.truncate(folder / "model.safetensors", 1000)),
    ):
        shutil.copytree(run.path, tmp_path / name)
        harm(tmp_path / name / "step_000004")
        with pytest.raises(CheckpointError):
            main([str(tmp_path / name), "--to", "int8"])
        assert leftovers(tmp_path / name / "export") == []


def test_the_script_says_what_comes_next(run, tmp_path):
    result = script("export.py", str(run.path), "--to", "int8", "--out", "x", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == 'results in x; next: python autocomplete.py x --prompt "import os"'

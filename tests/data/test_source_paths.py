"""Paths as shells and systems give them: homes, links, circles, names of any bytes, files that vanish or may not be read."""

import gzip
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from conftest import assert_one_clear_line, script

from config import DataConfig, EvalConfig, SourceConfig, TokenizerConfig
from kindling.cli import parse_cli
from kindling.config_io import ConfigFlags
from kindling.data import sources
from kindling.data.decontamination import Benchmarks
from kindling.data.explain import explain_path
from kindling.data.ledger import DOCUMENTS
from kindling.data.process_document import DocumentProcessor
from kindling.data.shards import DataError
from kindling.data.sources import documents, local_files
from kindling.errors import KindlingError
from kindling.paths import expand_home
from kindling.runs.checkpoint import RunDirectory
from presets import preset


@dataclass
class Flags:
    config: ConfigFlags
    out: Path = Path("out")
    more: tuple[Path, ...] = ()
    prompt: str = ""
    named: Path | None = None
    eval: EvalConfig = field(default_factory=EvalConfig)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    return tmp_path / "home"


def parsed(*argv: str) -> Flags:
    return parse_cli(Flags, "", ["--preset", "demo", *argv])


def test_a_home_is_found_however_the_shell_gave_it(home):
    assert parsed("--out=~/x").out == parsed("--out", "~/x").out == home / "x"
    assert parsed("--more", "~/a", "b", "~").more == (home / "a", Path("b"), home)
    assert parsed("--named", "~/x y").named == home / "x y"
    assert parsed("--out", "a~b").out == Path("a~b")


def test_a_text_that_begins_with_a_tilde_stays_as_it_is():
    assert parsed("--prompt", "~nosuchuser/x").prompt == "~nosuchuser/x"
    assert parsed("--data.sources.0.field", "~nosuchuser").config.data.sources[0].field == "~nosuchuser"


def test_a_setting_keeps_the_home_as_it_was_given():
    cfg = parsed("--train.init-from=~/m", "--data.sources.0.kind", "files", "--data.sources.0.path", "~/c").config
    assert (cfg.train.init_from, cfg.data.sources[0].path) == ("~/m", "~/c")


UNKNOWN_USER = {
    "--out": ["--out", "~nosuchuser/x"],
    "--out=": ["--out=~nosuchuser/x"],
    "--more": ["--more", "a", "~nosuchuser"],
    "--named": ["--named", "~nosuchuser/x"],
    "--train.init-from": ["--train.init-from", "~nosuchuser/models"],
    "--data.sources.0.path": ["--data.sources.0.kind", "files", "--data.sources.0.path", "~nosuchuser/code"],
    "--data.decontaminate": ["--data.decontaminate", "humaneval", "~nosuchuser/exam.jsonl"],
    "--tokenizer.path": ["--tokenizer.kind", "pretrained", "--tokenizer.path", "~nosuchuser/t"],
    "--eval.humaneval": ["--eval.humaneval", "~nosuchuser/h.jsonl"],
    "--eval.mbpp": ["--eval.mbpp", "~nosuchuser/h.jsonl"],
}


@pytest.mark.parametrize("flag", UNKNOWN_USER)
def test_a_user_that_does_not_exist_is_named_before_any_work(flag):
    with pytest.raises(KindlingError, match=r"~nosuchuser, and there is no such user; write the whole path") as error:
        parsed(*UNKNOWN_USER[flag])
    assert str(error.value).startswith(flag.rstrip("=")) and "\n" not in str(error.value)


def unknown_user_in(what: str) -> None:
    """Use a path as a saved config or a program gives it, past the check of the flags."""
    from kindling.data import build
    from kindling.evaluation import tasks
    from kindling.evaluation.perplexity import text_losses
    from kindling.tokenization.compare import read_documents
    from kindling.tokenization.pretrained import load_pretrained
    from kindling.training.start_or_resume import check_new_run, load_initial_weights

    named = "~nosuchuser/x"
    source = SourceConfig(kind="datasets" if "hub" in what else "files", path=named)
    cfg = preset("demo")
    if what == "a source":
        local_files(source)
    elif what == "a data set on the hub":
        list(documents(source, None))
    elif what == "a fingerprint of a hub folder":
        build.fingerprint(replace(cfg, data=replace(cfg.data, sources=(source,))), [None])
    elif what == "a fingerprint of a tokenizer":
        tokenizer = TokenizerConfig(kind="pretrained", path=named)
        build.fingerprint(replace(cfg, tokenizer=tokenizer), [[]])
    elif what == "a tokenizer":
        load_pretrained(TokenizerConfig(kind="pretrained", path=named))
    elif what == "a benchmark":
        Benchmarks((named,))
    elif what == "problems":
        tasks.load("humaneval", named)
    elif what == "the file of problems":
        tasks.file_of("mbpp", EvalConfig(mbpp=named))
    elif what == "a text to predict":
        text_losses(None, None, Path(named), None)
    elif what == "files to compare":
        read_documents((Path(named),), 10**6)
    elif what == "weights to start from":
        load_initial_weights(None, named, None)
    elif what == "a run that starts":
        check_new_run(
            replace(cfg, train=replace(cfg.train, init_from=named)), RunDirectory(Path("runs/none")), fresh=False
        )


PLACES_OF_PATHS = ("a source", "a data set on the hub", "a fingerprint of a hub folder", "a fingerprint of a tokenizer")
PLACES_OF_PATHS += ("a tokenizer", "a benchmark", "problems", "the file of problems", "a text to predict")
PLACES_OF_PATHS += ("files to compare", "weights to start from", "a run that starts")


@pytest.mark.parametrize("what", PLACES_OF_PATHS)
def test_a_user_that_does_not_exist_is_one_line_wherever_a_path_is_used(what):
    with pytest.raises(KindlingError, match=r"~nosuchuser, and there is no such user; write the whole path") as error:
        unknown_user_in(what)
    assert "\n" not in str(error.value)


def test_a_document_may_be_asked_for_whose_name_begins_with_a_tilde(tmp_path):
    line = {"key": "~.py", "source": "mine", "language": "python", "bytes": 3, "dropped": "lines", "value": "1"}
    with gzip.open(tmp_path / DOCUMENTS, "wt", encoding="utf-8") as f:
        f.write(json.dumps(line) + "\n")
    assert "dropped by the rule 'lines'" in explain_path(preset("demo"), tmp_path, "~.py")
    with pytest.raises(DataError, match="'~nosuchuser/x' was not"):
        explain_path(preset("demo"), tmp_path, "~nosuchuser/x")


def test_weights_of_an_unknown_user_are_taken_as_gone_when_a_run_goes_on():
    from kindling.training.start_or_resume import require_same_initial_weights

    require_same_initial_weights(RunDirectory(Path("runs/none")), "~nosuchuser/x", "0" * 64)


def test_the_script_says_so_in_one_line(tmp_path):
    flags = ["--data.sources.0.kind", "files", "--data.sources.0.path"]
    assert_one_clear_line(script("data_pipeline.py", *flags, "~nosuchuser/code", cwd=tmp_path), "no such user")


@pytest.mark.parametrize("flag", ["--data.sources.0.path", "--train.init-from", "--tokenizer.path", "--eval.mbpp"])
@pytest.mark.parametrize("joined", [False, True])
def test_a_setting_that_is_no_utf8_is_refused_with_the_way_out(flag, joined):
    given = [f"{flag}=caf\udce9"] if joined else [flag, "caf\udce9"]
    with pytest.raises(KindlingError, match=r"must be a name in UTF-8, but 'caf\\udce9' is not.*ln -s") as error:
        parsed(*given)
    assert str(error.value).startswith(flag)


def test_a_run_to_start_from_may_be_named_by_its_home(home):
    from kindling.training.start_or_resume import load_initial_weights

    (home / "models/x").mkdir(parents=True)
    with pytest.raises(KindlingError) as error:
        load_initial_weights(None, "~/models/x", None)
    assert str(home / "models/x") in str(error.value)
    assert expand_home("~", "DIR") == home


# -- a source's folder ------------------------------------------------------------------------------------------------


def files_of(folder: str = "src", **fields) -> list:
    return local_files(SourceConfig(kind="files", path=folder, **fields))


def make(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(f"x = {name!r}\n", encoding="utf-8", errors="backslashreplace")


NAMES = ["a b.py", "-rf.py", "a\nb.py", "☃.py", "e\u0301.py", "é.py", "A.py", "a.py", "~.py", "$HOME.py", "a:b.py"]
NAMES += ["*.py", "[a].py", "caf\udce9.py", "caf\udce9/a.py", " .py", "'.py", "a" * 200 + ".py"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has fewer names")
def test_names_of_any_bytes_are_read():
    make(*(f"src/{name}" for name in NAMES))
    kept = len(list(Path("src").rglob("*.py")))  # on some systems A.py and a.py are one file
    found = files_of()
    assert len(found) == kept and {f.key for f in found} <= set(NAMES)
    source = SourceConfig(kind="files", path="src")
    process = DocumentProcessor(DataConfig())
    assert all(process(document).drop is None for document in documents(source, found))


def test_a_folder_that_may_not_be_entered_costs_only_its_files(monkeypatch):
    """As os.stat fails in a folder of mode 0644; a test may run as root, who may enter any."""
    make("src/a.py", "src/locked/b.py")
    real = os.stat

    def stat(path, *args, **kwargs):
        if "locked/" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(sources.os, "stat", stat)
        found = {f.key: f for f in files_of()}
    assert found.keys() == {"a.py", "locked/b.py"} and found["locked/b.py"].size == 0
    os.remove("src/locked/b.py")  # so that reading it fails too
    source = SourceConfig(kind="files", path="src")
    drops = [DocumentProcessor(DataConfig())(d).drop for d in documents(source, list(found.values()))]
    assert sorted(d.rule if d else "" for d in drops) == ["", "unreadable"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may enter any folder")
def test_a_folder_of_mode_0644_costs_only_its_files():
    make("src/a.py", "src/locked/b.py")
    os.chmod("src/locked", 0o644)
    try:
        assert {f.key for f in files_of()} == {"a.py", "locked/b.py"}
    finally:
        os.chmod("src/locked", 0o755)


def test_a_file_that_vanishes_after_it_was_listed_is_counted():
    make("src/a.py", "src/b.py")
    found = files_of()
    os.remove("src/b.py")
    source = SourceConfig(kind="files", path="src")
    drops = [DocumentProcessor(DataConfig())(d).drop for d in documents(source, found)]
    assert sorted(d.rule if d else "" for d in drops) == ["", "unreadable"]


def test_a_file_of_rows_that_vanishes_is_counted():
    Path("rows.jsonl").write_text('{"content": "x"}\n', encoding="utf-8")
    source = SourceConfig(kind="jsonl", path="rows.jsonl")
    found = local_files(source)
    os.remove("rows.jsonl")
    (document,) = documents(source, found)
    assert "the rest of the file: FileNotFoundError" in document.unreadable


def test_a_linked_folder_is_left_out_with_a_word(capsys):
    make("src/a.py", "elsewhere/b.py")
    os.symlink("../elsewhere", "src/link")
    assert [f.key for f in files_of()] == ["a.py"]
    said = capsys.readouterr().err
    assert "1 linked folders are left out, such as src/link; name its target as a source" in said


def test_links_that_are_no_source_need_no_word(capsys):
    make("src/a.py", "elsewhere/b.py")
    for name in (".git", "__pycache__", "site-packages"):
        os.symlink("../elsewhere", f"src/{name}")
    assert [f.key for f in files_of()] == ["a.py"] and "linked" not in capsys.readouterr().err


def test_a_source_may_be_a_link_itself():
    make("src/a.py")
    os.symlink("src", "link")
    os.symlink("src/a.py", "one.py")
    assert [f.key for f in files_of("link")] == ["a.py"] and [f.key for f in files_of("one.py")] == ["one.py"]


def test_a_linked_file_is_read_and_a_broken_or_circular_link_is_none():
    make("src/a.py", "elsewhere/b.py")
    os.symlink("../elsewhere/b.py", "src/b.py")
    os.symlink("nowhere.py", "src/broken.py")
    os.symlink("loop.py", "src/loop.py")
    os.symlink(".", "src/circle")
    os.symlink("../src", "src/up")
    assert sorted(f.key for f in files_of()) == ["a.py", "b.py"]


def test_a_folder_or_a_pipe_with_a_files_name_is_no_file():
    make("src/a.py", "src/dir.py/b.py")
    if hasattr(os, "mkfifo"):
        os.mkfifo("src/pipe.py")
    assert sorted(f.key for f in files_of()) == ["a.py", "dir.py/b.py"]

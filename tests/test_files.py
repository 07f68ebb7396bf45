"""Every string that came from outside can be written everywhere, and nothing that was worked for is lost at a write."""

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import tiny_config
from hypothesis import given
from hypothesis import strategies as st

from config import SourceConfig
from kindling.data.build import prepare
from kindling.data.ledger import DOCUMENTS, DocumentLog, Ledger, explain, read_documents
from kindling.data.shards import read_manifest
from kindling.files import append_line, printable, sha256_file, sha256_text, write_atomic, write_json, write_text

pytestmark = pytest.mark.usefixtures("forked_workers")

texts = st.text(st.characters() | st.characters(categories=("Cs",)), max_size=20)


@given(texts)
def test_any_string_in_json_is_read_back_as_it_was(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("files")
    write_json(folder / "a.json", {text: [text]})
    assert json.loads((folder / "a.json").read_text(encoding="utf-8")) == {text: [text]}
    append_line(folder / "b.jsonl", json.dumps(text, ensure_ascii=False))
    write_atomic(folder / "c.json", json.dumps(text, ensure_ascii=False))
    for name in ("b.jsonl", "c.json"):
        with open(folder / name, encoding="utf-8", newline="") as f:
            assert json.loads(f.read()) == text
    write_text(folder / "d.md", text)
    (folder / "d.md").read_bytes().decode("utf-8")


@pytest.mark.parametrize("write", [write_atomic, write_json])
def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch, write):
    write(tmp_path / "a", "before")
    kept = (tmp_path / "a").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        real = Path.write_text
        patch.setattr(Path, "write_text", lambda *a, **kw: (real(a[0], "half"), _full()))
        write(tmp_path / "a", "after")
    assert (tmp_path / "a").read_bytes() == kept and [p.name for p in tmp_path.iterdir()] == ["a"]


def _full() -> None:
    raise OSError("the disk is full")


@given(texts)
def test_the_hash_of_a_text_is_that_of_its_file(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("files") / "a"
    if os.linesep == "\n":
        write_text(path, text)
        assert sha256_file(path) == sha256_text(text)


@given(texts | st.text(max_size=200))
def test_a_label_is_one_short_line_that_can_be_shown(text):
    label = printable(text)
    assert len(label) <= 64 and label.isprintable() and label.encode("utf-8") is not None
    assert printable(label) == label.strip() or " " in label


@given(st.lists(st.tuples(texts, texts), max_size=5))
def test_a_ledger_with_any_strings_is_written_and_read_back(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("ledger")
    ledger = Ledger(["s\udce9"], [1.0])
    log = DocumentLog(folder)
    for language, key in rows:
        ledger.keep(0, language, 5, ((key, 0),), 1, False)
        ledger.drop(0, language, 5, key)
        log.write(key=key, language=language, value=key)
    log.close()
    ledger.notes.append("without caf\udce9")
    ledger.write(folder)
    read = Ledger.read(folder)
    assert [row["language"] for row in read.rows.values()] == list(dict.fromkeys(language for language, _ in rows))
    assert read.notes == ledger.notes and [line["key"] for line in read_documents(folder)] == [key for _, key in rows]


GOOD = [
    {"content": f'"""Helpers, number {i}."""\n\n\ndef scale_{i}(x, y={i}):\n    return x * y + {i} - {"x" * (i % 7)}\n'}
    for i in range(300)
]
ODD = {
    "a byte of latin-1": b'{"content": "def f(x):\\n    return x\\n", "language": "Fran\xe7ais", "path": "caf\xe9.py"}',
    "half a surrogate pair": b'{"content": "def f(x):\\n    return x\\n", "language": "fran\\udce7ais", "path": "\\ud83d/a.py"}',
}


@pytest.mark.parametrize("odd", ODD)
def test_a_language_or_path_that_is_no_utf8_ends_no_build(odd, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps(row | {"language": "Python"}).encode() for row in GOOD]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([*rows[:150], ODD[odd], *rows[150:]]))
    cfg = tiny_config(corpus)
    source = SourceConfig(kind="jsonl", path="rows.jsonl")
    folder = prepare(replace(cfg, data=replace(cfg.data, sources=(source,), near_dedup=None, check_syntax=False)))
    ledger = json.loads((folder / "ledger.json").read_text(encoding="utf-8"))
    assert sum(row["read"][0] for row in ledger["rows"]) == sum(row["kept"][0] for row in ledger["rows"]) == 301
    assert {row["language"] for row in ledger["rows"]} == {"python", "fran\\udce7ais"}
    with gzip.open(folder / DOCUMENTS, "rt", encoding="utf-8") as f:
        assert sum("split" in json.loads(line) for line in f) == 301
    languages = [split["table"]["languages"] for split in read_manifest(folder)["splits"].values()]
    assert "fran\\udce7ais" in {name for names in languages for name in names}


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode on Windows")
def test_files_whose_names_are_no_utf8_are_read_and_can_be_asked_for(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = os.fsencode(tmp_path / "src")
    os.makedirs(os.path.join(root, b"caf\xe9"))
    for i, row in enumerate(GOOD):
        name = os.path.join(root, b"caf\xe9", f"m{i}.py".encode()) if i % 2 else os.path.join(root, b"\xff%d.py" % i)
        with open(name, "wb") as f:
            f.write(row["content"].encode())
    cfg = tiny_config(corpus)
    source = SourceConfig(kind="files", path="src")
    folder = prepare(replace(cfg, data=replace(cfg.data, sources=(source,), near_dedup=None)))
    assert sum(row["read"][0] for row in Ledger.read(folder).rows.values()) == 300
    (said,) = explain(folder, {"caf\udce9/m1.py"})
    assert said.startswith("caf\udce9/m1.py (src, python")


def test_a_docstring_with_half_a_surrogate_pair_costs_only_its_own_example(corpus, tmp_path):
    from kindling.data.process_document import DocumentProcessor
    from kindling.data.sources import documents, local_files
    from kindling.tokenization.train_tokenizer import train

    good = 'def add(a, b):\n    """Return the sum of a and b."""\n    total = a + b\n    return total\n\n\n'
    bad = 'def sub(a, b):\n    """Return \\ud800 the difference of a and b."""\n    total = a - b\n    return total\n'
    (tmp_path / "a.py").write_text(good + bad, encoding="utf-8")
    cfg = tiny_config(corpus)
    tokenizer = train([good * 50], cfg.tokenizer, 300)
    source = SourceConfig(kind="docstrings", path=str(tmp_path))
    (document,) = documents(source, local_files(source))
    found = DocumentProcessor(cfg.data, None, tokenizer, context=1000).all_of(document)
    assert found[0].drop is None and {e.drop and e.drop.rule for e in found} <= {None, "not UTF-8"}


def test_a_config_with_any_path_is_yaml_that_is_read_back():
    text = yaml.safe_dump({"path": "caf\udce9 \ud83d"})
    assert yaml.safe_load(text.encode("utf-8")) == {"path": "caf\udce9 \ud83d"} and isinstance(Path("a"), Path)

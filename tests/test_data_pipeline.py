import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, assert_one_clear_line, script, shared_file, tiny_config, tiny_flags
from hypothesis import given
from hypothesis import strategies as st

import data_pipeline
from config import DataConfig, SourceConfig, TokenizerConfig
from data_pipeline import prepare, split_of
from filters import alphanumeric_share, compiles, reason_to_drop
from shards import DataError, TokenDataset
from sources import Document, documents, local_files
from tokenizer import load_json
from workers import Examined, WorkerPool, _examine


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def ledger_of(folder: Path) -> dict:
    rows = json.loads((folder / "ledger.json").read_text(encoding="utf-8"))
    assert len(rows) == 1
    return rows[0]


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.npy"))}


def texts_of(folder: Path, split: str, cfg: TokenizerConfig) -> list[str]:
    """The documents of a split, decoded from its shards."""
    tokenizer, dataset = load_json(folder / "tokenizer.json", cfg), TokenDataset(folder, split)
    ids = dataset.read(0, len(dataset))
    return [tokenizer.decode(piece[:-1]) for piece in np.split(ids, np.flatnonzero(ids == tokenizer.eos_id) + 1)[:-1]]


# -- filters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = 1\ny = 2\n", None),
        ("x", "characters"),
        ("x = 1\n" * 60, "characters"),
        ("xxxxxxxxxxxx", "lines"),
        ("x\n" * 30, "lines"),
        ("#-#-#-#-\n#-#-#-a\n", "alphanumeric"),
        ("def f(:\n    pass\n", "syntax"),
        ("print 'python 2'\nx = 1\n", "syntax"),
    ],
)
def test_each_filter_drops_what_it_should_and_by_its_name(text, reason):
    cfg = DataConfig(min_chars=3, max_chars=200, min_lines=2, max_lines=20, min_alphanumeric=0.3)
    assert reason_to_drop(text, "python", cfg) == reason


def test_only_python_is_compiled():
    assert reason_to_drop("int main() { return 0; }\n", "c", DataConfig()) is None
    assert reason_to_drop("int main() { return 0; }\n", "python", DataConfig()) == "syntax"


@given(st.text())
def test_the_alphanumeric_share_is_that_of_str_isalnum(text):
    assert alphanumeric_share(text) == pytest.approx(sum(c.isalnum() for c in text) / max(1, len(text)))


@pytest.mark.parametrize(
    "text",
    ["-" * 100_000, "(" * 100_000, "not " * 5000 + "x", "x\x00", "'" + "a" * 300_000 + "'", "1" * 5000, "await x"],
)
def test_strangers_code_cannot_break_the_syntax_filter(text):
    assert compiles(text) is False


def test_compiling_does_not_run_the_code(tmp_path):
    assert compiles(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert not (tmp_path / "ran").exists()


# -- sources ----------------------------------------------------------------------------------------------------------


def write_rows(texts: list[str]) -> dict[str, SourceConfig]:
    """The same documents in every local format; the last as the hub lays a data set out."""
    import pyarrow
    import pyarrow.parquet

    lines = "".join(json.dumps({"content": t}) + "\n" for t in texts)
    Path("rows.jsonl").write_text(lines, encoding="utf-8")
    Path("rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    Path("rows.txt").write_text("<|endoftext|>".join(texts), encoding="utf-8")
    Path("set/data/python").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table({"content": texts}), "set/data/python/train-00000-of-00001.parquet")
    return {
        "jsonl": SourceConfig(kind="jsonl", path="rows.jsonl"),
        "jsonl.gz": SourceConfig(kind="jsonl", path="rows.jsonl.gz"),
        "text": SourceConfig(kind="text", path="rows.txt"),
        "parquet": SourceConfig(kind="parquet", path="set", globs=("**/*.parquet",)),
        "datasets": SourceConfig(kind="datasets", path="set", data_dir="data/python"),
    }


def test_every_format_gives_the_same_documents():
    texts = [f"def f{i}():\n    return '☃' * {i}" for i in range(300)]
    for kind, source in write_rows(texts).items():
        files = None if source.kind == "datasets" else local_files(source)
        assert [d.text for d in documents(source, files)] == texts, kind
        limited = replace(source, max_documents=7)
        assert [d.text for d in documents(limited, files)] == texts[:7], kind


def test_rows_that_cannot_be_read_are_counted_and_do_not_end_the_rest():
    good = json.dumps({"content": "x = 1"})
    Path("rows.jsonl").write_bytes(
        b"\n".join(
            [good.encode(), b"{not json", b'{"other": 1}', b'{"content": 5}', b'{"content": "\xff"}', good.encode()]
        )
    )
    source = SourceConfig(kind="jsonl", path="rows.jsonl")
    examined = [_examine(d, DataConfig(), None) for d in documents(source, local_files(source))]
    assert [e.reason for e in examined] == [None, "unreadable", "unreadable", "unreadable", "not UTF-8", None]
    Path("cut.jsonl.gz").write_bytes(gzip.compress(good.encode() * 1)[:-9])
    source = SourceConfig(kind="jsonl", path="cut.jsonl.gz")
    assert [_examine(d, DataConfig(), None).reason for d in documents(source, local_files(source))][-1] == "unreadable"


def test_local_python_lists_the_standard_library_and_the_packages():
    keys = {f.key for f in local_files(SourceConfig())}
    assert "stdlib/json/decoder.py" in keys and "site-packages/numpy/__init__.py" in keys
    assert not any("site-packages/" in k for k in keys if k.startswith("stdlib/"))


def test_the_byte_limit_takes_the_same_sample_of_files_each_time(corpus):
    source = SourceConfig(kind="files", path=str(corpus), max_bytes=200_000)
    sample = local_files(source)
    assert sample == local_files(source)
    assert sum(f.size for f in sample[:-1]) < 200_000 <= sum(f.size for f in sample)
    assert {f.key.split("/")[0] for f in sample} == {"asyncio", "email", "json"}  # not the first of the alphabet


# -- the build --------------------------------------------------------------------------------------------------------


def test_the_ledger_adds_up_and_names_what_was_dropped(corpus):
    shutil.copytree(corpus, "repo")
    repo = Path("repo")
    (repo / "copy.py").write_bytes((repo / "json/decoder.py").read_bytes())
    (repo / "crlf.py").write_bytes(b"x = 1\r\ny = 2\r\n" * 9)
    (repo / "bom.py").write_bytes(b"\xef\xbb\xbf" + b"bom = 'kept without its mark'\n" * 3)
    (repo / "latin.py").write_bytes(b"# caf\xe9\n")
    (repo / "py2.py").write_text("print 'hello'\n", encoding="utf-8")
    (repo / "empty.py").touch()
    cfg = tiny_config(repo)
    folder = prepare(cfg)
    ledger = ledger_of(folder)
    files = list(repo.rglob("*.py"))
    assert ledger["read"][0] == len(files)
    empty = sum(f.stat().st_size == 0 for f in files)
    dropped = {reason: count for reason, (count, _) in ledger["dropped"].items()}
    assert dropped == {"characters": empty, "duplicate": 1, "not UTF-8": 1, "syntax": 1}
    for column in (0, 1):
        # bytes: a kept document counts what is kept of it, so its byte-order mark shows as missing
        lost = 3 if column else 0
        assert ledger["read"][column] == ledger["kept"][column] + sum(d[column] for d in ledger["dropped"].values())
        assert ledger["read"][column] == (sum(f.stat().st_size for f in files) - lost if column else len(files))
    kept = [text for split in ("train", "val", "test") for text in texts_of(folder, split, cfg.tokenizer)]
    assert len(kept) == ledger["kept"][0]
    assert "x = 1\r\ny = 2\r\n" * 9 in kept and "bom = 'kept without its mark'\n" * 3 in kept
    assert kept.count((repo / "copy.py").read_text(encoding="utf-8")) == 1


def test_shards_do_not_depend_on_the_number_of_workers(corpus):
    cfg = tiny_config(corpus)
    one = shard_bytes(prepare(cfg))
    shutil.rmtree("data")
    assert shard_bytes(prepare(replace(cfg, data=replace(cfg.data, workers=2)))) == one


def test_nothing_changed_reuses_and_any_change_rebuilds(corpus, capsys):
    shutil.copytree(corpus, "repo")
    cfg = tiny_config(Path("repo"))
    first = prepare(cfg)
    capsys.readouterr()
    started = time.perf_counter()
    assert prepare(cfg) == first and "built" not in capsys.readouterr().out
    assert time.perf_counter() - started < 1
    assert prepare(replace(cfg, train=replace(cfg.train, lr=1.0))) == first  # not an input
    Path("repo/json/decoder.py").write_text("changed = True\n", encoding="utf-8")
    second = prepare(cfg)
    Path("repo/new.py").write_text("new = True\n", encoding="utf-8")
    third = prepare(cfg)
    fourth = prepare(replace(cfg, data=replace(cfg.data, min_lines=2)))
    fifth = prepare(replace(cfg, model=replace(cfg.model, vocab_size=600)))
    assert len({first, second, third, fourth, fifth}) == 5


def test_adding_files_leaves_every_document_in_its_split(corpus):
    shutil.copytree(corpus, "repo")
    cfg = tiny_config(Path("repo"))
    before = {
        text: split for split in ("train", "val", "test") for text in texts_of(prepare(cfg), split, cfg.tokenizer)
    }
    for i in range(20):
        Path(f"repo/a{i}.py").write_text(f"added = {i}\n" * (i + 1), encoding="utf-8")
    after = {text: split for split in ("train", "val", "test") for text in texts_of(prepare(cfg), split, cfg.tokenizer)}
    assert len(after) == len(before) + 20
    assert all(after[text] == split for text, split in before.items())


@given(st.binary(min_size=32, max_size=32))
def test_a_split_is_a_function_of_the_hash(digest):
    cfg = DataConfig(val_fraction=0.25, test_fraction=0.25)
    assert split_of(digest, cfg) == ("val" if digest[0] < 64 else "test" if digest[0] < 128 else "train")


def test_the_tokenizer_is_trained_on_training_documents_only(corpus, monkeypatch):
    seen = []
    train = data_pipeline.train
    monkeypatch.setattr(data_pipeline, "train", lambda texts, *rest: train(seen.extend(texts) or seen, *rest))
    cfg = tiny_config(corpus)
    folder = prepare(cfg)
    assert sorted(seen) == sorted(texts_of(folder, "train", cfg.tokenizer))


@pytest.mark.parametrize("kind", ["handwritten", "sentencepiece"])
def test_a_tokenizer_of_each_kind_reaches_the_workers(corpus, kind):
    cfg = tiny_config(corpus)
    cfg = replace(cfg, tokenizer=TokenizerConfig(kind=kind))
    folder = prepare(cfg)
    tokenizer = load_json(folder / "tokenizer.json", cfg.tokenizer)
    assert TokenDataset(folder, "train").manifest["tokenizer_sha256"] == tokenizer.sha256
    sources = {f.read_text(encoding="utf-8") for f in corpus.rglob("*.py")}
    assert set(texts_of(folder, "val", cfg.tokenizer)) <= sources
    assert prepare(replace(cfg, model=replace(cfg.model, vocab_size=500))) != folder


def test_a_mixture_draws_its_tokens_by_weight():
    for name, letter in (("a", "alpha"), ("b", "beta")):
        Path(name).mkdir()
        for i in range(400):
            Path(name, f"{i}.py").write_text(f"{letter}_{i} = {i}\n" * 20, encoding="utf-8")
    cfg = tiny_config(Path("a"))
    sources = tuple(SourceConfig(kind="files", path=p, weight=w) for p, w in (("a", 3.0), ("b", 1.0)))
    cfg = replace(cfg, data=replace(cfg.data, sources=sources, max_tokens=30_000, workers=2))
    folder = prepare(cfg)
    a, b = (row["tokens"] for row in json.loads((folder / "ledger.json").read_text(encoding="utf-8")))
    assert a / (a + b) == pytest.approx(0.75, abs=0.02)
    assert 30_000 <= len(TokenDataset(folder, "train")) < 31_000


def kill_on_poison(batch: list[Document]) -> list[Examined]:
    if any(d.text == "poison" for d in batch):
        os._exit(9)
    return [Examined(d.key, d.size, text=d.text) for d in batch]


def test_a_document_that_kills_its_worker_is_dropped_and_only_that_one():
    poisoned = {100, 101, 250, 333}
    stream = [Document(str(i), "python", text="poison" if i in poisoned else "fine", size=9000) for i in range(400)]
    with WorkerPool(DataConfig(workers=2), None, TokenizerConfig(), examine=kill_on_poison) as pool:
        examined = []
        for e in pool.map(stream):
            time.sleep(0.002)  # a consumer that works, so that a pool is found broken while it is being fed
            examined.append(e)
    assert [e.key for e in examined] == [str(i) for i in range(400)]
    assert {e.key: e.reason for e in examined if e.reason} == {str(i): "killed its worker" for i in poisoned}


def test_a_file_far_over_the_limit_is_dropped_unread(corpus):
    shutil.copytree(corpus, "repo")
    with open("repo/huge.py", "wb") as f:
        f.truncate(3 * 2**30)  # sparse
    ledger = ledger_of(prepare(tiny_config(Path("repo"))))
    assert ledger["dropped"]["characters"][1] == 3 * 2**30


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_build_that_is_killed_leaves_nothing_that_looks_whole(corpus, sent):
    shutil.copytree(corpus, "repo")
    for i in range(60):  # enough work to be killed in
        shutil.copytree("repo/email", f"repo/copy{i}")
    command = [sys.executable, ROOT / "data_pipeline.py", *tiny_flags("repo"), "--data.dedup", "False"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(Path("data").glob(".building-*/tokenizer.json")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(sent)
    assert process.wait(timeout=30) != 0
    assert not [p for p in Path("data").glob("*") if not p.name.startswith(".building-")]
    if sent != signal.SIGKILL:
        assert not list(Path("data").iterdir())
    script("data_pipeline.py", *tiny_flags("repo"), "--data.dedup", "False", cwd=Path.cwd())
    assert not list(Path("data").glob(".building-*"))  # what the killed one left is cleared away
    assert len(list(Path("data").iterdir())) == 1


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (SourceConfig(kind="files", path="nowhere"), ["'nowhere'", "--data.sources.0.path"]),
        (SourceConfig(kind="files", path="void"), ["void", "**/*.py", "--data.sources.0.globs"]),
        (SourceConfig(kind="parquet", path="bad.parquet"), ["bad.parquet", "Parquet"]),
        (
            SourceConfig(kind="datasets", path="nobody/nothing"),
            ["nobody/nothing", "hf auth login", "--data.sources.0.kind parquet"],
        ),
        (SourceConfig(kind="files", path="blank"), ["train split must not be empty", "0 documents"]),
        (SourceConfig(kind="files", path="blank", field="a", response_field="b"), ["instructions", "fine-tuning"]),
    ],
)
def test_a_source_that_cannot_be_used_is_one_line_with_a_way_out(source, words):
    Path("void").mkdir()
    Path("blank").mkdir()
    Path("blank/a.py").touch()
    Path("bad.parquet").write_text("no", encoding="utf-8")
    cfg = tiny_config(Path("."))
    with pytest.raises(DataError) as error:
        prepare(replace(cfg, data=replace(cfg.data, sources=(source,))))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert not list(Path("data").glob("*")) if Path("data").exists() else True


def test_a_full_disk_is_one_line_and_leaves_nothing(corpus):
    result = limited("data_pipeline.py", 20_000, *tiny_flags(corpus))
    assert_one_clear_line(result, "data/", "room for the shards")
    assert not list(Path("data").iterdir())


def limited(name: str, file_bytes: int, *args: str) -> subprocess.CompletedProcess:
    """Run a script that can write no file larger than `file_bytes`: to it, a disk that is full."""
    code = (
        f"import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({file_bytes}, {file_bytes})); sys.path.insert(0, {str(ROOT)!r}); "
        f"sys.argv = {[name, *map(str, args)]!r}; runpy.run_path({str(ROOT / name)!r}, run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_the_real_corpus_builds(tmp_path):
    path = shared_file("code_corpus.jsonl.gz")
    cfg = tiny_config(tmp_path)
    source = SourceConfig(kind="jsonl", path=str(path), max_documents=600)
    folder = prepare(replace(cfg, data=replace(cfg.data, sources=(source,))))
    assert ledger_of(folder)["read"][0] == 600 and ledger_of(folder)["dropped"]["characters"][0] > 5

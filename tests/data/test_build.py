import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, assert_one_clear_line, script, shared_file, started, tiny_config, tiny_flags
from hub import local_preset
from hypothesis import given
from hypothesis import strategies as st

import data_pipeline
from config import DataConfig, SourceConfig, TokenizerConfig
from kindling.data import build
from kindling.data.build import fingerprint, prepare
from kindling.data.duplicates import MinHashIndex, signature, word_hashes
from kindling.data.filters import Drop, strip_header
from kindling.data.ledger import explain, read_documents
from kindling.data.process_document import ProcessedDocument, split_of
from kindling.data.shards import BYTES, SPLITS, DataError, TokenDataset
from kindling.data.sources import Document, documents, list_files, local_files
from kindling.data.workers import WorkerPool
from kindling.errors import TokenizerError
from kindling.runs.checkpoint import RunDirectory
from kindling.tokenization.tokenizer import load_json
from kindling.tokenization.train_tokenizer import train
from presets import PRESETS, preset

pytestmark = pytest.mark.usefixtures("forked_workers")


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def ledger_rows(folder: Path) -> list[dict]:
    return json.loads((folder / "ledger.json").read_text(encoding="utf-8"))["rows"]


def ledger_of(folder: Path) -> dict:
    (row,) = ledger_rows(folder)
    return row


def assert_adds_up(row: dict) -> None:
    """What was read was dropped, kept or cut off, in documents and to the byte."""
    dropped, changed = row["dropped"].values(), row["changed"].values()
    assert row["read"][0] == row["kept"][0] + sum(n for n, _ in dropped)
    assert row["read"][1] == row["kept"][1] + sum(b for _, b in dropped) + sum(b for _, b in changed)


def built_bytes(folder: Path) -> dict[str, bytes]:
    """All files of a build."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def texts_of(folder: Path, split: str, cfg: TokenizerConfig) -> list[str]:
    """The documents of a split, decoded from its shards."""
    tokenizer, dataset = load_json(folder / "tokenizer.json", cfg), TokenDataset(folder, split)
    ids = dataset.read(0, len(dataset))
    return [tokenizer.decode(piece[:-1]) for piece in np.split(ids, np.flatnonzero(ids == tokenizer.eos_id) + 1)[:-1]]


# -- the build --------------------------------------------------------------------------------------------------------


def test_the_ledger_adds_up_and_names_what_was_dropped(corpus):
    shutil.copytree(corpus, "repo")
    repo = Path("repo")
    decoder = (repo / "json/decoder.py").read_text(encoding="utf-8")
    (repo / "copy.py").write_text(decoder, encoding="utf-8")
    (repo / "edited.py").write_text(decoder.replace("errmsg", "message"), encoding="utf-8")
    (repo / "crlf.py").write_bytes(b"x = 1\r\ny = 2\r\n" * 9)
    (repo / "bom.py").write_bytes(b"\xef\xbb\xbf" + b"bom = 'kept without its mark'\n" * 3)
    (repo / "header.py").write_text("# a long licence\n" * 30 + "header = 'cut off'\n", encoding="utf-8")
    (repo / "latin.py").write_bytes(b"# caf\xe9\n")
    (repo / "nul.py").write_bytes(b"x = 1\n\0\n")
    (repo / "py2.py").write_text("print 'hello'\n", encoding="utf-8")
    (repo / "large.py").write_bytes(b"x = 1  # padding\n" * 36_000)  # 600 kB
    (repo / "list.py").write_bytes(b"y = [\n" + b"12345,\n" * 40_000 + b"]\n")
    (repo / "deep.py").write_bytes(b"(" * 100_000)
    (repo / "empty.py").touch()
    cfg = tiny_config(repo)
    cfg = replace(cfg, data=replace(cfg.data, max_chars=400_000, max_header_lines=20, max_lines=50_000))
    folder = prepare(cfg)
    ledger = ledger_of(folder)
    texts = {p: p.read_text(encoding="utf-8") for p in repo.rglob("*.py") if p.parent != repo}
    bodies = {name: strip_header(text, "python", 20) for name, text in texts.items()}
    longer = [len(t.encode()) - len(bodies[n].encode()) for n, t in texts.items() if len(bodies[n]) < len(t)]
    files = list(repo.rglob("*.py"))
    empty = sum(f.stat().st_size == 0 for f in files)
    dropped = {reason: count for reason, (count, _) in ledger["dropped"].items()}
    assert dropped.pop("near-duplicate") >= 1
    assert dropped == {"characters": empty + 1, "duplicate": 1, "not UTF-8": 1, "syntax": 3, "NUL": 1}
    assert ledger["changed"] == {
        "byte-order mark cut off": [1, 3],
        "long header cut off": [1 + len(longer), 30 * 17 + sum(longer)],
        "CRLF line ends, kept": [1, 0],
    }
    assert ledger["read"] == [len(files), sum(f.stat().st_size for f in files)]
    assert_adds_up(ledger)
    kept = [text for split in ("train", "val", "test") for text in texts_of(folder, split, cfg.tokenizer)]
    assert len(kept) == ledger["kept"][0] and sum(len(t.encode()) for t in kept) == ledger["kept"][1]
    assert {"x = 1\r\ny = 2\r\n" * 9, "bom = 'kept without its mark'\n" * 3, "header = 'cut off'\n"} <= set(kept)
    assert len([t for t in kept if "class JSONDecoder" in t]) == 1


def test_every_document_is_explained_and_every_token_has_its_document(corpus, capsys):
    for package in ("email", "json"):
        shutil.copytree(corpus / package, Path("repo") / package)
    for name, content in (
        ("a/copy.py", "one = 1\n" * 20),
        ("b/copy.py", "one = 1\n" * 20),
        ("bad.py", "def f(:\n" * 20),
        ("note.txt", "no"),
    ):
        Path("repo", name).parent.mkdir(exist_ok=True)
        Path("repo", name).write_text(content, encoding="utf-8")
    cfg = tiny_config(Path("repo"))
    folder = prepare(cfg)
    tokenizer, lines = load_json(folder / "tokenizer.json", cfg.tokenizer), list(read_documents(folder))
    datasets = {split: TokenDataset(folder, split) for split in ("train", "val", "test")}
    ends = dict.fromkeys(datasets, 0)
    for line in lines:
        if "split" in line:
            assert line["start"] == ends[line["split"]]
            ends[line["split"]] += line["tokens"]
            ids = datasets[line["split"]].read(line["start"], line["tokens"])
            assert tokenizer.decode(ids[:-1]) == Path("repo", line["key"]).read_text(encoding="utf-8")
            assert ids[-1] == tokenizer.eos_id
    assert ends == {split: len(dataset) for split, dataset in datasets.items()}
    assert {line["key"] for line in lines} == {f.relative_to("repo").as_posix() for f in Path("repo").rglob("*.py")}

    def ask(*flags: str) -> list[str]:
        """The lines that the script's `main` prints, or its error."""
        capsys.readouterr()
        try:
            assert data_pipeline.main([*tiny_flags("repo"), *flags]) == 0
        except DataError as e:
            return str(e).splitlines()
        return [x for x in capsys.readouterr().out.splitlines() if "repo, python" in x]

    middle = next(line for line in lines if line.get("split") == "train" and line["tokens"] > 50)
    assert (
        middle["key"]
        in script(
            "data_pipeline.py", *tiny_flags("repo"), "--locate", f"train:{middle['start'] + 7}", cwd=Path.cwd()
        ).stdout
    )
    (said,) = ask("--explain", "repo/bad.py")
    assert "dropped by the rule 'syntax': line 1" in said
    both = ask("--explain", "copy.py")
    assert sorted(b[:9] for b in both) == ["a/copy.py", "b/copy.py"]
    dropped = next(b for b in both if "dropped" in b)
    assert dropped.endswith("'duplicate': the same content as " + ("b/copy.py" if dropped[0] == "a" else "a/copy.py"))
    assert len(ask("--explain", "repo/a/copy.py")) == 1  # a path that exists is that file alone
    assert f"kept, in the {middle['split']} split" in ask("--explain", middle["key"])[0]
    last = "repo/" + local_files(cfg.data.sources[0])[-1].key
    for flags, word in (
        (("--explain", "repo/note.txt"), "matches none of **/*.py"),
        (("--explain", last, "--data.sources.0.max-documents", "20"), "max_documents of repo end before it"),
        (("--explain", last, "--data.max-tokens", "90000"), "the build ended before it"),
        (("--explain", "nothing.py"), "'nothing.py' was not (no document has a name that ends so)"),
        (("--locate", "train:99999999"), "99,999,999"),
        (("--locate", "train"), "SPLIT:POSITION"),
        (("--locate", "train:\u00b2"), "SPLIT:POSITION"),
    ):
        (said,) = ask(*flags)
        assert word in said


def test_a_run_is_explained_from_the_build_that_it_was_trained_on(corpus, capsys):
    shutil.copytree(corpus / "email", "repo")
    cfg = tiny_config(Path("repo"))
    cfg = replace(cfg, data=replace(cfg.data, val_fraction=0.3, test_fraction=0.3))
    flags = [*tiny_flags("repo"), "--data.val-fraction", "0.3", "--data.test-fraction", "0.3"]
    folder = prepare(cfg)
    RunDirectory(Path("runs/mine")).create(cfg, folder)
    first = next(line["key"] for line in read_documents(folder) if line.get("split") == "train")
    Path("repo/added.py").write_text("new = 1\n" * 30, encoding="utf-8")  # so the same settings give another build
    capsys.readouterr()
    for argv in (["--locate", "train:0"], ["--explain", first]):
        assert data_pipeline.main(["--run", "mine", *argv]) == 0
        said = capsys.readouterr()
        assert said.err == f"reading {folder}, which runs/mine was trained on\n" and said.out.startswith(f"{first} (")
    assert [p for p in Path("data").iterdir() if not p.name.startswith(".")] == [folder]  # nothing is built
    assert data_pipeline.main([*flags, "--explain", "added.py"]) == 0
    said = capsys.readouterr()
    assert "the build of these settings; --run NAME reads that of a run\n" in said.err and str(folder) not in said.err
    with pytest.raises(DataError, match=r"'added\.py' was not"):
        data_pipeline.main(["--run", "runs/mine", "--explain", "added.py"])
    folder.rename("elsewhere")
    with pytest.raises(DataError, match=f"{folder.name}, but that is gone .looked in {Path('data').absolute()}"):
        data_pipeline.main(["--run", "mine", "--explain", first])
    with pytest.raises(DataError, match="--run must come with --explain or --locate"):
        data_pipeline.main(["--run", "mine"])


def test_the_table_of_documents_is_what_the_log_says(corpus):
    Path("rows.jsonl").write_text(
        "".join(json.dumps({"content": f"row {i} " * 9, "lang": ["Text", "c"][i % 2]}) + "\n" for i in range(300)),
        encoding="utf-8",
    )
    cfg = tiny_config(corpus)
    rows = SourceConfig(kind="jsonl", path="rows.jsonl")
    folder = prepare(replace(cfg, data=replace(cfg.data, sources=(*cfg.data.sources, rows), near_dedup=None)))
    lines = list(read_documents(folder))
    for split in SPLITS:
        dataset = TokenDataset(folder, split)
        table = dataset.info.table
        found = [
            (tokens, n_bytes, table["languages"][language], table["sources"][source])
            for tokens, n_bytes, language, source in dataset.documents
        ]
        assert found == [
            (x["tokens"], x["bytes"] - sum(cut for _, cut in x.get("changes", ())), x["language"], x["source"])
            for x in lines
            if x.get("split") == split
        ]
        assert dataset.documents[:, BYTES].sum() == dataset.info.bytes
        assert dataset.lengths.sum() == len(dataset) and len(dataset.lengths) == dataset.info.documents
        assert set(table["languages"]) == {"python", "text", "c"} and len(table["sources"]) == 2


@pytest.mark.slow
def test_builds_with_one_and_two_workers_and_after_a_kill_are_the_same_bytes(corpus):
    shutil.copytree(corpus, "repo")
    for i in range(8):
        shutil.copytree("repo/email", f"repo/copy{i}")
    flags = (*tiny_flags("repo"), "--data.dedup", "False", "--data.near-dedup", "None")
    script("data_pipeline.py", *flags, cwd=Path.cwd(), fresh=True)  # with other hashes of strings than the build below
    (folder,) = Path("data").iterdir()
    one = built_bytes(folder)
    shutil.rmtree("data")
    command = [sys.executable, ROOT / "data_pipeline.py", *flags, "--data.workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(Path("data").glob(".building-*/tokenizer.json")):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not folder.exists()
    script("data_pipeline.py", *flags, "--data.workers", "2", cwd=Path.cwd())
    two = built_bytes(folder)
    assert one.keys() == two.keys() >= {"ledger.json", "documents.jsonl.gz", "manifest.json", "train-00000.npy"}
    assert one == two


def test_nothing_changed_reuses_and_any_change_rebuilds(corpus, capsys, monkeypatch):
    for package in ("email", "json"):
        shutil.copytree(corpus / package, Path("repo") / package)
    cfg = tiny_config(Path("repo"))
    first = prepare(cfg)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(build, "WorkerPool", None)  # not one document is read
        assert prepare(cfg) == first and "built" not in capsys.readouterr().out
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
    train = build.train
    monkeypatch.setattr(build, "train", lambda texts, *rest: train(seen.extend(texts) or seen, *rest))
    cfg = tiny_config(corpus)
    folder = prepare(cfg)
    assert sorted(seen) == sorted(texts_of(folder, "train", cfg.tokenizer))


def test_no_near_duplicate_straddles_the_splits_and_planted_copies_are_dropped(corpus):
    shutil.copytree(corpus, "repo")
    rng = random.Random(0)
    originals = [p for p in sorted(Path("repo").rglob("*.py")) if p.stat().st_size > 3000]
    for path in originals:
        text = path.read_text(encoding="utf-8")
        blocks = re.split(r"(?m)^(?=def |class )", text)
        head, rest = blocks[0], blocks[1:]
        rng.shuffle(rest)
        path.with_name("reordered_" + path.name).write_text(head + "".join(rest), encoding="utf-8")
        path.with_name("commented_" + path.name).write_text(
            "# Copyright someone\n" + text + "# the end\n", encoding="utf-8"
        )
        path.with_name("copied_" + path.name).write_text(text, encoding="utf-8")
    cfg = tiny_config(Path("repo"))
    cfg = replace(cfg, data=replace(cfg.data, check_syntax=False, val_fraction=0.25))
    folder = prepare(cfg)
    lines = list(read_documents(folder))
    for path in originals:  # of each and its three copies, one is left
        kept = [
            x["key"] for x in lines if "split" in x and x["key"].endswith(path.name) and path.parent.name in x["key"]
        ]
        assert len([k for k in kept if re.fullmatch(rf"\w+/((reordered|commented|copied)_)?{path.name}", k)]) <= 1, kept
    rules = [x["dropped"] for x in lines if "dropped" in x and "copied_" in x["key"]]
    assert len(rules) + sum("split" in x for x in lines if "copied_" in x["key"]) == len(originals)
    planted = [x for x in lines if "of" in x and re.search("reordered_|commented_|copied_", x["key"])]
    assert len(planted) > 50
    for x in planted:  # and the log names the one that is left
        original = lines[x["of"]]["key"]
        assert "split" in lines[x["of"]] or x["dropped"] == "duplicate"  # of one that is a near-duplicate itself
        assert re.sub("reordered_|commented_|copied_", "", original) == re.sub(
            "reordered_|commented_|copied_", "", x["key"]
        )
    index = MinHashIndex(0.65)
    for text in texts_of(folder, "train", cfg.tokenizer):
        index.add(signature(word_hashes(text)))
    for text in texts_of(folder, "val", cfg.tokenizer):
        assert index.find(signature(word_hashes(text))) is None


def test_a_benchmarks_problem_in_a_file_keeps_it_out(corpus):
    shutil.copytree(corpus, "repo")
    prompt = "from typing import List\n\n\ndef has_close_elements(numbers: List[float], threshold: float) -> bool:\n"
    prompt += '    """ Check if in given list of numbers, are any two numbers closer to each other than given threshold. """\n'
    Path("repo/solution.py").write_text("import os\n\n" + prompt, encoding="utf-8")
    cfg = tiny_config(Path("repo"))
    assert "benchmark" not in ledger_of(prepare(cfg))["dropped"]
    folder = prepare(replace(cfg, data=replace(cfg.data, decontaminate=("humaneval",))))
    assert ledger_of(folder)["dropped"]["benchmark"][0] == 1
    (line,) = [x for x in read_documents(folder) if x["key"] == "solution.py"]
    assert line["value"].startswith("HumanEval/0: 'from typing import list def has_close_elements")


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


@pytest.mark.parametrize("fim_rate", [0.0, 0.5])
def test_what_a_tokenizer_rewrites_is_refused_before_the_build_or_counted_and_explained(fim_rate, capsys):
    Path("repo").mkdir()
    for i in range(24):
        text = f"name_{i} = 'cafe\u0301 {i}'\n" if i % 3 == 0 else f"name_{i} = {i}\n"
        Path(f"repo/f{i}.py").write_text(text * 9, encoding="utf-8")
    content = json.loads(train(["name = 1\n"], TokenizerConfig(), 300).to_json()) | {"normalizer": {"type": "NFC"}}
    Path("theirs.json").write_text(json.dumps(content), encoding="utf-8")
    cfg = tiny_config(Path("repo"))
    cfg = replace(cfg, data=replace(cfg.data, near_dedup=None, fim_rate=fim_rate, val_fraction=0.2, test_fraction=0.2))
    cfg = replace(cfg, tokenizer=TokenizerConfig(kind="pretrained", path="theirs.json"))
    with pytest.raises(TokenizerError, match=r"'e\\u0301' comes back as '\\xe9'.*--tokenizer\.lossy True"):
        prepare(cfg)
    assert not Path("data").exists()
    cfg = replace(cfg, tokenizer=replace(cfg.tokenizer, lossy=True))
    folder = prepare(cfg)
    (row,) = ledger_rows(folder)
    assert row["changed"]["rewritten by the tokenizer"] == [8, 0] and row["kept"][0] == 24
    assert_adds_up(row)
    out = capsys.readouterr().out
    assert re.search(r"^  rewritten by the tokenizer +8 ", out, re.MULTILINE)
    assert r"the tokenizer rewrites text: 'e\u0301' comes back as '\xe9'" in out
    assert "rewritten by the tokenizer" in explain(folder, {"f0.py"})[0]
    assert "rewritten by the tokenizer" not in explain(folder, {"f1.py"})[0]
    held_out = texts_of(folder, "val", cfg.tokenizer) + texts_of(folder, "test", cfg.tokenizer)
    assert held_out and all("\u0301" not in text for text in held_out)


def mixture(stopping_strategy: str, max_tokens: int | None = None, n_a: int = 400):
    """A config of two sources, weighted three to one."""
    for name, letter, count in (("a", "alpha", n_a), ("b", "beta", 400)):
        Path(name).mkdir()
        for i in range(count):
            Path(name, f"{i}.py").write_text(f"{letter}_{i} = {i}\n" * 20, encoding="utf-8")
    cfg = tiny_config(Path("a"))
    sources = tuple(SourceConfig(kind="files", path=p, weight=w) for p, w in (("a", 3.0), ("b", 1.0)))
    return replace(
        cfg,
        data=replace(cfg.data, sources=sources, max_tokens=max_tokens, workers=2, stopping_strategy=stopping_strategy),
    )


def test_a_mixture_draws_its_tokens_by_weight_and_reports_the_shares(capsys):
    folder = prepare(mixture("stop", max_tokens=30_000))
    a, b = (row["tokens"] for row in ledger_rows(folder))
    assert a / (a + b) == pytest.approx(0.75, abs=0.02)
    assert 30_000 <= len(TokenDataset(folder, "train")) < 31_000
    out = capsys.readouterr().out
    for source, share, wanted in (("a", a / (a + b), "75.0%"), ("b", b / (a + b), "25.0%")):
        assert f"  {source}: {share:.1%} of the tokens, {wanted} wanted" in out


def test_a_source_that_runs_dry_stops_the_build_where_the_config_says_so(capsys):
    folder = prepare(mixture("stop", n_a=100))
    a, b = ledger_rows(folder)
    assert a["read"][0] == 100 and a["tokens"] / (a["tokens"] + b["tokens"]) == pytest.approx(0.75, abs=0.02)
    assert "source a ran dry: the build stops here" in capsys.readouterr().err


def test_a_source_that_runs_dry_is_left_out_where_the_config_says_so(capsys):
    folder = prepare(mixture("continue", n_a=100))
    assert [r["read"][0] for r in ledger_rows(folder)] == [100, 400]
    assert "source a ran dry: the others go on" in capsys.readouterr().err


def test_a_source_that_runs_dry_is_repeated_with_its_training_documents_only(capsys):
    cfg = mixture("repeat", n_a=100)
    folder = prepare(cfg)
    a, b = ledger_rows(folder)
    assert (a["read"][0], b["read"][0]) == (100, 400) and a["repeated"][0] > 1000 and b["repeated"] == [0, 0]
    assert a["tokens"] / (a["tokens"] + b["tokens"]) == pytest.approx(0.75, abs=0.02)
    assert_adds_up(a), assert_adds_up(b)
    texts = {split: texts_of(folder, split, cfg.tokenizer) for split in ("train", "val", "test")}
    assert len(set(texts["val"])) == len(texts["val"]) and len(set(texts["test"])) == len(texts["test"])
    assert not set(texts["train"]) & set(texts["val"] + texts["test"])
    assert max(texts["train"].count(t) for t in set(texts["train"])) >= 10
    assert sum(map(len, texts.values())) == a["kept"][0] + a["repeated"][0] + b["kept"][0]
    assert "source a ran dry: it is repeated" in capsys.readouterr().err
    trained = next(x["key"] for x in read_documents(folder) if x["source"] == "a" and x["split"] == "train")
    (explained,) = [x for x in explain(folder, {trained}) if "(a, " in x]
    assert re.search(
        r"kept, in the train split, tokens [\d,]+ to [\d,]+, and \d\d times more in a repetition", explained
    )
    notes = json.loads((folder / "ledger.json").read_text(encoding="utf-8"))["notes"]
    assert any(re.fullmatch(r"source a was begun \d\d times", n) for n in notes)


def test_a_source_that_is_gone_when_it_is_to_be_repeated_ends_quietly_in_a_note(monkeypatch):
    cfg, reads = mixture("repeat", n_a=100), []

    def gone_at_the_third_reading(source, files):
        reads.append(source.path)
        return documents(source, files) if reads.count(source.path) < 3 else iter(())

    monkeypatch.setattr("kindling.data.build.documents", gone_at_the_third_reading)
    folder = prepare(cfg)  # the first reading is the tokenizer's, the second the build's
    assert reads.count("a") == 3
    notes = json.loads((folder / "ledger.json").read_text(encoding="utf-8"))["notes"]
    assert any("in its repetition nothing of it was there any more" in n for n in notes)
    assert ledger_rows(folder)[1]["read"][0] == 400


def test_a_build_that_ends_short_of_its_tokens_says_so(corpus):
    cfg = tiny_config(corpus)
    folder = prepare(replace(cfg, data=replace(cfg.data, max_tokens=10**9)))
    (note,) = json.loads((folder / "ledger.json").read_text(encoding="utf-8"))["notes"]
    assert re.fullmatch(
        r"the sources held [\d,]+ of the 1,000,000,000 training tokens wanted \(data.max_tokens\)", note
    )


def test_a_stream_that_broke_is_named_in_the_ledger_and_each_time_that_the_shards_are_used(corpus, monkeypatch, capsys):
    def stream():
        for n in range(200):
            yield {"text": f"story number {n} " * 5}
        raise ConnectionError("gone")

    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: stream())
    cfg = tiny_config(corpus)
    hub = SourceConfig(kind="datasets", path="me/stories", field="text", language="english")
    cfg = replace(cfg, data=replace(cfg.data, sources=(*cfg.data.sources, hub), stopping_strategy="continue"))
    folder = prepare(cfg)
    rows = {r["language"]: r for r in ledger_rows(folder)}
    assert rows["english"]["read"][0] == 201 and rows["english"]["dropped"]["unreadable"][0] == 1
    assert rows["python"]["kept"][0] > 50  # not fatal for the rest
    capsys.readouterr()
    assert prepare(cfg) == folder
    assert (
        "was built without me/stories: the rest of the data set, after row 199: ConnectionError: gone"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow) if n in ("demo-infill", "modern-5m", "portable-5m") else n
        for n in PRESETS
    ],
)  # these have the data and the tokenizer of demo; autocomplete is cut into pieces as demo-infill is
def test_each_presets_data_builds_from_local_files_of_its_real_format(name, tmp_path):
    cfg = preset(name)
    sources = tuple(replace(s, max_bytes=s.max_bytes and 2_000_000) for s in cfg.data.sources)
    cfg = replace(cfg, data=replace(cfg.data, sources=sources))
    cfg = local_preset(cfg, tmp_path)
    if cfg.data.instructions:  # the small tokenizer spells a template in many tokens
        cfg = replace(cfg, model=replace(cfg.model, block_size=1024))
    folder = prepare(cfg)
    rows = ledger_rows(folder)
    for row in rows:
        assert_adds_up(row)
    languages = {s.language for s in cfg.data.sources} - {None} or (
        {"python"} if name in ("demo", "demo-infill", "modern-5m", "portable-5m") else {"python", "c", "java"}
    )
    assert {row["language"] for row in rows} == languages
    assert all(row["tokens"] > 0 for row in rows)
    weights = [s.weight for s in cfg.data.sources]
    tokens = [sum(r["tokens"] for r in rows if r["source"] == s.label) for s in cfg.data.sources]
    for weight, drawn in zip(weights, tokens):
        assert drawn / sum(tokens) == pytest.approx(weight / sum(weights), abs=0.05)
    text = texts_of(folder, "train", cfg.tokenizer)[0]
    begins = {"smallcoder-4": "User: ", "docstrings": "Below is an", "alpaca": "Below is an"}
    assert [text.startswith(begin) for begin in ("User: ", "Below is an")] == [
        begins.get(name) == begin for begin in ("User: ", "Below is an")
    ]
    if name == "alpaca":  # from the columns that hold no answer
        assert "and the answer too" not in text and "### Input:\nan answer, " in text


def kill_on_poison(batch: list[Document], tokenizer_file: Path | None) -> list[ProcessedDocument]:
    if any(d.text == "poison" for d in batch):
        os._exit(9)
    return [ProcessedDocument(d.key, d.language, d.size, text=d.text) for d in batch]


@pytest.mark.slow
def test_a_document_that_kills_its_worker_is_dropped_and_only_that_one():
    poisoned = {100, 101, 333}
    stream = [Document(str(i), "python", text="poison" if i in poisoned else "fine", size=9000) for i in range(400)]
    with WorkerPool(DataConfig(workers=2), TokenizerConfig(), examine=kill_on_poison) as pool:
        processed = []
        for e in pool.map(stream):
            time.sleep(0.002)  # a consumer that works, so that a pool is found broken while it is being fed
            processed.append(e)
    assert [e.key for e in processed] == [str(i) for i in range(400)]
    crash = Drop("crash", "its worker process died")
    assert {e.key: e.drop for e in processed if e.drop} == {str(i): crash for i in poisoned}


LIMITED = """
import math, os, signal, sys, time
from config import DataConfig
from kindling.data import workers
from kindling.data.sources import Document

def spend(document):
    os.write(1, b"begun ")
    while document.key == "busy":
        pass
    time.sleep({"quick": 0, "waits": 0.5, "hangs": 60}[document.key])
    return []

workers.DOCUMENT_LIMIT_S = float(sys.argv[1])
workers._worker.update(processor=spend, tokenizer_file=None, sink=open(os.devnull, "w"), limited_from=-math.inf)
spend.all_of = spend
for batch in sys.argv[2:]:
    workers._process_batch([Document(key, "python", text="") for key in batch.split()], None)
time.sleep(60 * workers.DOCUMENT_LIMIT_S)  # while it waits for the next batch nothing is limited
os.write(1, b"ended")
"""


def worker_with_limit(limit_s: float, *batches: str) -> tuple[int, bytes]:
    """How a worker ends, and what it says, whose documents are limited to so many seconds of CPU time."""
    result = subprocess.run([sys.executable, "-c", LIMITED, f"{limit_s}", *batches], capture_output=True, cwd=ROOT)
    return result.returncode, result.stdout


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer of CPU time on this system")
def test_a_document_is_limited_in_cpu_time_so_that_a_busy_machine_drops_no_more():
    assert worker_with_limit(0.3, "waits busy") == (-signal.SIGPROF, b"begun begun ")


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer of CPU time on this system")
def test_a_document_that_hangs_without_using_the_processor_ends_its_worker_too_and_a_batch_may_wait():
    assert worker_with_limit(0.02, "waits hangs") == (1, b"begun begun ")
    assert worker_with_limit(0.02, "quick", "hangs") == (1, b"begun begun ")
    assert worker_with_limit(0.02, "waits waits") == (0, b"begun begun ended")


def test_a_file_far_over_the_limit_is_dropped_unread(corpus):
    shutil.copytree(corpus, "repo")
    with open("repo/huge.py", "wb") as f:
        f.truncate(3 * 2**30)  # sparse
    ledger = ledger_of(prepare(tiny_config(Path("repo"))))
    assert ledger["dropped"]["characters"][1] == 3 * 2**30


@pytest.mark.parametrize(
    "sent", [signal.SIGKILL, *(pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGTERM, signal.SIGINT))]
)
def test_a_build_that_is_killed_leaves_nothing_that_looks_whole(corpus, sent):
    shutil.copytree(corpus, "repo")
    for i in range(8):  # enough work to be killed in
        shutil.copytree("repo/email", f"repo/copy{i}")
    flags = (*tiny_flags("repo"), "--data.dedup", "False", "--data.near-dedup", "None")
    process, deadline = started("data_pipeline.py", *flags, cwd=Path.cwd()), time.monotonic() + 300
    while not list(Path("data").glob(".building-*/tokenizer.json")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, sent)
    assert process.wait() != 0
    assert not [p for p in Path("data").glob("*") if not p.name.startswith(".building-")]
    if sent != signal.SIGKILL:
        assert not list(Path("data").iterdir())
    script("data_pipeline.py", *flags, cwd=Path.cwd())
    assert not list(Path("data").glob(".building-*"))  # what the killed one left is cleared away
    assert len(list(Path("data").iterdir())) == 1


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (SourceConfig(kind="files", path="nowhere"), ["'nowhere'", "--data.sources.0.path"]),
        (SourceConfig(kind="files", path="void"), ["void", "**/*.py", "--data.sources.0.globs"]),
        (SourceConfig(kind="parquet", path="bad.parquet"), ["split must not be empty", "unreadable 1", "Parquet"]),
        (SourceConfig(kind="jsonl", path="rows.jsonl", field="code"), ["unreadable 1", "'code'", "not among content"]),
        (
            SourceConfig(kind="datasets", path="nobody/nothing"),
            ["nobody/nothing", "hf auth login", "--data.sources.0.kind parquet"],
        ),
        (SourceConfig(kind="files", path="blank"), ["at least one block of", "blank", "--model.block-size"]),
    ],
)
def test_a_source_that_cannot_be_used_is_one_line_with_a_way_out(source, words):
    Path("void").mkdir()
    Path("blank").mkdir()
    Path("blank/a.py").touch()
    Path("rows.jsonl").write_text('{"content": "x = 1"}', encoding="utf-8")
    Path("bad.parquet").write_text("no", encoding="utf-8")
    cfg = tiny_config(Path("."))
    with pytest.raises(DataError) as error:
        prepare(replace(cfg, data=replace(cfg.data, sources=(source,))))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert not list(Path("data").glob("*")) if Path("data").exists() else True


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_nothing(corpus):
    result = limited("data_pipeline.py", 20_000, *tiny_flags(corpus))
    assert_one_clear_line(result, "data/", "room for the shards")
    assert not list(Path("data").iterdir())


def limited(name: str, file_bytes: int, *args: str) -> subprocess.CompletedProcess:
    """Run a script that can write no file larger than `file_bytes`: to it, a disk that is full."""
    before = (
        "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({file_bytes}, {file_bytes}))"
    )
    return script(name, *args, cwd=Path.cwd(), before=before)


def test_the_real_corpus_builds(tmp_path):
    path = shared_file("code_corpus.jsonl.gz")
    cfg = tiny_config(tmp_path)
    source = SourceConfig(kind="jsonl", path=str(path), max_documents=300)
    folder = prepare(replace(cfg, data=replace(cfg.data, sources=(source,))))
    assert ledger_of(folder)["read"][0] == 300 and ledger_of(folder)["dropped"]["characters"][0] > 5


def test_settings_have_their_old_names_in_the_fingerprint_so_that_old_data_is_found(corpus, monkeypatch):
    hashed = []
    monkeypatch.setattr(build.json, "dumps", lambda parts, **how: hashed.append(parts) or "{}")
    cfg = tiny_config(corpus)
    fingerprint(cfg, list_files(cfg))
    (parts,) = hashed
    assert parts["data"]["when_dry"] == "repeat" and "stopping_strategy" not in parts["data"]
    assert "lossy" not in parts["tokenizer"]


def test_a_package_that_is_not_installed_has_no_version(monkeypatch, corpus):
    cfg = tiny_config(corpus)
    files = list_files(cfg)
    known = fingerprint(cfg, files)

    def missing(name):
        if name == "sentencepiece":
            raise build.PackageNotFoundError(name)
        return version(name)

    version = build.version
    monkeypatch.setattr(build, "version", missing)
    assert fingerprint(cfg, files) != known

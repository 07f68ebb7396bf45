import copy
import gzip
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import shared_file, tiny_config
from given_figures import GivenFigures
from test_examples import TOKENIZER, conversations, write_examples

from config import ModelConfig, TokenizerConfig, TrainConfig
from kindling import device
from kindling.data.build import prepare
from kindling.data.examples import Examples
from kindling.data.shards import (
    SPLITS,
    DataError,
    PackedBlocks,
    ShardWriter,
    TokenDataset,
    with_checksum,
    write_manifest,
)
from kindling.errors import ConfigError
from kindling.evaluation import perplexity
from kindling.evaluation.perplexity import document_losses, text_losses
from kindling.files import write_json
from kindling.runs.checkpoint import RunDirectory
from kindling.tokenization.train_tokenizer import train_bpe
from kindling.training.loop import fit
from kindling.training.trainer import Trainer
from kindling.training.validation import validate
from model import build_model

EOS, T = 3, 16
RUNTIME = device.resolve(TrainConfig(device="cpu", precision="fp32"))
TINY = ModelConfig(block_size=T, vocab_size=512, n_layer=2, n_head=2, n_embd=16, init_std=0.3)
LENGTHS = (1, 5, 40, 2, 17, 33, 16, 9)  # of documents, longer than a row and next to nothing


def model_of(cfg: ModelConfig = TINY):
    """A model with random weights, and its copy in float64 for reference."""
    device.seed_all(0)
    model = build_model(cfg).eval()
    return model, copy.deepcopy(model).double()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A data folder whose splits hold the same documents, of two languages and two sources."""
    folder, rng = tmp_path_factory.mktemp("documents"), np.random.default_rng(0)
    pieces = [np.append(rng.integers(4, 512, n - 1), EOS).astype(np.uint32) for n in LENGTHS]
    writers = {split: ShardWriter(folder, split, np.dtype("<u2")) for split in SPLITS}
    for writer in writers.values():
        for n, piece in enumerate(pieces):
            writer.add(piece, 10 + n, ["python", "java"][n % 3 == 0], ["a", "b"][n % 2])
        writer.close()
    write_manifest(
        folder,
        fingerprint="x",
        dtype="<u2",
        tokenizer_sha256="f" * 64,
        vocab_size=512,
        eos_id=EOS,
        splits={k: w.info for k, w in writers.items()},
    )
    return folder


@pytest.fixture
def dataset(folder):
    return TokenDataset(folder, "val")


@torch.no_grad()
def nll_of(reference, context: np.ndarray, target: int) -> float:
    """The loss of one token after its context, in float64."""
    logits = reference.head(reference.hidden(torch.from_numpy(context[None])))[0, -1]
    return -float(logits.log_softmax(-1)[target])


def by_brute_force(reference, tokens: np.ndarray, stride: int, document_mask: bool = False) -> list[float]:
    """The loss of each token but the first, from the tokens that its row has before it."""
    out = []
    for place in range(1, len(tokens)):
        start = 0 if place <= T else -(-(place - T) // stride) * stride  # of the first row that reaches it
        if document_mask:
            ends = np.flatnonzero(tokens[start:place] == EOS)
            start += int(ends[-1]) if len(ends) else 0
        assert place - start <= T
        out.append(nll_of(reference, tokens[start:place], int(tokens[place])))
    return out


def per_document(values: list[float]) -> list[float]:
    """Sums over the documents, of which the first lacks its first token."""
    return [sum(part) for part in np.split(np.array([0.0, *values]), np.cumsum(LENGTHS)[:-1])]


# -- documents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("stride", [None, 1, 5, T - 1])
def test_the_losses_of_documents_are_those_of_a_float64_reference_token_by_token(dataset, stride, document_mask):
    model, reference = model_of(replace(TINY, document_mask=document_mask))
    expected = by_brute_force(reference, dataset.read(0, len(dataset)), stride or T, document_mask)
    losses = document_losses(model, dataset, RUNTIME, stride, batch_size=4)
    assert losses.nll.dtype == np.float64
    assert losses.nll.tolist() == pytest.approx(per_document(expected), rel=1e-5)
    assert losses.tokens.tolist() == [0, *LENGTHS[1:]] and losses.bytes.tolist() == list(range(10, 18))
    found = losses.summary()
    assert (found["tokens"], found["bytes"], found["documents"]) == (len(dataset) - 1, 108, 8)
    assert found["loss"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(expected)), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(sum(expected) / math.log(2) / 108, rel=1e-5)


@pytest.mark.parametrize("stride", [None, 5])
def test_the_losses_do_not_depend_on_the_batch_size(dataset, stride):
    model, _ = model_of()
    one, *others = (document_losses(model, dataset, RUNTIME, stride, batch_size).nll for batch_size in (1, 3, 16))
    for other in others:
        assert other.tolist() == pytest.approx(one.tolist(), rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_total_is_that_of_validation(dataset, precision):
    model, _ = model_of(replace(TINY, document_mask=True))
    runtime = replace(RUNTIME, precision=precision)
    expected, found = validate(model, dataset, runtime), document_losses(model, dataset, runtime).summary()
    for name, value in expected.items():
        assert found[name.removeprefix("val_")] == pytest.approx(value, rel=1e-5)


def test_a_stride_costs_as_many_rows_as_the_context_holds_strides(dataset):
    seen = []
    model, _ = model_of()
    hidden = model.hidden
    model.hidden = lambda idx, position_ids=None: seen.append(idx) or hidden(idx, position_ids)
    document_losses(model, dataset, RUNTIME, stride=4, batch_size=1)
    assert len(seen) == 1 + math.ceil((len(dataset) - 1 - T) / 4)


def test_languages_and_sources_sum_to_the_whole(dataset):
    model, _ = model_of()
    losses = document_losses(model, dataset, RUNTIME)
    whole = losses.summary()
    for parts, names in ((losses.by_language(), ["python", "java"]), (losses.by_source(), ["b", "a"])):
        assert sorted(parts) == sorted(names)
        assert [p["tokens"] for p in parts.values()] == sorted((p["tokens"] for p in parts.values()), reverse=True)
        for name in ("tokens", "bytes", "documents"):
            assert sum(p[name] for p in parts.values()) == whole[name]
        total = sum(p["loss"] * p["tokens"] for p in parts.values())
        assert total / whole["tokens"] == pytest.approx(whole["loss"], rel=1e-12)
    java = losses.by_language()["java"]
    assert java["documents"] == 3 and java == losses.summary(np.arange(8) % 3 == 0)
    assert java["bits_per_byte"] == pytest.approx(losses.nll[::3].sum() / math.log(2) / (10 + 13 + 16))


def test_a_mask_without_tokens_has_no_loss_and_no_division_by_nothing(dataset):
    losses = document_losses(model_of()[0], dataset, RUNTIME)
    nothing = losses.summary(np.zeros(8, dtype=bool))
    assert nothing["loss"] is nothing["perplexity"] is nothing["bits_per_byte"] is None and nothing["documents"] == 0


def test_a_split_without_the_table_has_the_same_losses_but_no_languages(folder, dataset, tmp_path):
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    del manifest["splits"]["val"]["table"]
    write_json(tmp_path / "manifest.json", with_checksum(manifest))
    (tmp_path / "val-00000.npy").write_bytes((folder / "val-00000.npy").read_bytes())
    model, _ = model_of()
    new, old = (document_losses(model, d, RUNTIME) for d in (dataset, TokenDataset(tmp_path, "val")))
    assert old.nll.tolist() == new.nll.tolist() and old.tokens.tolist() == new.tokens.tolist()
    assert old.summary() == new.summary() and old.by_language() == old.by_source() == {}
    some = np.arange(8) < 4
    assert old.summary(some) == new.summary(some) | {"bytes": None, "bits_per_byte": None}


@pytest.mark.parametrize("stride", [0, -1, T, 1000])
def test_a_stride_that_leaves_no_context_is_refused_in_one_line(dataset, tmp_path, stride):
    Path(tmp_path / "a.txt").write_text("x", encoding="utf-8")
    model, _ = model_of()
    for call in (
        lambda: document_losses(model, dataset, RUNTIME, stride),
        lambda: text_losses(model, TOKENIZER, tmp_path / "a.txt", RUNTIME, stride=stride),
    ):
        with pytest.raises(ConfigError, match=rf"stride must be at least 1 and below .* {T} tokens, but is {stride}"):
            call()


def test_progress_is_told_and_the_model_left_as_it_was(dataset):
    model, _ = model_of(replace(TINY, dropout=0.5))
    told = []
    model.train()
    losses = document_losses(model, dataset, RUNTIME, batch_size=2, progress=told.append)
    assert model.training and min(told) > 0 and told[0] == 2 * T and sum(told) == len(dataset) - 1
    model.eval()
    assert document_losses(model, dataset, RUNTIME, batch_size=2).nll.tolist() == losses.nll.tolist()
    assert not model.training


def test_a_real_run_is_evaluated_by_language_and_source_to_the_figures_of_its_validation(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = tiny_config(corpus, max_steps=6)
    folder, run = prepare(cfg), RunDirectory(tmp_path / "runs" / "r")
    run.create(cfg, folder)
    device.seed_all(0)
    rows = PackedBlocks(TokenDataset(folder, "train"), 32, 0)
    trainer = Trainer(cfg, run, build_model(cfg.model), rows, GivenFigures(), RUNTIME)
    fit(trainer)
    heldout = run.heldout("val")
    expected, losses = validate(trainer.model, heldout, RUNTIME), document_losses(trainer.model, heldout, RUNTIME)
    for name, value in expected.items():
        assert losses.summary()[name.removeprefix("val_")] == pytest.approx(value, rel=1e-5)
    assert list(losses.by_language()) == ["python"] and list(losses.by_source()) == [cfg.data.sources[0].label]
    assert len(losses.nll) == heldout.info.documents > 1 and losses.bytes.sum() == heldout.info.bytes


# -- conversations ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return Examples(write_examples(tmp_path_factory.mktemp("e"), conversations(), TOKENIZER, context=128), "val")


@pytest.mark.parametrize("backbone", ["kindling", "transformers"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_losses_of_conversations_are_those_of_their_responses_one_by_one(examples, backbone, batch_size):
    model, reference = model_of(replace(TINY, block_size=128, backbone=backbone, init_std=0.1))
    expected = []
    for number in range(examples.n_examples):
        example = examples.example(number)
        with torch.no_grad():
            hidden = reference.hidden(torch.from_numpy(example.ids[None, :-1]))
            log_p = reference.head(hidden)[0].log_softmax(-1)
        expected.append(-sum(float(log_p[p - 1, example.ids[p]]) for p in np.flatnonzero(example.supervised)))
    losses = document_losses(model, examples, RUNTIME, batch_size=batch_size)
    assert losses.nll.tolist() == pytest.approx(expected, rel=1e-5)
    assert losses.tokens.tolist() == [int(examples.example(n).supervised.sum()) for n in range(16)]
    assert losses.bytes.tolist() == [sum(len(e.response.encode()) for e in c) for c in conversations()]
    assert losses.summary()["loss"] == pytest.approx(validate(model, examples, RUNTIME)["val_loss"], rel=1e-5)
    assert {name: p["documents"] for name, p in losses.by_source().items()} == {
        start: sum(c[0].instruction[:5] == start for c in conversations())
        for start in {c[0].instruction[:5] for c in conversations()}
    }


def test_a_stride_over_conversations_is_refused_in_one_line(examples):
    model, _ = model_of(replace(TINY, block_size=128))
    with pytest.raises(ConfigError, match=r"stride must be None for conversations.* but is 64; leave it out"):
        document_losses(model, examples, RUNTIME, stride=64)


# -- any text ---------------------------------------------------------------------------------------------------------

TEXTS = ["def f(x):\n    return x\n", "x", "naïve = '…'\r\n" * 9, "for i in range(10):\n    print(i)\n" * 12, "\n\n"]
BOS_TOKENIZER = train_bpe(TEXTS, TokenizerConfig(bos_token="<s>"), 300)


def write_rows(path: Path, rows: list) -> Path:
    content = "".join((json.dumps(row) if isinstance(row, dict) else row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("tokenizer", [TOKENIZER, BOS_TOKENIZER], ids=["eos", "bos"])
@pytest.mark.parametrize("stride", [None, 1, 6])
def test_the_losses_of_texts_are_those_of_a_float64_reference_each_on_its_own(tmp_path, tokenizer, stride):
    model, reference = model_of()
    path = write_rows(tmp_path / "t.jsonl", [{"text": text, "lang": "C"} for text in TEXTS])
    begin = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    expected = [
        by_brute_force(reference, np.array([begin, *tokenizer.encode(text), tokenizer.eos_id]), stride or T)
        for text in TEXTS
    ]
    for batch_size in (1, 3, 16):
        losses = text_losses(model, tokenizer, path, RUNTIME, stride=stride, batch_size=batch_size)
        assert losses.nll.tolist() == pytest.approx([sum(e) for e in expected], rel=1e-5)
        assert losses.tokens.tolist() == [len(tokenizer.encode(text)) + 1 for text in TEXTS]
        assert losses.bytes.tolist() == [len(text.encode()) for text in TEXTS]
        assert list(losses.by_language()) == ["c"] and list(losses.by_source()) == ["t.jsonl"]
        assert not losses.notes


def test_rows_of_many_pools_come_back_to_their_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(perplexity, "POOL", 1)
    model, _ = model_of()
    path, told = write_rows(tmp_path / "t.jsonl", [{"text": text} for text in TEXTS * 4]), []
    losses = text_losses(model, TOKENIZER, path, RUNTIME, batch_size=3, progress=told.append)
    monkeypatch.undo()
    alone = text_losses(model, TOKENIZER, write_rows(path, [{"text": text} for text in TEXTS]), RUNTIME)
    assert losses.nll.tolist() == pytest.approx(alone.nll.tolist() * 4, rel=1e-5)
    assert min(told) > 0 and sum(told) == losses.tokens.sum()


@pytest.mark.parametrize("name", ["a.txt", "a.py", "a.txt.gz", "a.md"])
def test_a_plain_file_is_one_document_to_the_last_byte(tmp_path, name):
    text = "\n" + "\n".join(TEXTS) + "<|endoftext|>\n\n"
    content = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    model, reference = model_of()
    losses = text_losses(model, TOKENIZER, tmp_path / name, RUNTIME)
    ids = np.array([TOKENIZER.eos_id, *TOKENIZER.encode(text), TOKENIZER.eos_id])
    assert losses.nll.tolist() == pytest.approx([sum(by_brute_force(reference, ids, T))], rel=1e-5)
    assert losses.summary()["bytes"] == len(content) and losses.summary()["documents"] == 1
    language = {"py": "python", "md": "markdown"}.get(name[2:], "text")
    assert list(losses.by_language()) == [language] and list(losses.by_source()) == [name]


def test_line_ends_of_windows_are_kept_and_its_byte_order_mark_is_cut_off_and_noted(tmp_path):
    model, _ = model_of()
    (tmp_path / "unix.txt").write_bytes(b"x = 1\ny = 2\n")
    (tmp_path / "dos.txt").write_bytes(b"x = 1\r\ny = 2\r\n")
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfx = 1\r\ny = 2\r\n")
    unix, dos, marked = (
        text_losses(model, TOKENIZER, tmp_path / f"{name}.txt", RUNTIME) for name in ("unix", "dos", "marked")
    )
    assert (unix.bytes, dos.bytes, marked.bytes) == ([12], [14], [14])
    assert dos.nll == marked.nll != unix.nll
    assert marked.notes == {"byte-order mark cut off": 1} and not dos.notes


def test_a_text_that_the_tokenizer_rewrites_is_noted(tmp_path):
    model, _ = model_of()
    tokenizer = train_bpe(TEXTS, TokenizerConfig(normalizer="nfkc"), 400)
    for text, notes in (("x\xb2", {"rewritten by the tokenizer": 1}), ("x2", {})):
        (tmp_path / "a.txt").write_text(text, encoding="utf-8")
        assert text_losses(model, tokenizer, tmp_path / "a.txt", RUNTIME).notes == notes


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", ["holds none", "empty 1"]),
        ("a.jsonl", b"", ["holds none (it is empty)", "column 'text'"]),
        ("a.jsonl", b"\n \n", ["it is empty"]),
        ("a.txt", b"caf\xe9\n", ["not UTF-8 1", "character 3"]),
        ("a.txt", "x = 1\n".encode("utf-16"), ["unreadable 1", "must be UTF-8, but is UTF-16"]),
        ("a.txt.gz", b"\x1f\x8bno gzip", ["unreadable 1", "EOFError"]),
        ("a.txt.gz", gzip.compress(b"x = 1\n" * 99, mtime=0)[:-9], ["unreadable 1"]),
        ("a.jsonl", b'{"code": "x"}\n{', ["unreadable 2", "'text'", "code"]),
        ("a.json", b"[1, 2]", ["unreadable 2", "must be an object"]),
        ("b.txt", None, ["must be a file that exists"]),
    ],
)
def test_a_file_without_a_text_is_refused_in_one_line_that_says_why(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        text_losses(model_of()[0], TOKENIZER, tmp_path / name, RUNTIME)
    assert "\n" not in str(error.value) and name in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_rows_that_cannot_be_read_are_counted_and_shown_and_the_others_are_predicted(tmp_path, capsys, name):
    rows = [{"text": "one"}, "no json", {"text": ""}, {"text": 5}, {"text": "\ud800"}, {"text": "two", "language": "D"}]
    losses = text_losses(model_of()[0], TOKENIZER, write_rows(tmp_path / name, rows), RUNTIME)
    assert losses.notes == {"unreadable": 2, "empty": 1, "not UTF-8": 1}
    assert losses.languages.tolist() == ["unknown", "d"] and losses.bytes.tolist() == [3, 3]
    err = capsys.readouterr().err
    assert (
        err.count("\n") == 1
        and f"{name}:1: " in err
        and "not JSON: Expecting value" in err
        and "unreadable 2" in err
        and "empty 1" in err
    )


@pytest.mark.parametrize("column", ["content", "text", "code"])
def test_the_column_of_the_text_is_the_one_named_or_one_of_the_usual_and_that_is_said(tmp_path, capsys, column):
    path = write_rows(tmp_path / "a.json", [{column: "x = 1", "other": 5}])
    losses = text_losses(model_of()[0], TOKENIZER, path, RUNTIME, field="code")
    assert losses.bytes.tolist() == [5]
    assert capsys.readouterr().err == (
        "" if column == "code" else f"note: {path} has no column 'code': the text is {column!r}\n"
    )


def test_real_files_are_predicted(tmp_path):
    with gzip.open(shared_file("code_corpus.jsonl.gz"), "rt", encoding="utf-8") as f:
        (tmp_path / "real.jsonl").write_text("".join(next(f) for _ in range(30)), encoding="utf-8")
    losses = text_losses(model_of()[0], TOKENIZER, tmp_path / "real.jsonl", RUNTIME, field="content")
    assert len(losses.nll) + losses.notes.total() == 30 and 0 < losses.summary()["bits_per_byte"] < 20

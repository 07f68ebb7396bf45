"""Pieces for fill-in-the-middle: how documents are cut, how builds store them, and in which rows a model sees them."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from config import IGNORE, ModelConfig, TokenizerConfig
from kindling.data.build import fingerprint, prepare
from kindling.data.build_in_parts import gather, make_plan, run_part
from kindling.data.examples import open_split, training_rows
from kindling.data.infilling import (
    KINDS,
    LEFT_TO_RIGHT,
    PSM,
    PSM_LINES,
    SPM,
    SPM_LINES,
    LineCut,
    Shares,
    cut_document,
    end_of_block,
)
from kindling.data.ledger import Ledger, read_documents
from kindling.data.packing import PieceDataset, PieceRows
from kindling.data.shards import DataError, TokenDataset, read_manifest
from kindling.data.sources import list_files
from kindling.data.workers import WorkerPool
from kindling.errors import ConfigError, TokenizerError
from kindling.generation.completion import token_spellings
from kindling.runs.checkpoint import RunDirectory
from kindling.tokenization.infilling import encode_infill
from kindling.tokenization.tokenizer import from_json, load_json
from kindling.tokenization.train_tokenizer import train
from presets import preset

pytestmark = pytest.mark.usefixtures("forked_workers")

CODE = [
    "def add(a, b):\n    return a + b\n\n\n",
    "class Stack:\n    def push(self, x):\n        self.items = [x]\n",
] * 5
BPE = train([*CODE, "# naïve ☃\n"], TokenizerConfig(), 400)
WITH_BOS = train(CODE, TokenizerConfig(bos_token="<bos>", normalizer="nfkc"), 400)
SENTENCEPIECE = train(CODE, TokenizerConfig(kind="sentencepiece"), 340)
TOKENIZERS = {"bpe": BPE, "bos": WITH_BOS, "sentencepiece": SENTENCEPIECE}

TEXTS = st.lists(
    st.sampled_from(
        [*CODE, "x = 1\n", "    ", "\n\n", "naïve ☃ 🔥\ufffd", "<fim_middle>", "<|endoftext|>", "é", "\t" * 30]
    )
).map("".join)


def document(tokenizer, text: str) -> list[int]:
    return [*([] if tokenizer.bos_id is None else [tokenizer.bos_id]), *tokenizer.encode(text), tokenizer.eos_id]


def parts_of(piece: list[int], kind: int, fim) -> tuple[list[int], list[int], list[int]]:
    """The prefix, middle and suffix of a piece with its control tokens, taken apart by hand."""
    if kind in (PSM, PSM_LINES):
        assert piece[0] == fim.prefix
        suffix, middle = piece.index(fim.suffix), piece.index(fim.middle)
        return piece[1:suffix], piece[middle + 1 : -1], piece[suffix + 1 : middle]
    assert piece[:2] == [fim.prefix, fim.suffix]  # the prefix and the middle follow each other
    middle = piece.index(fim.middle)
    return [], piece[middle + 1 : -1], piece[2:middle]


@settings(max_examples=60)
@given(
    st.sampled_from(list(TOKENIZERS)),
    TEXTS,
    st.sampled_from([0.5, 1.0]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(16, 64),
    st.binary(min_size=1),
)
def test_the_pieces_fit_in_a_row_and_their_parts_join_to_the_document(name, text, rate, lines, context, digest):
    tokenizer = TOKENIZERS[name]
    ids, fim = document(tokenizer, text), tokenizer.fim
    pieces = cut_document(ids, tokenizer, Shares(rate, 0.5, lines), context, digest)
    assert pieces.table[:, 0].sum() == len(pieces.ids)
    joined, left = "", []
    for piece, kind in zip(np.split(pieces.ids, pieces.table[:, 0].cumsum()[:-1]), pieces.table[:, 1].tolist()):
        piece = piece.tolist()
        if kind == LEFT_TO_RIGHT:
            assert 0 < len(piece) <= context and not set(piece) & set(fim)
            left += [t for t in piece if t not in (tokenizer.eos_id, tokenizer.bos_id)]
            continue
        joined, left = joined + tokenizer.decode(left), []
        assert len(piece) <= context + 1 and piece[-1] == tokenizer.eos_id
        assert sum(piece.count(token) for token in fim) == 3 and piece.count(tokenizer.eos_id) == 1
        prefix, middle, suffix = parts_of(piece, kind, fim)
        joined += (
            tokenizer.decode(prefix) + tokenizer.decode(middle) + tokenizer.decode(suffix)
            if kind in (PSM, PSM_LINES)
            else ""
        )
        if kind in (SPM, SPM_LINES):
            joined += tokenizer.decode(middle) + tokenizer.decode(suffix)
        for part in (prefix, middle, suffix) if kind in (PSM, PSM_LINES) else (suffix,):
            assert tokenizer.encode(tokenizer.decode(part)) == part, "each part is encoded on its own"
    assert joined + tokenizer.decode(left) == tokenizer.decode(tokenizer.encode(text))
    assert pieces.ids[-1] == tokenizer.eos_id
    assert not text or rate < 1 or (pieces.table[:, 1] != LEFT_TO_RIGHT).all()


def test_the_cuts_follow_from_the_content_alone_and_come_in_the_shares_that_are_set():
    ids = document(BPE, "".join(CODE) * 40)
    same, again, other = (cut_document(ids, BPE, Shares(0.5, 0.25, 0), 32, d) for d in (b"a", b"a", b"b"))
    assert same.ids.tolist() == again.ids.tolist() != other.ids.tolist()
    kinds = np.concatenate([cut_document(ids, BPE, Shares(0.5, 0.25, 0), 32, bytes([d])).table[:, 1] for d in range(9)])
    shares = np.bincount(kinds, minlength=3) / len(kinds)
    assert len(kinds) > 900 and shares == pytest.approx([0.5, 0.375, 0.125], abs=0.05)


PYTHON = """\
import os

def first(items):
    for item in items:
        if item:

            return item
    return None
"""
C = "int f(int x) {\n\tif (x) {\n\t\treturn 1;\n\t}\n\treturn 0;\n}\nint y;\n"


def test_a_middle_at_lines_is_the_end_of_a_line_or_of_its_block():
    def middle(text: str, line: float, start: float, end: float, within: float = 0.0) -> str:
        begins, ends = LineCut(line, start, within, end).places(text)
        return text[begins:ends]

    for number, line in enumerate(line for line in PYTHON.split("\n") if line.strip()):  # of 6 lines with text
        at = (number + 0.5) / 6
        assert middle(PYTHON, at, 0.0, 0.0) == line and middle(PYTHON, at, 0.5, 0.0) == line.lstrip()
        assert middle(PYTHON, at, 0.9, 0.0, within=0.5) == line[len(line) // 2 :]
    assert middle(PYTHON, 0.4, 0.5, 0.9) == "for item in items:\n        if item:\n\n            return item"
    assert middle(PYTHON, 0.2, 0.0, 0.9) == PYTHON.partition("\n\n")[2].rstrip("\n")
    assert middle(PYTHON, 0.9, 0.0, 0.9) == "    return None"
    assert middle(C, 0.2, 0.5, 0.9) == "if (x) {\n\t\treturn 1;\n\t}"
    assert middle(C, 0.0, 0.0, 0.9) == C.partition("\nint y")[0]
    assert middle("a = f(\n    1", 0.9, 0.0, 0.9) == "a = f(", "a line that is not whole is in no middle"
    assert [LineCut(0.5, 0.5, 0.5, 0.5).places(text) for text in ("", "x", "\n\n", "  \nx")] == [None] * 4
    assert end_of_block(["a", ")"], 0) == 0, "a bracket closes what has something in it"


def test_pieces_are_cut_at_lines_in_the_share_that_is_set_and_the_others_stay_as_they_are():
    ids = document(BPE, PYTHON * 200)
    kinds = np.concatenate(
        [cut_document(ids, BPE, Shares(0.5, 0.5, 0.25), 64, bytes([d])).table[:, 1] for d in range(9)]
    )
    shares = np.bincount(kinds, minlength=5) / len(kinds)
    assert len(kinds) > 900 and shares == pytest.approx([0.5, 0.1875, 0.1875, 0.0625, 0.0625], abs=0.04)
    pieces = cut_document(ids, BPE, Shares(1.0, 0.0, 1.0), 64, b"x")
    for piece, kind in zip(np.split(pieces.ids, pieces.table[:, 0].cumsum()[:-1]), pieces.table[:, 1]):
        _, _, suffix = parts_of(piece.tolist(), PSM, BPE.fim)
        assert kind == PSM_LINES and BPE.decode(suffix).startswith("\n")
    one = cut_document(document(BPE, "x = 1"), BPE, Shares(1.0, 1.0, 1.0), 64, b"x")
    assert one.table[:, 1].tolist() == [SPM], "without a whole line it is cut at two characters, and counted so"


def test_a_prompt_to_fill_in_is_what_a_piece_begins_with():
    ids = document(BPE, CODE[0])
    for spm in (False, True):
        piece = cut_document(ids, BPE, Shares(1.0, float(spm), 0), 64, b"x").ids.tolist()
        prefix, middle, suffix = parts_of(piece, SPM if spm else PSM, BPE.fim)
        for n in range(len(middle) + 1):  # in the joint form, the prefix ends anywhere before the middle
            before = prefix + (middle[:n] if spm else [])
            prompt = encode_infill(BPE, BPE.decode(before), BPE.decode(suffix), spm)
            if BPE.encode(BPE.decode(before)) == before:
                assert piece[: len(prompt)] == prompt
    prompt = encode_infill(BPE, "<fim_suffix>", "", False)
    assert prompt == [BPE.fim.prefix, *BPE.encode("<fim_suffix>"), BPE.fim.suffix, BPE.fim.middle]
    assert len(prompt) > 4, "in a text, a control token is text"


@pytest.mark.parametrize("kind", ["bpe", "handwritten", "sentencepiece"])
def test_every_vocabulary_that_is_trained_has_the_control_tokens_within_its_size(kind):
    tokenizer = train([text * 20 for text in CODE], TokenizerConfig(kind=kind), 300)
    assert tokenizer.fim is not None and len({tokenizer.eos_id, *tokenizer.fim}) == 5
    assert max(tokenizer.fim) < tokenizer.vocab_size <= 300
    assert from_json(tokenizer.to_json(), tokenizer.cfg).fim == tokenizer.fim
    for spelling in ("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"):
        assert spelling in tokenizer.special_tokens
        ids = tokenizer.encode(f"a{spelling}b")
        assert not set(ids) & set(tokenizer.fim) and tokenizer.decode(ids) == f"a{spelling}b"


def test_a_padding_token_may_be_that_of_infilling():
    tokenizer = train(CODE, TokenizerConfig(pad_token="<fim_pad>"), 300)
    assert tokenizer.pad_id == tokenizer.fim.pad == 0 and tokenizer.eos_id == 1


def test_spellings_that_are_no_special_tokens_are_no_control_tokens():
    content = json.loads(BPE.to_json())
    for token in content["added_tokens"]:
        token["special"] = "fim" not in token["content"]
    assert from_json(json.dumps(content), TokenizerConfig()).fim is None


def test_token_healing_never_takes_back_or_writes_a_control_token():
    spellings = token_spellings(BPE, 400)
    assert [spellings[token] for token in (*BPE.fim, BPE.eos_id)] == [""] * 5 and spellings[BPE.encode("x")[0]] == "x"


def without_fim() -> str:
    """A vocabulary without the control tokens, as earlier versions trained it."""
    content = json.loads(BPE.to_json())
    content["added_tokens"] = [t for t in content["added_tokens"] if "fim" not in t["content"]]
    return json.dumps(content)


def test_a_vocabulary_without_the_control_tokens_works_but_fills_in_nothing(corpus):
    old = from_json(without_fim(), TokenizerConfig())
    assert old.fim is None and old.decode(old.encode("x<fim_pad>")) == "x<fim_pad>"
    with pytest.raises(TokenizerError, match=r"<fim_prefix> <fim_middle> .* lacks them; complete without a suffix"):
        encode_infill(old, "a", "b")
    Path("old.json").write_text(without_fim(), encoding="utf-8")
    cfg = with_fim(tiny_config(corpus), 0.5)
    cfg = replace(cfg, tokenizer=TokenizerConfig(kind="pretrained", path="old.json"))
    with pytest.raises(TokenizerError, match=r"lacks them; set --data\.fim-rate 0"):
        prepare(cfg)


def test_settings_that_cannot_be_are_refused(corpus):
    cfg = tiny_config(corpus)
    with pytest.raises(ConfigError, match=r"model\.block_size must be at least 16 .* but is 8; set --data\.fim-rate 0"):
        replace(with_fim(cfg, 0.5), model=replace(cfg.model, block_size=8))
    with pytest.raises(ConfigError, match=r"data\.fim_rate must be 0 for instructions"):
        with_fim(preset("docstrings"), 0.5)
    for rate in (-0.1, 1.1):
        with pytest.raises(ConfigError, match=r"data\.fim_rate"):
            with_fim(cfg, rate)


# -- builds -----------------------------------------------------------------------------------------------------------


def with_fim(cfg, rate: float, **data):
    return replace(cfg, data=replace(cfg.data, fim_rate=rate, **data))


@pytest.fixture(scope="module")
def built(corpus, tmp_path_factory):
    """A config with fill-in-the-middle, and its data folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("built"))
        cfg = with_fim(tiny_config(corpus / "email"), 0.5, fim_line_share=0.5)
        return cfg, prepare(cfg).absolute()


def bytes_of(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_build_in_parts_with_two_workers_has_the_same_bytes(built):
    cfg, folder = built
    cfg = replace(cfg, data=replace(cfg.data, workers=2))
    with WorkerPool(cfg.data, cfg.tokenizer, cfg.model.block_size) as pool:
        plan = make_plan(cfg, list_files(cfg), folder.name, 3, pool)
        for number in plan.missing():
            run_part(plan, number, pool)
    assert bytes_of(gather(plan)) == bytes_of(folder)


def test_held_out_splits_and_shards_without_infilling_are_what_they_were(built, corpus):
    cfg, folder = built
    plain = prepare(with_fim(cfg, 0.0))
    assert plain.name != folder.name
    for split in ("val", "test"):
        assert (plain / f"{split}-00000.npy").read_bytes() == (folder / f"{split}-00000.npy").read_bytes()
        assert (plain / f"{split}-documents.npy").read_bytes() == (folder / f"{split}-documents.npy").read_bytes()
    assert sorted(read_manifest(plain)["splits"]) == ["test", "train", "val"] and not list(plain.glob("*pieces*"))
    # as before there were pieces: the documents one after the other, each with its end-of-text
    tokenizer = load_json(plain / "tokenizer.json", cfg.tokenizer)
    lines = [line for line in read_documents(plain) if line.get("split") == "train"]
    ids = [
        i for line in lines for i in document(tokenizer, (corpus / "email" / line["key"]).read_text(encoding="utf-8"))
    ]
    assert np.load(plain / "train-00000.npy").tolist() == ids


def test_the_context_is_part_of_the_fingerprint_only_with_infilling(built):
    def name(block_size: int, rate: float) -> str:
        cfg = with_fim(built[0], rate)
        return fingerprint(replace(cfg, model=replace(cfg.model, block_size=block_size)), [])

    assert len({name(32, 0.5), name(48, 0.5), name(32, 0.4), name(32, 0.0)}) == 4
    assert name(32, 0.0) == name(48, 0.0)


def test_the_ledger_counts_the_pieces(built):
    _, folder = built
    train = PieceDataset(folder, "train")
    table, ledger = np.load(folder / "train-pieces.npy"), Ledger.read(folder)
    assert [ledger.pieces(kind) for kind in KINDS] == np.bincount(table[:, 1]).tolist()
    assert "pieces: PSM" in ledger.table() and table[:, 0].sum() == len(train)
    assert sum(ledger.pieces(kind) for kind in KINDS) == len(table) > 1000


def test_every_piece_is_in_one_row_of_an_epoch_whole(built):
    cfg, folder = built
    dataset = open_split(cfg, folder, "train")
    rows, tokenizer = training_rows(cfg, dataset), load_json(folder / "tokenizer.json", cfg.tokenizer)
    assert isinstance(rows, PieceRows)
    fim, T = tokenizer.fim, cfg.model.block_size
    idx, targets, position_ids = rows.rows(0, rows.n_rows)
    assert position_ids is None and idx.shape == (rows.n_rows, T) and rows.wasted < 0.05
    assert not np.isin(targets, fim).any(), "control tokens are no targets"
    padding = idx == fim.pad
    assert padding.mean() == pytest.approx(rows.wasted) and (targets[padding] == IGNORE).all()
    begun, ended = (idx == fim.prefix).sum(), 0
    for row, row_targets in zip(idx.tolist(), targets.tolist()):
        inside = False
        for token, target in zip(row, row_targets):
            inside |= token == fim.prefix
            if inside and target == tokenizer.eos_id:
                inside, ended = False, ended + 1
        assert not inside, "a piece ends in the row in which it begins"
    assert begun == ended == np.bincount(np.load(folder / "train-pieces.npy")[:, 1])[1:].sum()
    supervised = int((targets != IGNORE).sum())
    assert supervised == dataset.n_targets
    # every token but control tokens and the first of text after a piece that was filled in is a target once
    flat = dataset.read(0, len(dataset))
    seen, all_tokens = (np.bincount(x, minlength=512) for x in (targets[targets != IGNORE], flat))
    lost = all_tokens - seen
    lost[list(fim)] = 0
    assert (lost >= 0).all() and lost[tokenizer.eos_id] == 0 and lost.sum() < 0.01 * len(flat)


def test_rows_follow_from_seed_and_position_and_can_be_kept_apart(built):
    _, folder = built
    dataset = PieceDataset(folder, "train")
    rows = PieceRows(dataset, 32, seed=3, document_mask=True)
    together = rows.rows(rows.n_rows - 2, 4)  # across two epochs
    alone = [PieceRows(dataset, 32, seed=3, document_mask=True).rows(rows.n_rows - 2 + i, 1) for i in range(4)]
    for name in ("idx", "targets", "position_ids"):
        assert np.array_equal(getattr(together, name), np.concatenate([getattr(batch, name) for batch in alone]))
    number = next(n for n in range(rows.n_rows) if len(rows.bins[rows.row_at(n)]) > 1)
    starts = np.flatnonzero(rows.rows(number, 1).position_ids[0] == 0)
    spans = [len(span) - 1 for span in rows.tokens_of(number)]
    assert starts[: len(spans)].tolist() == [sum(spans[:i]) for i in range(len(spans))]


def test_text_is_predicted_from_the_token_before_it_but_not_from_the_end_of_a_piece_of_its_own(built):
    _, folder = built
    dataset = PieceDataset(folder, "train")
    table, eos = np.load(folder / "train-pieces.npy"), dataset.manifest["eos_id"]
    documents = np.cumsum(dataset.lengths) - dataset.lengths
    begins = np.cumsum(table[:, 0]) - table[:, 0]
    found = set()
    for number in range(1, len(table)):
        first = dataset.tokens_of(number).start
        of_document = begins[number] in documents
        case = ("text" if table[number, 1] == LEFT_TO_RIGHT else "fim", of_document, bool(table[number - 1, 1]))
        found.add(case)
        with_token_before = case[0] == "text" and (of_document or not case[2])
        assert first == begins[number] - with_token_before
        if with_token_before:
            assert (dataset.read(first, 1)[0] == eos) == of_document
    assert len(found) == 8, "all cases occur"


def test_the_infilling_split_holds_the_held_out_documents_all_filled_in(built):
    cfg, folder = built
    val, infilling = TokenDataset(folder, "val"), open_split(cfg, folder, "val-infilling")
    assert (infilling.info.documents, infilling.info.bytes) == (val.info.documents, val.info.bytes)
    assert infilling.infills.all()
    kinds = np.load(folder / "val-infilling-pieces.npy")[:, 1]
    assert set(kinds.tolist()) == {PSM, SPM}, "whatever the training has, so that runs can be compared"
    model = ModelConfig(block_size=32, vocab_size=512)
    targets = np.concatenate([batch.targets[batch.targets != IGNORE] for batch in infilling.in_order(model, 4)])
    documents, counts = infilling.targets_in_order(model)
    assert counts.sum() == len(targets) == infilling.n_targets
    assert np.unique(documents).tolist() == list(range(val.info.documents))
    assert len(list(infilling.in_order(model, 4, part=6))) == 2


def test_a_run_keeps_the_infilling_splits_and_opens_them(built, tmp_path):
    cfg, folder = built
    run = RunDirectory(tmp_path / "run")
    run.create(cfg, folder)
    assert run.heldout("val-infilling").n_targets == PieceDataset(folder, "val-infilling").n_targets
    with pytest.raises(DataError, match=r"the val split .* must be in pieces"):
        PieceDataset(folder, "val")

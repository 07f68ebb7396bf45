"""skipped_steps.py: what was in a skipped step, and how to get from a row to its documents."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_examples import PAIRS, TOKENIZER, conversations

from kindling import files
from kindling.data.conversations import Example, encode_conversation
from kindling.data.examples import ExampleRows, Examples, ExampleWriter
from kindling.data.ledger import DOCUMENTS, DocumentLog, documents_within, locate, read_documents
from kindling.data.shards import SPLITS, DataError, PackedBlocks, ShardWriter, TokenDataset, write_manifest
from kindling.training.skipped_steps import SKIPPED, SkippedStepRecorder

BLOCK = 16
LENGTHS = [5, 1, 40, 16, 17, 2, 2, 2, 60, 9, 31]  # of the documents; the third and others are longer than a row
FACTS = {
    "fingerprint": "x",
    "dtype": "<u2",
    "tokenizer_sha256": "f" * 64,
    "vocab_size": 512,
    "eos_id": TOKENIZER.eos_id,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A data folder with documents of LENGTHS and their log. Token i of the train split is i."""
    folder = tmp_path_factory.mktemp("documents")
    log, writers = DocumentLog(folder), {split: ShardWriter(folder, split, np.dtype("<u2")) for split in SPLITS}
    for number, length in enumerate(LENGTHS):
        for split, writer in writers.items():
            about = {"key": f"{split}/{number}.py", "source": f"source {number % 2}", "language": "python"}
            log.write(key="dropped.py", source="source 0", language="python", dropped="syntax", value="line 1")
            log.write(**about, bytes=3 * length, split=split, start=writer.position, tokens=length)
            writer.add(np.arange(writer.position, writer.position + length), 3 * length)
    for writer in writers.values():
        writer.close()
    log.close()
    write_manifest(folder, **FACTS, splits={split: writer.info for split, writer in writers.items()})
    return folder


@pytest.fixture(scope="module")
def blocks(folder) -> PackedBlocks:
    return PackedBlocks(TokenDataset(folder, "train"), BLOCK, seed=3)


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Examples:
    """A data folder with conversations and their log."""
    folder = tmp_path_factory.mktemp("examples")
    log, writers = DocumentLog(folder), {split: ExampleWriter(folder, split, np.dtype("<u2")) for split in SPLITS}
    for number, exchanges in enumerate(conversations()):
        example = encode_conversation(exchanges, PAIRS, TOKENIZER, 128)
        assert isinstance(example, Example)
        for split, writer in writers.items():
            about = {"key": f"pairs.jsonl:{number}", "source": "pairs", "language": "python", "bytes": example.n_bytes}
            log.write(**about, split=split, start=writer.position, tokens=len(example.ids))
            writer.add_example(example)
    for writer in writers.values():
        writer.close()
    log.close()
    write_manifest(folder, **FACTS, splits={split: writer.info for split, writer in writers.items()})
    return Examples(folder, "train")


def recorded(path: Path, batches, first_row: int = 0, n_rows: int = 4, **numbers: float) -> dict:
    """Record a step, and return the newest line of the file. It must be standard JSON, without NaN."""
    numbers = {"loss": 1.5, "grad_norm": math.inf, "limit": 9.0} | numbers
    SkippedStepRecorder(path, batches).record(step=7, first_row=first_row, n_rows=n_rows, **numbers)
    text = (path / SKIPPED).read_text(encoding="utf-8")
    assert text.endswith("\n")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text.splitlines()[-1], parse_constant=refuse)


def spans(line: dict) -> list[tuple[int, range]]:
    """Return for each document of a line its row, and its range of tokens of the split."""
    starts = [int(d["at"].removeprefix("train:")) for d in line["documents"]]
    return [(d["row"], range(start, start + d["tokens"])) for d, start in zip(line["documents"], starts)]


# -- from a row to its tokens -----------------------------------------------------------------------------------------


def test_a_packed_row_is_the_tokens_that_it_says(blocks):
    for position in range(3 * blocks.n_rows):  # of three epochs
        (tokens,) = blocks.tokens_of(position)
        batch = blocks.rows(position, 1)
        assert list(tokens) == [*batch.idx[0].tolist(), int(batch.targets[0, -1])]  # token i of the split is i


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_a_row_of_examples_is_the_tokens_that_it_says(examples, packing):
    rows = ExampleRows(examples, 128, seed=0, packing=packing, batch_size=4)
    for position in range(2 * rows.n_rows):
        idx = rows.rows(position, 1).idx[0]
        expected = np.concatenate([examples.read(t.start, len(t) - 1) for t in rows.tokens_of(position)])
        assert idx[: len(expected)].tolist() == expected.tolist() and (idx[len(expected) :] == rows.pad_id).all()


@pytest.mark.parametrize("kind", ["blocks", "examples"])
def test_another_thread_that_asks_about_another_epoch_changes_no_row(kind, blocks, examples):
    """The rows of the next step are read on a thread, while the recorder may ask about the epoch before."""
    batches = blocks if kind == "blocks" else ExampleRows(examples, 128, seed=0)
    expected = [batches.tokens_of(position) for position in range(batches.n_rows)]

    class Interrupted(type(batches)):
        """Rows whose order is set to the second epoch after each access, as another thread could do."""

        second = 1, np.zeros(batches.n_rows, dtype=np.int64)

        @property
        def _order(self):
            now, self.__dict__["order"] = self.__dict__.get("order", self.second), self.second
            return now

        @_order.setter
        def _order(self, order):
            self.__dict__["order"] = order

    source = batches.dataset
    other = Interrupted(source, BLOCK, seed=3) if kind == "blocks" else Interrupted(source, 128, seed=0)
    assert [other.tokens_of(position) for position in range(batches.n_rows)] == expected
    other._order = 0, np.random.default_rng([other.seed, 0]).permutation(other.n_rows)
    assert other.tokens_of(0) == expected[0]  # if the order was right at the first access


# -- from tokens to documents -----------------------------------------------------------------------------------------


RANGES = st.lists(st.tuples(st.integers(0, sum(LENGTHS) - 1), st.integers(1, 60)), max_size=8)


@given(RANGES)
def test_the_documents_of_a_range_are_those_that_each_of_its_tokens_is_located_in(folder, ranges):
    tokens = [range(start, min(start + length, sum(LENGTHS))) for start, length in ranges]
    for span, found in zip(tokens, documents_within(folder, "train", tokens), strict=True):
        located = [locate(folder, "train", position)["key"] for position in span[:: max(1, len(span) - 1)]]
        keys = [line["key"] for line in found]
        assert keys[0] == located[0] and keys[-1] == located[-1] and len(set(keys)) == len(keys)
        assert sum(line["tokens"] for line in found[1:-1]) < len(span)  # and without a gap:
        assert all(a["start"] + a["tokens"] == b["start"] for a, b in itertools.pairwise(found))


# -- the line ---------------------------------------------------------------------------------------------------------


def test_a_line_names_every_document_of_every_row_and_no_token_twice(blocks, tmp_path):
    line = recorded(tmp_path, blocks, first_row=2, n_rows=5, grad_norm=250.0)
    assert {k: line[k] for k in ("step", "first_row", "n_rows", "loss", "grad_norm", "limit")} == {
        "step": 7,
        "first_row": 2,
        "n_rows": 5,
        "loss": 1.5,
        "grad_norm": 250.0,
        "limit": 9.0,
    }
    assert "note" not in line
    for row in range(2, 7):
        tokens = [t for r, span in spans(line) if r == row for t in span]
        assert tokens == list(blocks.tokens_of(row)[0])
    for document, (_, span) in zip(line["documents"], spans(line)):
        for position in (span[0], span[-1]):
            found = locate(blocks.dataset.folder, "train", position)
            assert {k: document[k] for k in ("key", "source", "language")}.items() <= found.items()


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_a_line_of_fine_tuning_names_the_examples(examples, packing, tmp_path):
    rows = ExampleRows(examples, 128, seed=0, packing=packing, batch_size=4)
    line = recorded(tmp_path, rows, first_row=1, n_rows=2)
    expected = [(row, number) for row in (1, 2) for number in rows.bins[rows.row_at(row)]]
    assert [(d["row"], d["key"]) for d in line["documents"]] == [(row, f"pairs.jsonl:{n}") for row, n in expected]
    assert [d["tokens"] for d in line["documents"]] == [examples.lengths[n] for _, n in expected]


def test_numbers_that_json_has_no_form_for_are_strings_that_python_reads(blocks, tmp_path):
    line = recorded(tmp_path, blocks, loss=math.nan, grad_norm=math.inf, limit=-math.inf)
    assert (line["loss"], line["grad_norm"], line["limit"]) == ("nan", "inf", "-inf")
    assert math.isnan(float(line["loss"])) and float(line["limit"]) == -math.inf


def test_lines_are_appended_also_after_a_resume(blocks, tmp_path):
    for first_row in (0, 4, 4):
        recorded(tmp_path, blocks, first_row=first_row)
    lines = [json.loads(x) for x in (tmp_path / SKIPPED).read_text(encoding="utf-8").splitlines()]
    assert [line["first_row"] for line in lines] == [0, 4, 4] and lines[1] == lines[2] != lines[0]


def test_nothing_is_written_before_a_step_is_skipped(blocks, tmp_path):
    SkippedStepRecorder(tmp_path, blocks)
    assert not (tmp_path / SKIPPED).exists()


# -- what fails -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "another's"])
def test_a_log_that_cannot_be_read_leaves_the_positions_and_a_note(folder, damage, tmp_path):
    copy = tmp_path / "data"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    content = bytearray((copy / DOCUMENTS).read_bytes())
    (copy / DOCUMENTS).unlink()
    if damage == "cut":
        (copy / DOCUMENTS).write_bytes(content[: len(content) // 3])
    elif damage == "flipped":
        content[len(content) // 3] ^= 255
        (copy / DOCUMENTS).write_bytes(content)
    elif damage == "another's":
        log = DocumentLog(copy)
        log.write(key="short.py", source="s", language="python", split="train", start=0, tokens=1)
        log.close()
    blocks = PackedBlocks(TokenDataset(copy, "train"), BLOCK, seed=3)
    line = recorded(tmp_path, blocks, n_rows=blocks.n_rows)
    assert ("has none at some" if damage == "another's" else DOCUMENTS) in line["note"]
    assert sum("key" in d for d in line["documents"]) == (damage == "another's")
    expected = [blocks.tokens_of(row)[0] for row in range(blocks.n_rows)]
    if damage == "another's":  # whose only document is the first token
        expected = [tokens if tokens.start else range(1) for tokens in expected]
    assert [span for _, span in spans(line)] == expected


def test_rows_that_know_nothing_of_documents_are_recorded_without_them(tmp_path):
    line = recorded(tmp_path, object(), first_row=8)
    assert line["documents"] == [] and "tokens_of" in line["note"] and line["first_row"] == 8


def test_a_full_disk_is_a_warning_and_leaves_no_half_line(blocks, tmp_path, monkeypatch, capsys):
    recorded(tmp_path, blocks)
    before = (tmp_path / SKIPPED).read_bytes()

    class Full:
        """A file with room for ten more bytes."""

        def __init__(self, *args, **kwargs):
            self.file = open(*args, **kwargs)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, content):
            return self.file.write(content[:10])

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(files, "open", Full, raising=False)
    SkippedStepRecorder(tmp_path, blocks).record(step=9, first_row=0, n_rows=2, loss=1.0, grad_norm=1.0, limit=0.5)
    assert (tmp_path / SKIPPED).read_bytes() == before
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("warning: the skipped step 9 cannot be recorded") and "No space left" in said


def test_a_flip_of_any_byte_of_the_log_is_an_error_of_one_line_or_changes_nothing(folder, tmp_path):
    content, lines = (folder / DOCUMENTS).read_bytes(), list(read_documents(folder))
    refused = 0
    for at in range(len(content)):
        (tmp_path / DOCUMENTS).write_bytes(content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :])
        try:
            assert list(read_documents(tmp_path)) == lines  # for example after a flip in the time in the header
        except DataError:  # zlib's own error, which is no OSError, becomes a DataError too
            refused += 1
    assert refused >= len(content) - 10  # a gzip header has ten bytes

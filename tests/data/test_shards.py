import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import IGNORE, ModelConfig
from kindling.data import shards
from kindling.data.shards import (
    DataError,
    PackedBlocks,
    ShardWriter,
    SplitInfo,
    TokenDataset,
    blocks_in_order,
    rank_rows,
    with_checksum,
    write_manifest,
)
from kindling.files import write_json

TOKENIZER = "f" * 64


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A data folder of 1,003 distinct tokens in several shards, in 17 documents."""
    monkeypatch.setattr(shards, "SHARD_TOKENS", 300)
    writers = {}
    for split in shards.SPLITS:
        writer = writers[split] = ShardWriter(tmp_path, split, np.dtype("<u2"))
        for n, piece in enumerate(np.array_split(np.arange(1003, dtype=np.uint32), 17)):
            language = "python" if n % 3 else "java"
            writer.add(piece, 3 * len(piece), language, source="ab"[n % 2])
        writer.close()
    write_manifest(
        tmp_path,
        fingerprint="x",
        dtype="<u2",
        tokenizer_sha256=TOKENIZER,
        vocab_size=1003,
        eos_id=0,
        splits={k: w.info for k, w in writers.items()},
    )
    return tmp_path


def test_shards_read_as_one_sequence(folder):
    dataset = TokenDataset(folder, "train")
    assert len(dataset.info.shards) > 2 and len(dataset) == 1003
    assert (dataset.info.documents, dataset.info.bytes, dataset.info.max_id) == (17, 3009, 1002)
    for start, count in ((0, 1003), (295, 10), (299, 2), (590, 413), (1002, 1)):
        assert dataset.read(start, count).tolist() == list(range(start, start + count))


def test_the_table_says_of_each_document_how_long_it_is_and_what_it_is(folder):
    dataset = TokenDataset(folder, "val")
    lengths = [len(piece) for piece in np.array_split(np.arange(1003), 17)]
    rows = [[length, 3 * length, n % 3 > 0, n % 2] for n, length in enumerate(lengths)]
    assert dataset.documents.tolist() == rows and dataset.lengths.tolist() == lengths
    assert (dataset.info.table["languages"], dataset.info.table["sources"]) == (["java", "python"], ["a", "b"])
    assert dataset.info.files[-1] == "val-documents.npy"


def without_tables(folder: Path) -> None:
    """Make a folder one that was built before there was a table of documents."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for split, info in manifest["splits"].items():
        del info["table"]
        (folder / f"{split}-documents.npy").unlink()
    write_json(folder / "manifest.json", with_checksum(manifest))


def test_a_folder_without_the_table_opens_and_its_documents_end_with_their_end_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 40)
    writers = {split: ShardWriter(tmp_path, split, np.dtype("<u2")) for split in shards.SPLITS}
    for writer in writers.values():
        for length in (1, 30, 80, 2):
            writer.add(np.array([7] * (length - 1) + [3]), n_bytes=length)
        writer.close()
    splits = {k: w.info for k, w in writers.items()}
    write_manifest(
        tmp_path, fingerprint="x", dtype="<u2", tokenizer_sha256=TOKENIZER, vocab_size=9, eos_id=3, splits=splits
    )
    with_table = TokenDataset(tmp_path, "val")
    without_tables(tmp_path)
    dataset = TokenDataset(tmp_path, "val")
    assert dataset.documents is None and not [f for f in dataset.info.files if "documents" in f]
    assert dataset.lengths.tolist() == with_table.lengths.tolist() == [1, 30, 80, 2]


@pytest.mark.parametrize("damage", ["flip", "missing", "truncate"])
def test_a_damaged_table_of_documents_is_refused_in_one_line(folder, damage):
    path = folder / "val-documents.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= damage == "flip"
    path.write_bytes(content[:-8] if damage == "truncate" else content)
    if damage == "missing":
        path.unlink()
    with pytest.raises(DataError, match=r"val-documents.npy must .*delete .* and run again") as error:
        TokenDataset(folder, "val")
    assert "\n" not in str(error.value)


def test_a_split_without_documents_has_an_empty_table(tmp_path):
    writer = ShardWriter(tmp_path, "val", np.dtype("<u2"))
    writer.close()
    assert np.load(tmp_path / SplitInfo(table=writer.info.table).files[0]).shape == (0, 4)


def test_an_epoch_has_every_block_once_and_the_next_another_order(folder):
    blocks = PackedBlocks(TokenDataset(folder, "train"), block_size=10, seed=1)
    assert blocks.n_rows == 100
    epochs = [blocks.rows(100 * e, 100) for e in (0, 1)]
    for idx, targets, positions in epochs:
        assert positions is None
        assert sorted(idx.flatten()) == list(range(1000))  # each token once
        assert (targets == idx + 1).all()
    assert not np.array_equal(epochs[0][0], epochs[1][0])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 250), st.integers(1, 12), st.integers(0, 2**40))
def test_a_row_depends_on_seed_and_position_alone(position, count, seed):
    class Numbers:
        split = "train"

        def __len__(self):
            return 1003

        def read(self, start, n):
            return np.arange(start, start + n)

    together = PackedBlocks(Numbers(), 10, seed).rows(position, count)[0]
    alone = [PackedBlocks(Numbers(), 10, seed).rows(position + i, 1)[0][0] for i in range(count)]
    assert (together == np.stack(alone)).all()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_ranks_share_a_batch_without_overlap(world_size):
    ranks = [rank_rows(40, 8, rank, world_size) for rank in range(world_size)]
    assert [i for rows in ranks for i in rows] == list(range(40, 48))


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_evaluation_predicts_every_token_but_the_first_exactly_once(folder, batch_size):
    seen = []
    for idx, targets, _ in blocks_in_order(TokenDataset(folder, "val"), 10, batch_size):
        assert idx.shape == targets.shape == (batch_size, 10)
        supervised = targets != IGNORE
        assert (targets[supervised] == idx[supervised] + 1).all()
        seen += targets[supervised].tolist()
    assert seen == list(range(1, 1003))


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(2, 12), st.integers(1, 5), st.data())
def test_rows_that_overlap_have_every_target_once_with_its_context_before_it(n, block_size, batch_size, data):
    class Numbers:
        def __len__(self):
            return n

        def read(self, start, count):
            return np.arange(start, start + count)

    stride, seen = data.draw(st.integers(1, block_size)), []
    for batch in blocks_in_order(Numbers(), block_size, batch_size, stride=stride):
        assert batch.idx.shape == (batch_size, block_size)
        for idx, targets in zip(batch.idx, batch.targets):
            for place in np.flatnonzero(targets != IGNORE):
                target = int(targets[place])
                context = idx[: place + 1].tolist()
                assert context == list(range(target - len(context), target))  # the tokens just before it
                assert len(context) >= min(target, block_size - stride + 1)
                seen.append(target)
    assert seen == list(range(1, n))


def test_the_documents_of_the_targets_are_told_in_the_order_of_the_rows(folder):
    dataset, cfg = TokenDataset(folder, "val"), ModelConfig(block_size=10, vocab_size=1003)
    targets = np.concatenate([batch.targets[batch.targets != IGNORE] for batch in dataset.in_order(cfg, 4)])
    numbers = np.repeat(*dataset.targets_in_order(cfg))
    pieces = np.array_split(np.arange(1003), 17)
    assert len(numbers) == len(targets) == 1002
    assert all(target in pieces[n] for n, target in zip(numbers, targets))


def test_a_corpus_smaller_than_a_block_is_refused(folder):
    with pytest.raises(DataError, match=r"at least one block of 2001 tokens, but holds 1003.*--model.block-size"):
        PackedBlocks(TokenDataset(folder, "train"), 2000, 0)


@pytest.mark.parametrize("damage", ["truncate", "flip", "flip-header", "empty", "missing", "longer", "other-dtype"])
def test_a_damaged_shard_is_found_when_it_is_opened(folder, damage):
    path = folder / "train-00001.npy"
    raw = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(raw[:-101])
    elif damage == "flip":
        raw[-5] ^= 4
        path.write_bytes(raw)
    elif damage == "flip-header":
        raw[20] ^= 1
        path.write_bytes(raw)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "missing":
        path.unlink()
    elif damage == "longer":
        np.save(path, np.zeros(999, dtype="<u2"))
    else:
        np.save(path, np.load(path).astype("<u4"))
    with pytest.raises(DataError, match=r"train-00001.npy must .*delete .* and run again") as error:
        TokenDataset(folder, "train")
    assert "\n" not in str(error.value)
    TokenDataset(folder, "val")  # the others are whole


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])  # a third of the bits, in every byte
def test_no_flip_in_a_shards_header_ends_in_a_traceback(folder, step):
    path = folder / "train-00001.npy"
    raw = path.read_bytes()
    for bit in range(0, 128 * 8, step):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="damaged"):
            TokenDataset(folder, "train")


def test_an_id_that_the_shards_type_cannot_hold_is_refused_and_never_wraps(tmp_path):
    writer = ShardWriter(tmp_path, "train", np.dtype("<u2"))
    with pytest.raises(DataError, match="70000"):
        writer.add(np.array([70_000], dtype=np.uint32), 1)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 99}', '{"format": 1}', '{"format": 1, "splits": {"train": 3}}']
)
def test_a_bad_manifest_is_refused(folder, content):
    (folder / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"manifest\.json"):
        TokenDataset(folder, "train")


def test_shards_of_another_tokenizer_or_past_the_vocabulary_are_refused(folder):
    dataset = TokenDataset(folder, "train")
    dataset.require_fits(1003, TOKENIZER)
    with pytest.raises(DataError, match="run's tokenizer"):
        dataset.require_fits(1003, "0" * 64)
    with pytest.raises(DataError, match=r"vocab_size=1002, but .* holds 1002.*--model.vocab-size"):
        dataset.require_fits(1002, TOKENIZER)


def test_the_manifest_is_plain_json(folder):
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert sum(s["tokens"] for s in manifest["splits"]["train"]["shards"]) == 1003


def test_a_number_that_changed_in_the_manifest_is_refused(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"tokens": 1003', '"tokens": 1002'), encoding="utf-8")
    with pytest.raises(DataError, match="must be as it was written, but has changed; delete"):
        TokenDataset(folder, "train")

import gzip
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import TokenizerConfig
from kindling.data import shards
from kindling.data.conversations import Example
from kindling.data.decontamination import benchmark_path
from kindling.data.examples import Examples, ExampleWriter
from kindling.data.shards import DataError, ShardWriter, TokenDataset, write_manifest
from kindling.evaluation import memorization, verbatim
from kindling.evaluation.memorization import LONG, benchmark_hits, longest_overlaps, pieces, summary, training_split
from kindling.evaluation.verbatim import WINDOW, Overlap, longest_matches
from kindling.tokenization.tokenizer import Tokenizer
from kindling.tokenization.train_tokenizer import train_bpe

EOS = 0


def write_split(
    folder: Path, documents: list[np.ndarray], shard_tokens: int = 2**23, end: tuple[int, ...] = (EOS,)
) -> TokenDataset:
    """Write the documents, each with `end` after it, as the training split of a data folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_TOKENS", shard_tokens)
        writer = ShardWriter(folder, "train", np.dtype("<u2"))
        for document in documents:
            writer.add(np.append(document, end).astype(np.int64), len(document))
        writer.close()
    content = {"fingerprint": folder.name, "tokenizer_sha256": "", "vocab_size": 2**16, "eos_id": EOS}
    write_manifest(folder, dtype="<u2", splits={"train": writer.info}, **content)
    return TokenDataset(folder, "train")


def longest_by_search(sample: list[int], data: str) -> int:
    """Return the length of the longest run of `sample` in `data`, one character for each token."""
    text, best = "".join(map(chr, sample)), 0
    for start in range(len(text)):
        while chr(EOS) not in (run := text[start : start + best + 1]) and len(run) > best and run in data:
            best += 1
    return best if best >= WINDOW else 0


def assert_verbatim(overlap: Overlap, sample: np.ndarray, dataset: TokenDataset) -> None:
    """Assert that what an overlap says is in the data."""
    if overlap.length == 0:
        assert overlap == (0, None, 0)
    else:
        copied = sample[overlap.start : overlap.start + overlap.length]
        assert len(copied) == overlap.length
        assert dataset.read(overlap.position, overlap.length).tolist() == copied.tolist()


@st.composite
def copies(draw) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Draw documents of few different tokens, and samples put together from pieces of the data, its ends included."""
    tokens = st.integers(1, draw(st.integers(1, 6)))
    documents = [np.array(d) for d in draw(st.lists(st.lists(tokens, min_size=1, max_size=60), min_size=1, max_size=8))]
    data = np.concatenate([np.append(d, EOS) for d in documents])

    def piece() -> np.ndarray:
        start = draw(st.integers(0, len(data) - 1))
        return data[start : start + draw(st.integers(0, 40))]

    samples = [
        np.concatenate([piece() for _ in range(draw(st.integers(1, 3)))]).astype(np.int64)
        for _ in range(draw(st.integers(1, 6)))
    ]
    return documents, samples


def no_hash(tokens: np.ndarray) -> np.ndarray:
    return np.zeros((*tokens.shape[:-1], tokens.shape[-1] - WINDOW + 1), dtype=np.uint32)


def two_hashes(tokens: np.ndarray) -> np.ndarray:
    return (tokens[..., : tokens.shape[-1] - WINDOW + 1] % 2).astype(np.uint32) << np.uint32(31)


@pytest.mark.parametrize("terrible", [None, no_hash, two_hashes])
@settings(deadline=None, max_examples=100)
@given(drawn=copies(), sizes=st.tuples(*[st.integers(1, 45)] * 3), end=st.sampled_from([(EOS,), ()]))
def test_the_lengths_are_those_of_plain_search_whatever_the_hash_and_the_borders(
    tmp_path_factory, terrible, drawn, sizes, end
):
    (documents, samples), (chunk, batch, pool) = drawn, sizes
    dataset = write_split(tmp_path_factory.mktemp("data"), documents, shard_tokens=chunk + 3, end=end)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memorization, "CHUNK", chunk)
        patch.setattr(memorization, "BATCH", batch)
        patch.setattr(verbatim, "POOL", pool)
        patch.setattr(verbatim, "SEEN_BYTES", 200)
        if terrible is not None:
            patch.setattr(verbatim, "hashes_of", terrible)
        overlaps = longest_overlaps(samples, dataset)
    data = "".join(map(chr, dataset.read(0, len(dataset))))
    assert [overlap.length for overlap in overlaps] == [longest_by_search(s.tolist(), data) for s in samples]
    for overlap, sample in zip(overlaps, samples):
        assert_verbatim(overlap, sample, dataset)


repeated = st.builds(lambda some, n: (some * n)[:45], st.lists(st.integers(0, 1), max_size=3), st.integers(0, 45))
numbers = st.builds(lambda a, b: (a + b)[:60], repeated, st.lists(st.integers(0, 2), max_size=40))


@settings(deadline=None)
@given(numbers, numbers)
def test_the_longest_match_of_each_place_is_that_of_comparing_all_pairs(own, pool):
    own, pool = np.array([*own, 3]), np.array([*pool, 4])
    lengths, matches = longest_matches(own, pool, reach=61)
    for i in range(len(own)):
        both = [[own[i : i + n].tolist() == pool[j : j + n].tolist() for n in range(1, 62)] for j in range(len(pool))]
        assert lengths[i] == max(row.index(False) for row in both)
        assert both[matches[i]].index(False) == lengths[i]


@pytest.fixture
def planted(tmp_path) -> tuple[TokenDataset, np.ndarray]:
    """A split of random tokens in shards of about a thousand, and the sequence of them."""
    rng = np.random.default_rng(0)
    dataset = write_split(tmp_path / "data", [rng.integers(1, 50_000, 100) for _ in range(40)], shard_tokens=1000)
    assert len(dataset.info.shards) > 2
    return dataset, dataset.read(0, len(dataset))


@pytest.mark.parametrize("start", [0, 480, 990, 1100, 2967])  # the beginning, across chunks and shards, the end
def test_a_copy_of_60_tokens_is_found_with_its_place(tmp_path, monkeypatch, start):
    rng = np.random.default_rng(1)
    dataset = write_split(tmp_path, [rng.integers(1, 50_000, 1009) for _ in range(3)], shard_tokens=1000, end=())
    assert [shard["tokens"] for shard in dataset.info.shards] == [1009] * 3
    monkeypatch.setattr(memorization, "CHUNK", 500)
    copy = dataset.read(start, 60)
    sample = np.concatenate((rng.integers(50_000, 60_000, 33), copy, rng.integers(50_000, 60_000, 9)))
    assert longest_overlaps([sample], dataset) == [Overlap(60, start, 33)]


def test_a_copy_ends_at_the_end_of_a_document(planted):
    dataset, data = planted
    assert data[100] == EOS
    assert longest_overlaps([data[70:120]], dataset) == [Overlap(30, 70, 0)]


def test_fewer_than_eight_tokens_and_samples_that_are_too_short_have_no_overlap(planted):
    dataset, data = planted
    strange = np.arange(50_000, 50_020)
    samples = [np.concatenate((strange, data[:7])), data[:7], data[:0], np.concatenate((strange, data[:8]))]
    assert longest_overlaps(samples, dataset) == [Overlap(0, None, 0)] * 3 + [Overlap(8, 0, 20)]
    assert longest_overlaps([], dataset) == []
    assert longest_overlaps(samples[1:3], dataset) == [Overlap(0, None, 0)] * 2


def test_a_split_of_fewer_than_eight_tokens_has_no_overlap(tmp_path):
    assert longest_overlaps([np.arange(1, 30)], write_split(tmp_path, [np.arange(1, 6)])) == [Overlap(0, None, 0)]


def test_progress_adds_up_to_the_split(planted, monkeypatch):
    monkeypatch.setattr(memorization, "CHUNK", 301)
    dataset, data = planted
    for samples in ([data[:50]], []):
        told: list[int] = []
        longest_overlaps(samples, dataset, told.append)
        assert sum(told) == len(dataset) and len(told) > 5


@pytest.fixture
def sorted_windows(monkeypatch) -> list[int]:
    """How many windows of the data each sorting looked at: what takes long, as it is counted in microseconds."""
    sizes: list[int] = []

    def counted(own, pool, reach):
        sizes.append(len(pool))
        return longest_matches(own, pool, reach)

    monkeypatch.setattr(verbatim, "longest_matches", counted)
    return sizes


def test_a_header_that_comes_a_thousand_times_is_looked_at_once(tmp_path, sorted_windows, monkeypatch):
    monkeypatch.setattr(memorization, "BATCH", 1000)
    rng = np.random.default_rng(0)
    header = rng.integers(1, 50_000, 160)
    files = [np.concatenate((rng.integers(1, 50_000, 20), header, rng.integers(1, 50_000, 50))) for _ in range(1000)]
    samples = [np.concatenate((header[i : i + 100], rng.integers(50_000, 60_000, 50))) for i in range(0, 60, 3)]
    overlaps = longest_overlaps(samples, write_split(tmp_path, files))
    assert {overlap.length for overlap in overlaps} == {100}
    assert sum(sorted_windows) < 3 * len(header)


def test_samples_that_the_data_holds_a_thousand_times_are_looked_at_once(tmp_path, sorted_windows, monkeypatch):
    monkeypatch.setattr(memorization, "BATCH", 5000)
    rng = np.random.default_rng(0)
    samples = [rng.integers(1, 50_000, 60) for _ in range(10)] * 3
    files = [np.append(rng.integers(1, 50_000, 1), sample) for _ in range(1000) for sample in samples[:10]]
    overlaps = longest_overlaps(samples, write_split(tmp_path, files))
    assert {overlap.length for overlap in overlaps} == {60}
    assert sum(sorted_windows) < 2 * 10 * 61


def test_what_can_better_no_sample_is_not_looked_at(tmp_path, sorted_windows, monkeypatch):
    monkeypatch.setattr(memorization, "CHUNK", 151)
    monkeypatch.setattr(memorization, "BATCH", 100)
    rng = np.random.default_rng(0)
    header = rng.integers(1, 50_000, 150)
    samples = [header[50:80], np.append(header, 60_000)]  # the first cannot be longer, the second is longer already
    shorter = [np.append(header[:n], rng.integers(50_000, 60_000, 5)) for n in range(81, 150)]
    overlaps = longest_overlaps(samples, write_split(tmp_path, [header, *shorter]))
    assert [overlap.length for overlap in overlaps] == [30, 150]
    assert sum(sorted_windows) <= len(header)


def test_a_table_that_goes_on_for_long_is_looked_at_piece_by_piece(tmp_path, sorted_windows, monkeypatch):
    monkeypatch.setattr(memorization, "CHUNK", 1000)
    monkeypatch.setattr(memorization, "BATCH", 1000)
    table = np.tile([7, 8, 9], 20_000)
    samples = [np.concatenate(([5], np.tile([9, 7, 8], n), [6] * 10)) for n in (20, 40, 60)]
    overlaps = longest_overlaps(samples, write_split(tmp_path, [table]))
    assert [overlap.length for overlap in overlaps] == [60, 120, 180]
    assert max(sorted_windows) < 3000 and sum(sorted_windows) < 10_000


def test_the_summary_counts_what_is_longer_than_fifty():
    lengths = [0, 8, 50, 51, 200, 0]
    overlaps = [Overlap(n, 5 if n else None, 0) for n in lengths]
    assert asdict(summary(overlaps)) == {
        "samples": 6,
        "longest": 200,
        "median": 29.0,
        "long": 2,
        "long_share": 2 / 6,
        "below_window": 2,
    }
    assert LONG == 50
    json.dumps(asdict(summary(overlaps)))
    with pytest.raises(ValueError, match="at least one sample"):
        summary([])


# -- the training split -----------------------------------------------------------------------------------------------


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def test_the_training_split_of_a_run_is_opened_if_it_is_there(planted, tmp_path):
    dataset, data = planted
    manifest = manifest_of(dataset.folder)
    opened = training_split(manifest, tmp_path)
    assert opened is not None and opened.read(0, len(opened)).tolist() == data.tolist()
    assert training_split(manifest | {"fingerprint": "gone"}, tmp_path) is None


def test_the_conversations_of_a_run_are_opened_as_such(tmp_path):
    writer = ExampleWriter(tmp_path / "chat", "train", np.dtype("<u2"))
    writer.folder.mkdir()
    writer.add_example(Example(np.array([*range(1, 30), EOS]), np.array([[20, 10, 1, 2]]), 5))
    writer.close()
    content = {"fingerprint": "chat", "tokenizer_sha256": "", "vocab_size": 99, "eos_id": EOS, "dtype": "<u2"}
    write_manifest(writer.folder, splits={"train": writer.info}, **content)
    dataset = training_split(manifest_of(writer.folder), tmp_path)
    assert isinstance(dataset, Examples)
    assert longest_overlaps([np.arange(5, 25)], dataset) == [Overlap(20, 4, 0)]


def test_a_training_split_that_is_damaged_or_another_is_refused(planted, tmp_path):
    folder = planted[0].folder
    manifest = manifest_of(folder)
    other = manifest | {"splits": {"train": manifest["splits"]["train"] | {"bytes": 1}}}
    with pytest.raises(DataError, match=r"must hold the shards that the run was trained on"):
        training_split(other, tmp_path)
    path = folder / "train-00001.npy"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"train-00001\.npy .* damaged"):
        training_split(manifest, tmp_path)


# -- benchmarks -------------------------------------------------------------------------------------------------------

with gzip.open(benchmark_path("humaneval"), "rt", encoding="utf-8") as file:
    PROMPTS = [json.loads(line)["prompt"] for line in file]


@pytest.fixture(scope="module")
def texts(corpus) -> list[str]:
    """Real source without any problem in it."""
    return [path.read_text(encoding="utf-8") for path in sorted((corpus / "json").glob("*.py"))]


@pytest.fixture(scope="module")
def tokenizer(texts) -> Tokenizer:
    return train_bpe(texts, TokenizerConfig(), 600)


def split_of(folder: Path, texts: list[str], tokenizer: Tokenizer) -> TokenDataset:
    assert tokenizer.eos_id == EOS
    return write_split(folder, [np.array(tokenizer.encode(text), dtype=np.int64) for text in texts], 5000)


@pytest.mark.parametrize("chunk", [2**16, 700])
def test_a_planted_problem_is_found_with_its_documents_and_place(tmp_path, texts, tokenizer, monkeypatch, chunk):
    monkeypatch.setattr(memorization, "CHUNK", chunk)
    holding = [f"{texts[0]}\n{PROMPTS[0]}\n{PROMPTS[2]}\n", f"# ☃\n{PROMPTS[0].upper()}"]
    dataset = split_of(tmp_path, [*texts, *holding], tokenizer)
    hits = benchmark_hits(("humaneval", "mbpp"), dataset, tokenizer)
    position = sum(len(tokenizer.encode(text)) + 1 for text in texts)
    humaneval = hits.benchmarks["humaneval"]
    assert (humaneval.problems, humaneval.undetectable, hits.benchmarks["mbpp"].problems) == (164, [], 974)
    assert {name: (hit.documents, hit.position) for name, hit in humaneval.hits.items()} == {
        "HumanEval/0": (2, position),
        "HumanEval/2": (1, position),
    }
    assert humaneval.hits["HumanEval/0"].words.startswith("from typing import list def has_close_elements")
    assert (hits.tokens_read, hits.tokens) == (len(dataset), len(dataset))
    json.dumps(asdict(hits))


def test_clean_data_holds_no_problem(tmp_path, texts, tokenizer):
    told: list[int] = []
    dataset = split_of(tmp_path, texts, tokenizer)
    hits = benchmark_hits(("humaneval", "mbpp"), dataset, tokenizer, progress=told.append)
    assert [benchmark.hits for benchmark in hits.benchmarks.values()] == [{}, {}]
    assert sum(told) == len(dataset)


def test_problems_that_cannot_be_recognised_are_named(tmp_path, texts, tokenizer):
    (tmp_path / "exam.jsonl").write_text('{"task_id": "a", "text": "too short"}\n', encoding="utf-8")
    name = str(tmp_path / "exam.jsonl")
    hits = benchmark_hits((name,), split_of(tmp_path / "data", texts, tokenizer), tokenizer).benchmarks[name]
    assert (hits.problems, hits.undetectable, hits.hits) == (1, ["exam/a"], {})


def test_part_of_the_data_is_read_in_even_pieces_and_counted(tmp_path, texts, tokenizer, monkeypatch):
    monkeypatch.setattr(memorization, "PIECE", 500)
    monkeypatch.setattr(memorization, "CHUNK", 300)
    dataset = split_of(tmp_path, [*texts, *(PROMPTS[:40] * 2)], tokenizer)
    told: list[int] = []
    hits = benchmark_hits(("humaneval",), dataset, tokenizer, 4000, told.append)
    assert hits.tokens_read == sum(told) == 4000 < hits.tokens == len(dataset)
    assert 0 < len(hits.benchmarks["humaneval"].hits) < 40
    assert hits == benchmark_hits(("humaneval",), dataset, tokenizer, 4000)


@given(st.integers(1, 10_000), st.integers(1, 12_000), st.integers(1, 3000))
def test_pieces_lie_apart_within_the_data_and_are_no_more_than_asked_for(n_tokens, max_tokens, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memorization, "PIECE", piece)
        found = pieces(n_tokens, max_tokens)
    wanted = min(n_tokens, max_tokens)
    assert wanted - len(found) < sum(stop - start for start, stop in found) <= wanted
    edges = [place for each in found for place in each]
    assert edges == sorted(edges) and edges[0] >= 0 and edges[-1] <= n_tokens
    gaps = np.diff([start for start, _ in found])
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1

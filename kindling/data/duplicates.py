"""Finds near-duplicates by MinHash, and documents that contain problems of a benchmark.

Both compare words (letters, digits and underscores, in lower case), so layout and punctuation do not count. The worker
processes compute signatures; the building process keeps the index.

    index = MinHashIndex(threshold=0.6)
    if index.find(mark) is None:
        index.add(mark)

Limits: the similarity is an estimate (standard error 0.04 with 128 slots), so a pair near the threshold can go either
way. If more than 64 documents share a band, only the newest 64 are compared. Texts of fewer than two words are never
near-duplicates.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from config import DataConfig
from kindling.errors import KindlingError, one_line
from kindling.json_rows import DAMAGE, Broken, is_rows, open_text, read_rows
from kindling.paths import expand_home

SLOTS, BANDS = 128, 32  # 32 bands of 4 slots: a pair of similarity 0.6 shares a band with probability 0.99
SHINGLE = 2  # words; pairs find copies with changed names better than triples, and unrelated files still differ
CHAIN = 64  # compare this many documents for each band, the newest; a band that many share says little
NGRAM = 13  # this many equal words in a row mean contamination (Brown et al. 2020, appendix C)
NGRAM_LETTERS = 7  # at least this many of them are longer than one character and no number, to skip tables of digits
FILTER_BITS = 20  # a table of 1 MB; our benchmarks set a twentieth of it
PROBLEMS = Path(__file__).resolve().parents[2] / "problems"
BENCHMARKS = {"humaneval": PROBLEMS / "HumanEval.jsonl.gz", "mbpp": PROBLEMS / "mbpp.jsonl.gz"}
_WORD = re.compile(r"\w+")


class BenchmarkError(KindlingError):
    """A file of `data.decontaminate` cannot be used."""


class _WordHashes(dict[str, int]):
    """A cache of the 64-bit hash of each word. Python's own hash differs between processes."""

    def __missing__(self, word: str) -> int:
        if len(self) >= 2**18:  # limits the memory; most words occur once
            self.clear()
        raw = word.encode("utf-8", "surrogatepass")
        value = self[word] = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
        return value


_hash_of = _WordHashes()


def word_hashes(text: str) -> np.ndarray:
    """Return the hashes of the words of `text` in order, uint64 (n_words,)."""
    return np.array(list(map(_hash_of.__getitem__, _WORD.findall(text.lower()))), dtype=np.uint64)


def window_hashes(words: np.ndarray, length: int) -> np.ndarray:
    """Return one hash for each run of `length` words, uint64 (n_words - length + 1,); empty if there are fewer words."""
    n = max(0, len(words) - length + 1)
    out = np.zeros(n, dtype=np.uint64)
    for i in range(length):
        out = out * np.uint64(0x9E3779B97F4A7C15) + words[i : i + n]
    return out


def signature(words: np.ndarray) -> bytes:
    """Return the MinHash signature of a document's word pairs, or nothing for fewer than two words.

    One byte for each slot (b-bit minwise hashing, Li and König 2010). `words` are its `word_hashes`.
    """
    from rensa import RMinHash

    shingles = window_hashes(words, SHINGLE)
    if not len(shingles):
        return b""
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(shingles, [0, len(shingles)], num_perm=SLOTS, seed=1)
    slots = np.array(matrix.to_rows()[0], dtype=np.uint32)
    # the highest byte of a product, because the low bits of the slots are not uniform
    return ((slots * np.uint32(2654435769)) >> np.uint32(24)).astype(np.uint8).tobytes()


class MinHashIndex:
    """An index of the signatures of the documents kept so far (locality-sensitive hashing). About 0.5 kB for each.

    The index of `rensa` needs 1.6 to 3.5 kB for each document, too much for millions of them. Here the four bytes of each
    band are a key into the hash table of that band; `_next` holds the chains.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self._n = 0
        self._signatures = np.zeros((1024, SLOTS), dtype=np.uint8)
        self._next = np.zeros((1024, BANDS), dtype=np.int32)
        self._heads = np.full((BANDS, 1024), -1, dtype=np.int32)  # -1 ends a chain

    def __len__(self) -> int:
        return self._n

    def _places(self, signatures: np.ndarray) -> np.ndarray:
        """Return the place of each band in its hash table, (n, BANDS), for signatures (n, SLOTS)."""
        keys = np.ascontiguousarray(signatures).view("<u4") * np.uint32(2654435769)
        return keys >> np.uint32(32 - int(self._heads.shape[1]).bit_length() + 1)

    def find(self, mark: bytes) -> tuple[int, float] | None:
        """Return number and similarity of the most similar document, or None if it is below the threshold."""
        if not mark:
            return None
        wanted = np.frombuffer(mark, dtype=np.uint8)
        bands = np.arange(BANDS)
        found: list[np.ndarray] = []
        at = self._heads[bands, self._places(wanted[None])[0]]
        for _ in range(CHAIN):
            alive = at >= 0
            if not alive.any():
                break
            bands, at = bands[alive], at[alive]
            found.append(at)
            at = self._next[at, bands]
        if not found:
            return None
        numbers = np.unique(np.concatenate(found))
        equal = (self._signatures[numbers] == wanted).mean(axis=1)
        similarity = (equal - 1 / 256) / (1 - 1 / 256)  # one slot in 256 is equal by chance
        best = int(similarity.argmax())
        return (int(numbers[best]), float(similarity[best])) if similarity[best] >= self.threshold else None

    def add(self, mark: bytes) -> int:
        """Add a document; return its number, counted from 0."""
        if self._n == len(self._signatures):
            self._grow()
        number, self._n = self._n, self._n + 1
        if mark:
            self._signatures[number] = np.frombuffer(mark, dtype=np.uint8)
            self._link(number, number + 1)
        return number

    def _link(self, start: int, stop: int) -> None:
        bands = np.arange(BANDS)
        for number, places in zip(range(start, stop), self._places(self._signatures[start:stop])):
            self._next[number] = self._heads[bands, places]
            self._heads[bands, places] = number

    def _grow(self) -> None:
        self._signatures = np.concatenate([self._signatures, np.zeros_like(self._signatures)])
        self._next = np.zeros((len(self._signatures), BANDS), dtype=np.int32)
        self._heads = np.full((BANDS, len(self._signatures)), -1, dtype=np.int32)
        self._link(0, self._n)


class Benchmarks:
    """The word sequences of benchmarks, to keep documents that contain them out of training."""

    def __init__(self, names: tuple[str, ...]):
        """Read the benchmarks: `humaneval`, `mbpp`, or files; raises BenchmarkError for one that cannot be read.

        A broken row costs only itself: it is in `unreadable`, and a warning says so.
        """
        hashes: dict[int, list[str]] = {}
        self.n_problems = 0
        self.undetectable: list[str] = []  # problems that are too short or too common to be recognised
        self.unreadable: list[str] = []  # broken rows, by file and line, and why
        for name in names:
            for problem, text in _problems(benchmark_path(name)):
                if text is None:
                    self.unreadable.append(problem)
                    continue
                words = _WORD.findall(text.lower())
                telling = np.array([len(w) > 1 and not w.isdigit() for w in words], dtype=np.int64)
                grams = window_hashes(word_hashes(text), NGRAM)
                if len(grams):
                    letters = np.convolve(telling, np.ones(NGRAM, dtype=np.int64), mode="valid")
                    grams = grams[letters >= NGRAM_LETTERS]
                for gram in np.unique(grams).tolist():
                    hashes.setdefault(gram, []).append(problem)
                self.n_problems += 1
                if not len(grams):
                    self.undetectable.append(problem)
        if self.unreadable:
            print(f"warning: {self.unreadable_note()}", file=sys.stderr)
        self._hashes = np.array(sorted(hashes), dtype=np.uint64)
        self._problems = [hashes[h] for h in self._hashes.tolist()]
        self._filter = np.zeros(2**FILTER_BITS, dtype=bool)  # of the high bits of the hashes; it ends most searches
        self._filter[self._hashes >> np.uint64(64 - FILTER_BITS)] = True

    def unreadable_note(self) -> str:
        """Return how many rows of the benchmarks are broken, and the first of them."""
        return f"{len(self.unreadable)} rows of data.decontaminate cannot be read, such as {self.unreadable[0]}"

    def _hits(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where a document has 13 words of a problem, and the indices of these hashes in `_hashes`."""
        grams = window_hashes(words, NGRAM)
        hits = np.flatnonzero(self._filter.take(grams >> np.uint64(64 - FILTER_BITS)))
        if not len(hits):  # always true if there are no hashes
            return hits, hits
        places = np.minimum(np.searchsorted(self._hashes, grams[hits]), len(self._hashes) - 1)
        equal = self._hashes[places] == grams[hits]
        return hits[equal], places[equal]

    def find(self, text: str, words: np.ndarray) -> str | None:
        """Return the first problem of which a document contains 13 words, and these words, or None.

        `words` are the `word_hashes` of `text`.
        """
        hits, places = self._hits(words)
        if not len(hits):
            return None
        shared = " ".join(_WORD.findall(text.lower())[hits[0] : hits[0] + NGRAM])
        return f"{self._problems[places[0]][0]}: {shared!r}"

    def find_all(self, text: str, words: np.ndarray) -> dict[str, str]:
        """Return every problem of which a document contains 13 words, with the first such words; `words` as in `find`."""
        hits, places = self._hits(words)
        spelt = _WORD.findall(text.lower()) if len(hits) else []
        found: dict[str, str] = {}
        for hit, place in zip(hits.tolist(), places.tolist()):
            for problem in self._problems[place]:
                found.setdefault(problem, " ".join(spelt[hit : hit + NGRAM]))
        return found


def benchmark_path(name: str) -> Path:
    """Return the file of a benchmark: `humaneval` and `mbpp` come with the project, any other name is a path."""
    return BENCHMARKS.get(name.lower()) or expand_home(name, "--data.decontaminate")


def benchmark_files(cfg: DataConfig) -> dict[str, str]:
    """Return the sha256 of each file of `data.decontaminate`, by name; raises BenchmarkError if one cannot be read."""
    out = {}
    for name in cfg.decontaminate:
        try:
            out[name] = hashlib.sha256(benchmark_path(name).read_bytes()).hexdigest()
        except OSError as e:
            raise BenchmarkError(_unreadable(name, str(e))) from None
    return out


def _unreadable(name: object, why: str) -> str:
    return (
        f"data.decontaminate must name {', '.join(BENCHMARKS)}, or text or JSONL files that can be read, but {str(name)!r} "
        f"cannot ({why}); correct --data.decontaminate"
    )


def _problems(path: Path) -> Iterator[tuple[str, str | None]]:
    """Yield the name and text of each problem: all strings of a row of a JSON file, or the whole text file.

    For a broken row, yields where it is and why, and None. Raises BenchmarkError if the file is damaged or has no other rows.
    """
    stem, found, why = path.name.split(".")[0], False, "it is empty"
    try:
        if not is_rows(path):
            with open_text(path) as f:
                text = f.read()
            text.encode("utf-8")  # raises an error for a byte that is not UTF-8
            yield stem, text
            return
        for number, row in enumerate(read_rows(path)):
            if isinstance(row.content, Broken):
                why = f"line {row.line:,}: {row.content}"
                yield f"{path.name}, {why}", None
                continue
            found, content = True, row.content
            name = str(content.pop("task_id", number)) if isinstance(content, dict) else str(number)
            yield name if "/" in name else f"{stem}/{name}", " ".join(_strings(content))
    except DAMAGE as e:
        raise BenchmarkError(_unreadable(path, one_line(e))) from None
    if not found:
        raise BenchmarkError(_unreadable(path, why))


def _strings(value: Any) -> Iterator[str]:
    """Yield the strings of a JSON value in their order, also of one that is nested as deeply as it can be."""
    todo = [value]
    while todo:
        value = todo.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, (list, dict)):
            todo += reversed(list(value.values()) if isinstance(value, dict) else value)

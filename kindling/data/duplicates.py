"""Finds documents that are the same as an earlier one, or nearly so by MinHash.

    duplicates = Deduplicator(cfg.data)
    drop, original = duplicates.check(processed.digest, processed.signature, number)

Near-duplicates share words (letters, digits and underscores, in lower case), so layout and punctuation do not count. The
worker processes compute signatures; the building process keeps the index.

Limits: the similarity is an estimate (standard error 0.04 with 128 slots), so a pair near the threshold can go either
way. If more than 64 documents share a band, only the newest 64 are compared. Texts of fewer than two words are never
near-duplicates.
"""

from __future__ import annotations

import hashlib
import re
from array import array

import numpy as np

from config import DataConfig
from kindling.data.filters import Drop

SLOTS, BANDS = 128, 32  # 32 bands of 4 slots: a pair of similarity 0.6 shares a band with probability 0.99
SHINGLE = 2  # words; pairs find copies with changed names better than triples, and unrelated files still differ
CHAIN = 64  # compare this many documents for each band, the newest; a band that many share says little
WORD = re.compile(r"\w+")


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
    return np.array(list(map(_hash_of.__getitem__, WORD.findall(text.lower()))), dtype=np.uint64)


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


class Deduplicator:
    """Finds duplicates among the documents kept so far. Needs about 0.7 kB for each of them."""

    def __init__(self, cfg: DataConfig):
        self._exact: dict[bytes, int] | None = {} if cfg.dedup else None
        self._near = None if cfg.near_dedup is None else MinHashIndex(cfg.near_dedup)
        self._numbers = array("q")  # of the documents in `_near`

    def check(self, digest: bytes, signature: bytes, number: int) -> tuple[Drop | None, int | None]:
        """Check document `number`, by its hash and its `signature`, against those kept so far; remember it if it is kept.

        Returns why it is dropped and the number of its original, or None and None.
        """
        if self._exact is not None:
            original = self._exact.setdefault(digest, number)
            if original != number:
                return Drop("duplicate", "the same content as"), original
        if self._near is not None:
            if similar := self._near.find(signature):
                return Drop("near-duplicate", f"similarity {similar[1]:.2f} to"), self._numbers[similar[0]]
            self._near.add(signature)
            self._numbers.append(number)
        return None, None

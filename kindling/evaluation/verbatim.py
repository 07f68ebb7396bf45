"""Finds the longest run that each of many sequences shares with one much longer sequence. Exact, in NumPy.

    windows = Windows(samples)
    longest = Longest(windows)
    longest.update(*windows.find(data, offset=0))  # or piece by piece, as memorization.py reads the training shards
    longest.overlaps()

A window is WINDOW numbers in a row. Every window of the data is hashed, and kept if a sample has the same one, compared number
by number. Stretches of such windows that could give some sample a longer run are sorted together with the samples' suffixes
(prefix doubling, Manber and Myers 1993). This gives exact lengths, in a time that does not depend on how many samples contain
a piece or how many copies of it are in the data.

Limits: runs of fewer than WINDOW numbers are not found. Data in which most windows occur in a sample is read at 1 to 5 million
numbers per second, other data at 15 million and more.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

WINDOW = 8  # numbers; the shortest run that is found
POOL = 2**18  # windows of the data that are sorted at a time
SEEN_BYTES = 2**27  # of stretches that were already processed
FILTER_BITS = 22  # 4 MB, which fit in the processor's cache


class Overlap(NamedTuple):
    """The longest run of tokens in a sample that is also in the data."""

    length: int  # in tokens; 0 if fewer than WINDOW
    position: int | None  # where a copy begins in the data
    start: int  # where the run begins in the sample


def hashes_of(tokens: np.ndarray) -> np.ndarray:
    """Return the 32-bit hash of every window, uint32 (..., n - WINDOW + 1), for tokens (..., n).

    It is a sum of odd multiples modulo 2**32, so only its high bits depend on all bits of the tokens.
    """
    out = tokens.astype(np.uint32)
    for width, factor in ((1, 0x9E3779B1), (2, 0x85EBCA77), (4, 0xC2B2AE3D)):  # ABCDEFGH = ABCD * factor + EFGH
        out = out[..., :-width] * np.uint32(factor) + out[..., width:]
    return out


class Windows:
    """The distinct windows of all samples, numbered in the order of their hashes, and their places in the samples."""

    def __init__(self, samples: list[np.ndarray]):
        counts = np.array([max(0, len(sample) - WINDOW + 1) for sample in samples], dtype=np.int64)
        self.counts = counts  # windows of each sample, (S,)
        self.sample = np.repeat(np.arange(len(samples)), counts)  # (W,)
        self.start = np.arange(len(self.sample)) - np.repeat(np.cumsum(counts) - counts, counts)  # in it, (W,)
        views = [_windows_of(sample) for sample in samples if len(sample) >= WINDOW]
        rows = np.concatenate([np.empty((0, WINDOW), dtype=np.int64), *views])  # (W, WINDOW)
        rows, ids = np.unique(rows, axis=0, return_inverse=True)  # (U, WINDOW), (W,)
        hashes = hashes_of(rows)[:, 0]  # (U,)
        order = np.argsort(hashes, kind="stable")
        self.rows, self.hashes = rows[order], hashes[order]
        self.ids = np.argsort(order)[ids.ravel()]  # (W,)
        self._filter = np.zeros(2**FILTER_BITS, dtype=bool)
        self._filter[self.hashes >> np.uint32(32 - FILTER_BITS)] = True

    def find(self, tokens: np.ndarray, offset: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the places in `tokens` (n,) where a window of a sample begins, ascending, and the numbers of these windows.

        `offset` is added to the places. Windows with equal hashes are compared token by token.
        """
        hashes = hashes_of(tokens)  # (n - WINDOW + 1,)
        places = np.flatnonzero(self._filter.take(hashes >> np.uint32(32 - FILTER_BITS)))
        hashes = hashes[places]
        at = np.searchsorted(self.hashes, hashes)
        ids = np.full(len(places), -1, dtype=np.int64)
        open_ = np.arange(len(places))
        while True:
            open_ = open_[at[open_] < len(self.hashes)]
            open_ = open_[self.hashes[at[open_]] == hashes[open_]]
            if not len(open_):
                break
            equal = (_windows_of(tokens)[places[open_]] == self.rows[at[open_]]).all(axis=1)
            ids[open_[equal]] = at[open_[equal]]
            open_ = open_[~equal]
            at[open_] += 1  # try another window with the same hash
        return places[ids >= 0] + offset, ids[ids >= 0]


def _windows_of(tokens: np.ndarray) -> np.ndarray:
    return np.lib.stride_tricks.sliding_window_view(tokens, WINDOW)  # (n - WINDOW + 1, WINDOW)


class Longest:
    """The longest known run of each sample, counted in windows: w windows are w + WINDOW - 1 tokens."""

    def __init__(self, windows: Windows):
        self.windows = windows
        n_samples = len(windows.counts)
        self.length = np.zeros(n_samples, dtype=np.int64)
        self.start = np.zeros(n_samples, dtype=np.int64)
        self.position = np.zeros(n_samples, dtype=np.int64)
        self.reach = int(windows.counts.max(initial=0))  # windows in the longest possible run
        pairs = np.unique(np.stack((windows.ids, windows.sample), axis=1), axis=0)  # window and sample, (P, 2)
        self._holder = pairs[:, 1]
        self._first_holder = np.searchsorted(pairs[:, 0], np.arange(len(windows.rows)))
        self._seen: set[bytes] = set()
        self._seen_bytes = 0

    def overlaps(self) -> list[Overlap]:
        """Return the longest known runs, with lengths in tokens."""
        found = zip(self.length.tolist(), self.position.tolist(), self.start.tolist())
        return [Overlap(w + WINDOW - 1, at, start) if w else Overlap(0, None, 0) for w, at, start in found]

    def update(self, places: np.ndarray, ids: np.ndarray) -> None:
        """Add windows that were found in the data: their places, ascending, and numbers, both (n,)."""
        if not len(places):
            return
        starts = np.flatnonzero(np.diff(places, prepend=places[0] - 2) != 1)  # of stretches of consecutive places
        stops = np.append(starts[1:], len(places))
        while len(starts):
            # a stretch matters if it is longer than the known run of a sample that has one of its windows
            known = np.where(self.length < self.windows.counts, self.length, np.iinfo(np.int64).max)
            needed = np.minimum.reduceat(known[self._holder], self._first_holder)  # (U,)
            matters = stops - starts > self._least(needed[ids], starts, stops)
            starts, stops = starts[matters], stops[matters]
            pool, n_done = self._new_stretches(ids, starts, stops)
            if pool:
                self._sort_in([(places[i], ids[i:j]) for i, j in pool])
            starts, stops = starts[n_done:], stops[n_done:]

    def _new_stretches(
        self, ids: np.ndarray, starts: np.ndarray, stops: np.ndarray
    ) -> tuple[list[tuple[int, int]], int]:
        """Return new stretches, of about POOL windows together, and how many stretches were checked for this."""
        new, size, n_done = [], 0, 0
        for i, j in zip(starts.tolist(), stops.tolist()):
            n_done += 1
            if self._is_new(ids[i:j]):
                new.append((i, j))
                size += j - i
            if size >= POOL:
                break
        return new, n_done

    @staticmethod
    def _least(values: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Return the smallest value in each stretch."""
        edges = np.stack((starts, stops), axis=1).ravel()  # every second piece is between two stretches
        return np.minimum.reduceat(np.append(values, 0), edges)[::2]

    def _is_new(self, ids: np.ndarray) -> bool:
        """Return whether the same stretch was not processed before. All are forgotten when they fill SEEN_BYTES."""
        key = ids.astype(np.int32).tobytes()
        if key in self._seen:
            return False
        if self._seen_bytes + len(key) > SEEN_BYTES:
            self._seen.clear()
            self._seen_bytes = 0
        self._seen.add(key)
        self._seen_bytes += len(key)
        return True

    def _sort_in(self, stretches: list[tuple[int, np.ndarray]]) -> None:
        """Add stretches: the place of each in the data, and its windows."""
        windows = self.windows
        end_of_sample, end_of_stretch = len(windows.rows), len(windows.rows) + 1  # two numbers that never match
        bounds = np.cumsum(windows.counts)
        own = np.insert(windows.ids, bounds, end_of_sample)
        where = np.insert(np.arange(len(windows.ids)), bounds, -1)  # the index of each of `own` among the windows
        pool = np.concatenate([np.append(ids, end_of_stretch) for _, ids in stretches])
        position = np.concatenate([place + np.arange(len(ids) + 1) for place, ids in stretches])
        length, match = longest_matches(own, pool, self.reach)
        held = where >= 0
        length, match = length[held], match[held]  # (W,)
        has_windows = np.flatnonzero(windows.counts)
        best = np.zeros(len(self.length), dtype=np.int64)
        best[has_windows] = np.maximum.reduceat(length, (bounds - windows.counts)[has_windows])
        for sample in np.flatnonzero(best > self.length).tolist():
            first = int(bounds[sample] - windows.counts[sample])
            window = first + int(length[first : bounds[sample]].argmax())
            self.length[sample], self.start[sample] = length[window], windows.start[window]
            self.position[sample] = position[match[window]]


def longest_matches(own: np.ndarray, pool: np.ndarray, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """Return for each place in `own` (n,) the length of the longest run from there that is also in `pool` (m,), and where.

    Both results are (n,). Lengths are exact up to `reach`. Both arrays have numbers >= 0 and end with a number that is not in the
    other. All suffixes are sorted by prefix doubling, so the longest match is with a neighbour from the pool.
    """
    n, last = len(own), len(own) + len(pool) - 1
    places = np.arange(last + 1)
    rank = np.unique(np.concatenate((own, pool)), return_inverse=True)[1]  # (n + m,)
    ranks = [(1, rank)]  # ranks by the first `width` numbers from each place
    while (width := ranks[-1][0]) < reach:
        pair = rank * (last + 1) + rank[np.minimum(places + width, last)]
        rank = np.unique(pair, return_inverse=True)[1]
        ranks.append((2 * width, rank))
    order = np.argsort(rank, kind="stable")
    of_pool = order >= n
    place_in_order = np.empty_like(order)
    place_in_order[order] = places
    before = np.maximum.accumulate(np.where(of_pool, places, -1))
    after = np.minimum.accumulate(np.where(of_pool, places, last + 1)[::-1])[::-1]
    best, match = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
    for neighbour in (before, after):
        there = neighbour[place_in_order[:n]]  # (n,)
        exists = (there >= 0) & (there <= last)
        other = order[np.where(exists, there, 0)]
        length = np.zeros(n, dtype=np.int64)
        for width, rank in reversed(ranks):
            a, b = np.minimum(places[:n] + length, last), np.minimum(other + length, last)
            length += width * (rank[a] == rank[b])
        better = exists & (length > best)
        best[better], match[better] = length[better], other[better] - n
    return best, match

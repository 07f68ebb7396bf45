"""Conversations for fine-tuning: the files that hold them, and the rows that are trained on.

    examples = Examples(folder, "train")
    batches = ExampleRows(examples, block_size=1024, seed=0)
    batch = batches.rows(0, 8)  # targets are -100 wherever the prompt or padding is what comes next

A split's token shards hold its examples one after the other. Beside them, `SPLIT-segments.npy` says for each exchange how
many tokens are prompt and how many are response, and what the hashes of the two texts were, so that the rows can be
checked against the texts that they came from. What is supervised follows from these numbers alone.

A row holds as many whole examples as fit (packing), with positions by which none sees another, or just one, padded. Padding
is never the end-of-text token, and nothing attends to it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from config import IGNORE, Config, ModelConfig
from kindling.data.conversations import PROMPT, RESPONSE, Example
from kindling.data.prompts import rendered
from kindling.data.shards import Batch, DataError, ShardWriter, ShuffledRows, TokenDataset
from kindling.files import sha256_file

WIDTHS = 4  # rows are padded to one of so many widths, each of which compiled code is compiled for
POOL = 50  # batches whose examples are sorted by length together


class ExampleWriter(ShardWriter):
    """Collects the examples of one split."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype):
        super().__init__(folder, split, dtype)
        self._segments: list[np.ndarray] = []
        self.max_exchanges = 0  # of an example

    def add_example(
        self, ids: np.ndarray, segments: np.ndarray, n_bytes: int, language: str = "unknown", source: str = "unknown"
    ) -> None:
        """Append one example: its ids, its segments (S, 4), and the bytes of its responses."""
        numbers = np.full((len(segments), 1), self.info.documents, dtype=np.int64)
        self._segments.append(np.hstack((numbers, segments)))
        self.max_exchanges = max(self.max_exchanges, len(segments))
        self.add(ids, n_bytes, language, source)

    def close(self) -> None:
        """Write what is left, the table of documents and that of segments."""
        super().close()
        path = self.folder / f"{self.split}-segments.npy"
        np.save(path, np.concatenate([np.empty((0, 5), dtype=np.int64), *self._segments]))
        self.info.segments = {"file": path.name, "sha256": sha256_file(path)}


class Examples(TokenDataset):
    """One split of a data folder that holds conversations."""

    def __init__(self, folder: Path, split: str):
        """Open and verify the split; raises DataError naming the first file that is damaged."""
        super().__init__(folder, split)
        if self.info.segments is None:
            raise DataError(
                f"{folder} must hold conversations, but holds documents; fine-tune on a source of instructions"
            )
        table = self._open_table(self.info.segments)  # (S, 5)
        self.segments = table[:, 1:]  # (S, 4)
        first = np.searchsorted(table[:, 0], np.arange(self.n_examples + 1))
        self._first_segment = first  # (N + 1,)
        ends = np.concatenate(([0], self.segments[:, [PROMPT, RESPONSE]].sum(1).cumsum()))  # (S + 1,)
        self._starts = ends[first]  # (N + 1,)

    @property
    def n_examples(self) -> int:
        """How many conversations there are."""
        return self.info.documents

    @cached_property
    def lengths(self) -> np.ndarray:
        """The tokens of each example, (N,)."""
        return np.diff(self._starts)

    @property
    def n_supervised(self) -> int:
        """Tokens of responses, end-of-text tokens included."""
        return int(self.segments[:, RESPONSE].sum())

    def segments_of(self, number: int) -> np.ndarray:
        """Return the rows of the table that are of one conversation."""
        return self.segments[slice(*self._first_segment[number : number + 2])]

    def tokens_of(self, number: int) -> range:
        """Return which tokens of the split one conversation has."""
        return range(*self._starts[number : number + 2].tolist())

    def example(self, number: int) -> Example:
        """Return one conversation."""
        tokens = self.tokens_of(number)
        return Example(self.read(tokens.start, len(tokens)), self.segments_of(number))

    def in_order(self, cfg: ModelConfig, batch_size: int) -> Iterator[Batch]:
        rows = self._rows_in_order(cfg, batch_size)
        for first in range(0, rows.n_rows, batch_size):
            yield rows.of_bins(range(first, min(first + batch_size, rows.n_rows)), n_rows=batch_size)

    def _rows_in_order(self, cfg: ModelConfig, batch_size: int = 1) -> ExampleRows:
        return ExampleRows(self, cfg.block_size, 0, packing=cfg.backbone == "kindling", batch_size=batch_size)

    def targets_in_order(self, cfg: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
        numbers = np.array(list(chain.from_iterable(self._rows_in_order(cfg).bins)))
        supervised = np.add.reduceat(self.segments[:, RESPONSE], self._first_segment[:-1])  # (D,)
        return numbers, supervised[numbers]


def open_split(cfg: Config, folder: Path, split: str) -> TokenDataset:
    """Open one split of the data that `cfg` describes: of conversations or of documents."""
    return Examples(folder, split) if cfg.data.instructions else TokenDataset(folder, split)


def require_template(manifest: dict[str, Any], template: str) -> None:
    """Raise DataError unless the examples of a manifest were made with the template as it is now."""
    if manifest.get("template") != rendered(template):
        raise DataError(
            f"the examples of {manifest['fingerprint']} must have been made with the template {template} as it is in prompts.py, "
            f"but it was another then; take the change of the template back, or fine-tune anew with --fresh"
        )


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Return which items share a bin: longest first, each into the fullest bin that still holds it (best-fit decreasing).

    Raises ValueError for an item that fits in none.
    """
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"an item must be at most {capacity}, but one is {lengths.max()}")
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins by the room that is left in them
    rooms: list[int] = []  # those that some bin has, ascending
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            room, chosen = capacity, len(bins)
            bins.append([])
        else:
            room = rooms[place]
            chosen = by_room[room].pop()
            if not by_room[room]:
                del rooms[place]
        bins[chosen].append(item)
        if left := room - length:
            if not by_room[left]:
                rooms.insert(bisect_left(rooms, left), left)
            by_room[left].append(chosen)
    return bins


class ExampleRows(ShuffledRows):
    """The training order of examples: every one once an epoch, shuffled by (seed, epoch), addressed like PackedBlocks.

    With packing the same examples share a row in every epoch; the order of the rows changes. Without it a row is one
    example; the rows are shuffled, then of every POOL batches those of like lengths are put together.
    """

    def __init__(self, examples: Examples, block_size: int, seed: int, packing: bool = True, batch_size: int = 1):
        """`batch_size` matters without packing only: so many rows are padded to the same length."""
        self.dataset = self.examples = examples
        self.block_size = block_size
        self.packing, self.batch_size = packing, batch_size
        lengths = examples.lengths - 1  # the last token is a target only
        self.bins = pack(lengths, block_size) if packing else [[i] for i in range(len(lengths))]
        super().__init__(len(self.bins), seed)
        if not self.bins:
            raise DataError(f"the {examples.split} split must hold at least one example, but is empty; add examples")
        eos_id = examples.manifest["eos_id"]
        self.pad_id = 0 if eos_id else 1

    def _shuffle(self, epoch: int, rng: np.random.Generator) -> np.ndarray:
        order = rng.permutation(self.n_rows)
        if self.packing:
            return order
        lengths, pool = self.examples.lengths, POOL * self.batch_size
        pools = [order[i : i + pool] for i in range(0, len(order), pool)]
        order = np.concatenate([p[np.argsort(lengths[p], kind="stable")] for p in pools])
        begun = -epoch * self.n_rows % self.batch_size  # rows that the last epoch's last batch still wants
        stop = begun + max(0, len(order) - begun) // self.batch_size * self.batch_size
        batches = order[begun:stop].reshape(-1, self.batch_size)
        return np.concatenate((order[:begun], rng.permutation(batches).ravel(), order[stop:]))

    def tokens_of(self, position: int) -> list[range]:
        """Return which tokens of the split the row at a position holds: those of each of its examples."""
        return [self.examples.tokens_of(number) for number in self.bins[self.row_at(position)]]

    def _width(self, items: np.ndarray) -> int:
        """Return the width of padded rows of these examples."""
        unit = max(1, self.block_size // WIDTHS)
        longest = int(self.examples.lengths[items].max()) - 1
        return min(self.block_size, -(-longest // unit) * unit)

    def rows(self, first: int, count: int) -> Batch:
        """Return the rows at positions first, first + 1, ..."""
        return self.of_bins([self.row_at(first + i) for i in range(count)], count)

    def of_bins(self, bins: range | list[int], n_rows: int) -> Batch:
        """Return these bins as the rows of a batch, with rows of padding after them to make `n_rows`."""
        width = self.block_size
        if not self.packing:
            width = self._width(np.array([self.bins[b][0] for b in bins]))
        idx = np.full((n_rows, width), self.pad_id, dtype=np.int64)
        targets = np.full_like(idx, IGNORE)
        positions = np.zeros_like(idx)  # a token of padding is a document of its own
        for row, number in enumerate(bins):
            at = 0
            for item in self.bins[number]:
                example = self.examples.example(item)
                place = slice(at, at := at + len(example.ids) - 1)
                idx[row, place], targets[row, place] = example.ids[:-1], example.targets
                positions[row, place] = np.arange(len(example.ids) - 1)
        return Batch(idx, targets, positions if self.packing else None)

    @property
    def wasted(self) -> float:
        """The share of all places in the rows of an epoch that hold padding; without packing, in the first epoch's batches."""
        filled = int((self.examples.lengths - 1).sum())
        if self.packing:
            return 1 - filled / (self.n_rows * self.block_size)
        places = 0
        order = self.order_of(0)
        for first in range(0, self.n_rows, self.batch_size):
            rows = order[first : first + self.batch_size]
            places += len(rows) * self._width(rows)
        return 1 - filled / places

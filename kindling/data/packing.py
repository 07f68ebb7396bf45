"""Rows of the model that hold whole items: examples of fine-tuning, or pieces for fill-in-the-middle.

    pieces = PieceDataset(folder, "train")
    batch = PieceRows(pieces, block_size=256, seed=0).rows(0, 8)

The token shards of a split hold its pieces in the order of its documents. The table `SPLIT-pieces.npy` has a row for each piece:
its length and its kind. A row of the model holds as many whole pieces as fit, and padding (`pack`). All tokens of text
and end-of-text are targets, as in the paper. Control tokens and padding are none: a prompt gives them, and no model must ever
write one. So the loss of text from left to right has no term for whether its document could have been cut.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from config import IGNORE, ModelConfig
from kindling.data.infilling import KIND, LEFT_TO_RIGHT, LENGTH, Pieces
from kindling.data.shards import Batch, DataError, ShardWriter, ShuffledRows, TokenDataset, evenly_spaced
from kindling.tokenization.infilling import FimIds

INFILLING = "-infilling"  # ends the name of the split beside a held-out one
Item = tuple[np.ndarray, np.ndarray]  # the inputs and the targets of an item, (n,) both


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Return the items of each bin. Items go longest first into the fullest bin with enough room (best-fit decreasing).

    Raises ValueError for an item that is longer than `capacity`.
    """
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"an item must be at most {capacity}, but one is {lengths.max()}")
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # the bins with each amount of room left
    rooms: list[int] = []  # the amounts of room that some bin has, ascending
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


def lay_out(rows: list[list[Item]], n_rows: int, width: int, pad_id: int, separate: bool) -> Batch:
    """Return rows of items as a batch, with padding up to `width` and `n_rows`, whose targets are IGNORE.

    With `separate` it has positions, so that no item sees another. A token of padding is then a document of its own.
    """
    idx = np.full((n_rows, width), pad_id, dtype=np.int64)
    targets = np.full_like(idx, IGNORE)
    position_ids = np.zeros_like(idx)
    for row, items in enumerate(rows):
        at = 0
        for inputs, its_targets in items:
            place = slice(at, at := at + len(inputs))
            idx[row, place], targets[row, place] = inputs, its_targets
            position_ids[row, place] = np.arange(len(inputs))
    return Batch(idx, targets, position_ids if separate else None)


class PackedRows(ShuffledRows):
    """Rows that hold whole items, each once an epoch, shuffled by (seed, epoch) and addressed like PackedBlocks.

    `bins` has the numbers of the items of each row. The same items share a row in every epoch; only the order of rows changes.
    """

    def __init__(
        self, dataset: PackedDataset, bins: list[list[int]], block_size: int, pad_id: int, separate: bool, seed: int
    ):
        """With `separate` batches have positions, so that no item sees another."""
        super().__init__(len(bins), seed)
        self.dataset, self.bins, self.block_size, self.pad_id, self.separate = (
            dataset,
            bins,
            block_size,
            pad_id,
            separate,
        )

    def tokens_of(self, position: int) -> list[range]:
        """Return the tokens of the split in the row at a position, a range for each of its items."""
        return [self.dataset.tokens_of(number) for number in self.bins[self.row_at(position)]]

    def width(self, bins: list[int]) -> int:
        """Return the width of a batch of these bins."""
        return self.block_size

    def batch_of_bins(self, bins: list[int], n_rows: int) -> Batch:
        """Return these bins as the rows of a batch, and rows of padding up to `n_rows`."""
        items = [[self.dataset.item(number) for number in self.bins[b]] for b in bins]
        return lay_out(items, n_rows, self.width(bins), self.pad_id, self.separate)

    def rows(self, first: int, count: int) -> Batch:
        """Return the rows at positions first, first + 1, ..."""
        return self.batch_of_bins([self.row_at(first + i) for i in range(count)], count)

    def in_order(self, batch_size: int, part: int | None = None) -> Iterator[Batch]:
        """Yield all rows in the order of `bins`, or `part` of them, evenly spaced."""
        bins = evenly_spaced(self.n_rows, part)
        for first in range(0, len(bins), batch_size):
            yield self.batch_of_bins(bins[first : first + batch_size], batch_size)


class PackedDataset(TokenDataset):
    """One split of a data folder whose items are evaluated in rows that hold them whole."""

    def tokens_of(self, number: int) -> range:
        """Return the positions of the tokens of one item in the split."""
        raise NotImplementedError

    def item(self, number: int) -> Item:
        """Return the inputs and the targets of one item."""
        raise NotImplementedError

    def _rows_in_order(self, cfg: ModelConfig, batch_size: int = 1) -> PackedRows:
        """Return the rows of the split for a model; `batch_size` matters only where rows of a batch have one width."""
        raise NotImplementedError

    def n_rows_in_order(self, cfg: ModelConfig) -> int:
        return self._rows_in_order(cfg).n_rows

    def in_order(self, cfg: ModelConfig, batch_size: int, part: int | None = None) -> Iterator[Batch]:
        return self._rows_in_order(cfg, batch_size).in_order(batch_size, part)


# -- pieces for fill-in-the-middle --------------------------------------------------------------------------------------


class PieceWriter(ShardWriter):
    """Collects the documents of one split, in pieces, and writes them."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype):
        super().__init__(folder, split, dtype)
        self._tables: list[np.ndarray] = [np.empty((0, 2), dtype=np.int64)]

    def add_pieces(self, pieces: Pieces, n_bytes: int, language: str = "unknown", source: str = "unknown") -> None:
        """Append one document: its ids to the shards, its pieces to their table."""
        self._tables.append(pieces.table)
        self.add(pieces.ids, n_bytes, language, source)

    def close(self) -> None:
        """Write what is left, the table of documents and the table of pieces."""
        super().close()
        self.info.pieces = self._save("pieces", np.concatenate(self._tables))


class PieceDataset(PackedDataset):
    """One split of a data folder whose documents were cut to pieces."""

    def __init__(self, folder: Path, split: str):
        """Open and verify the split; raises DataError naming the first file that is damaged."""
        super().__init__(folder, split)
        if self.info.pieces is None:
            raise DataError(
                f"the {split} split of {folder} must be in pieces, but is not; build it with --data.fim-rate"
            )
        self.fim = FimIds(*self.manifest["fim_ids"])
        table = self._open_table(self.info.pieces)  # (P, 2)
        ends = table[:, LENGTH].cumsum()  # (P,)
        begins = ends - table[:, LENGTH]
        self.infills = table[:, KIND] != LEFT_TO_RIGHT  # (P,) bool
        # text is read from the token before it, so that its first token is a target too. Only after fill-in-the-middle of the
        # same document it is not: end-of-text stands there, which is no reason for what comes
        of_document = self.lengths.cumsum() - self.lengths  # (D,)
        goes_on = ~self.infills & (np.isin(begins, of_document) | ~np.roll(self.infills, 1)) & (begins > 0)
        self._first = begins - goes_on  # (P,)
        self.n_inputs = ends - 1 - self._first
        self._document = np.searchsorted(of_document, begins, side="right") - 1  # (P,)

    def tokens_of(self, number: int) -> range:
        """Return the positions of the tokens of one piece in the split; the first is only read, the last is only a target."""
        return range(int(self._first[number]), int(self._first[number] + self.n_inputs[number]) + 1)

    def item(self, number: int) -> Item:
        """Return the inputs and the targets of one piece."""
        tokens = self.tokens_of(number)
        ids = self.read(tokens.start, len(tokens))
        return ids[:-1], np.where(np.isin(ids[1:], self.fim), IGNORE, ids[1:])

    @property
    def n_supervised(self) -> np.ndarray:
        """The number of targets of each piece, (P,): two of its control tokens are none."""
        return self.n_inputs - 2 * self.infills

    @property
    def n_targets(self) -> int:
        return int(self.n_supervised.sum())

    def _rows_in_order(self, cfg: ModelConfig, batch_size: int = 1) -> PieceRows:
        return PieceRows(self, cfg.block_size, 0, cfg.document_mask)

    def targets_in_order(self, cfg: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
        numbers = np.array(list(chain.from_iterable(self._rows_in_order(cfg).bins)))
        return self._document[numbers], self.n_supervised[numbers]


class PieceRows(PackedRows):
    """The training order of pieces. None is ever cut."""

    def __init__(self, dataset: PieceDataset, block_size: int, seed: int, document_mask: bool = False):
        """With `document_mask` no piece sees another."""
        bins = pack(dataset.n_inputs, block_size)
        super().__init__(dataset, bins, block_size, dataset.fim.pad, document_mask, seed)
        self.n_inputs = int(dataset.n_inputs.sum())

    @property
    def wasted(self) -> float:
        """The share of padding in the rows of an epoch."""
        return 1 - self.n_inputs / (self.n_rows * self.block_size)

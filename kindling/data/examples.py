"""Examples for fine-tuning: their files, and the rows that the model is trained on.

    examples = Examples(folder, "train")
    batches = ExampleRows(examples, block_size=1024, seed=0)
    batch = batches.rows(0, 8)  # targets are -100 where the next token is of a prompt or padding

The token shards of a split hold its examples one after the other. The table `SPLIT-segments.npy` has a row for each
exchange: the number of its example, the numbers of tokens of prompt and response, and the hashes of the two texts, which
the audit compares. The mask follows from these numbers alone (`conversations.Example`).

With packing, a row of the model holds as many whole examples as fit, with positions that keep them from seeing each other.
Without packing, it holds one example and padding. Padding is never the end-of-text token, and nothing attends to it.
"""

from __future__ import annotations

from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from config import Config, ModelConfig
from kindling.data.conversations import PROMPT, RESPONSE, Example
from kindling.data.packing import Item, PackedDataset, PackedRows, PieceDataset, PieceRows, pack
from kindling.data.prompts import rendered_template
from kindling.data.shards import DataError, PackedBlocks, ShardWriter, TokenDataset, read_manifest

WIDTHS = 4  # rows are padded to one of this many widths; code is compiled once for each
POOL = 50  # this many batches of examples are sorted by length together


class ExampleWriter(ShardWriter):
    """Collects the examples of one split and writes them."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype):
        super().__init__(folder, split, dtype)
        self._segments: list[np.ndarray] = []
        self.max_exchanges = 0  # the largest number of exchanges in an example

    def add_example(self, example: Example, language: str = "unknown", source: str = "unknown") -> None:
        """Append one example: its ids to the shards, its segments to their table."""
        numbers = np.full((len(example.segments), 1), self.info.documents, dtype=np.int64)
        self._segments.append(np.hstack((numbers, example.segments)))
        self.max_exchanges = max(self.max_exchanges, len(example.segments))
        self.add(example.ids, example.n_bytes, language, source)

    def close(self) -> None:
        """Write what is left, the table of documents and the table of segments."""
        super().close()
        self.info.segments = self._save("segments", np.concatenate([np.empty((0, 5), dtype=np.int64), *self._segments]))


class Examples(PackedDataset):
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
        """The number of conversations."""
        return self.info.documents

    @cached_property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each example, (N,)."""
        return np.diff(self._starts)

    @property
    def n_supervised(self) -> int:
        """The number of tokens of responses, end-of-text tokens included."""
        return int(self.segments[:, RESPONSE].sum())

    def segments_of(self, number: int) -> np.ndarray:
        """Return the segments of one conversation."""
        return self.segments[slice(*self._first_segment[number : number + 2])]

    def tokens_of(self, number: int) -> range:
        """Return the positions of the tokens of one conversation in the split."""
        return range(*self._starts[number : number + 2].tolist())

    def example(self, number: int) -> Example:
        """Return one conversation."""
        tokens = self.tokens_of(number)
        return Example(self.read(tokens.start, len(tokens)), self.segments_of(number))

    def item(self, number: int) -> Item:
        """Return the inputs and the targets of one conversation: a target is the next id, or IGNORE if that is of a prompt."""
        example = self.example(number)
        return example.ids[:-1], example.targets

    @property
    def n_targets(self) -> int:
        return self.n_supervised

    def _rows_in_order(self, cfg: ModelConfig, batch_size: int = 1) -> ExampleRows:
        return ExampleRows(self, cfg.block_size, 0, packing=cfg.backbone == "kindling", batch_size=batch_size)

    def targets_in_order(self, cfg: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
        numbers = np.array(list(chain.from_iterable(self._rows_in_order(cfg).bins)))
        supervised = np.add.reduceat(self.segments[:, RESPONSE], self._first_segment[:-1])  # (D,)
        return numbers, supervised[numbers]


def open_split(cfg: Config, folder: Path, split: str) -> TokenDataset:
    """Open one split of the data that `cfg` describes: conversations, documents, or documents in pieces."""
    if cfg.data.instructions:
        return Examples(folder, split)
    in_pieces = read_manifest(folder)["splits"].get(split, {}).get("pieces") is not None
    return PieceDataset(folder, split) if in_pieces else TokenDataset(folder, split)


def require_template(manifest: dict[str, Any], template: str) -> None:
    """Raise DataError if the examples of a manifest were made with another version of the template."""
    if manifest.get("template") != rendered_template(template):
        raise DataError(
            f"the examples of {manifest['fingerprint']} must have been made with the template {template} as it is in prompts.py, "
            f"but it was another then; take the change of the template back, or fine-tune anew with --fresh"
        )


class ExampleRows(PackedRows):
    """The training order of examples: each once an epoch, shuffled by (seed, epoch), addressed like PackedBlocks.

    With packing, the same examples share a row in every epoch; only the order of the rows changes. Without packing, a row
    is one example. The rows are shuffled, then within every POOL batches sorted so that rows of similar length share a
    batch.
    """

    def __init__(self, examples: Examples, block_size: int, seed: int, packing: bool = True, batch_size: int = 1):
        """`batch_size` matters only without packing: this many rows are padded to the same length."""
        self.examples, self.packing, self.batch_size = examples, packing, batch_size
        lengths = examples.lengths - 1  # the last token is a target only
        bins = pack(lengths, block_size) if packing else [[i] for i in range(len(lengths))]
        if not bins:
            raise DataError(f"the {examples.split} split must hold at least one example, but is empty; add examples")
        pad_id = 0 if examples.manifest["eos_id"] else 1
        super().__init__(examples, bins, block_size, pad_id, separate=packing, seed=seed)

    def _shuffle(self, epoch: int, rng: np.random.Generator) -> np.ndarray:
        order = rng.permutation(self.n_rows)
        if self.packing:
            return order
        lengths, pool = self.examples.lengths, POOL * self.batch_size
        pools = [order[i : i + pool] for i in range(0, len(order), pool)]
        order = np.concatenate([p[np.argsort(lengths[p], kind="stable")] for p in pools])
        begun = -epoch * self.n_rows % self.batch_size  # rows that complete the last batch of the epoch before
        stop = begun + max(0, len(order) - begun) // self.batch_size * self.batch_size
        batches = order[begun:stop].reshape(-1, self.batch_size)
        return np.concatenate((order[:begun], rng.permutation(batches).ravel(), order[stop:]))

    def width(self, bins: list[int]) -> int:
        """Return the width of a batch of these bins: without packing, that of the longest example, in a few steps."""
        if self.packing:
            return self.block_size
        unit = max(1, self.block_size // WIDTHS)
        longest = int(self.examples.lengths[[self.bins[b][0] for b in bins]].max()) - 1
        return min(self.block_size, -(-longest // unit) * unit)

    @property
    def wasted(self) -> float:
        """The share of padding in the rows of an epoch; without packing, in the batches of the first epoch."""
        filled = int((self.examples.lengths - 1).sum())
        if self.packing:
            return 1 - filled / (self.n_rows * self.block_size)
        places = 0
        order = self.order_of(0)
        for first in range(0, self.n_rows, self.batch_size):
            rows = order[first : first + self.batch_size]
            places += len(rows) * self.width(rows.tolist())
        return 1 - filled / places


def training_rows(cfg: Config, dataset: TokenDataset) -> PackedBlocks | PieceRows | ExampleRows:
    """Return the rows that a run of `cfg` trains on, in their order."""
    model, train = cfg.model, cfg.train
    if isinstance(dataset, Examples):
        return ExampleRows(dataset, model.block_size, train.seed, train.packing, train.batch_size)
    if isinstance(dataset, PieceDataset):
        return PieceRows(dataset, model.block_size, train.seed, model.document_mask)
    return PackedBlocks(dataset, model.block_size, train.seed, model.document_mask)

"""Token shards: the files between the data pipeline and training.

A data folder holds `train-00000.npy`, ... (flat little-endian token ids in NumPy's .npy format), the same for `val` and
`test`, `tokenizer.json`, `ledger.json`, and `manifest.json` with each shard's length, dtype and sha256. The folder is
written under another name and renamed when complete. Opening it checks every hash: damage is found before the first
step, and not as a strange loss. The manifest has a hash of its own content, because a changed number of tokens would
change the order of the data without an error.

`SPLIT-documents.npy` holds the length, language and source of each document, for figures by language and source. Training
does not read it. Folders built by old versions have none.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from config import IGNORE, ModelConfig
from kindling.errors import KindlingError
from kindling.files import checksum_matches, sha256_file, with_checksum, write_json

FORMAT = 1
SHARD_TOKENS = 2**23  # a writer holds this many in memory for each split
SPLITS = ("train", "val", "test")
TOKENS, BYTES, LANGUAGE, SOURCE = range(4)  # columns of the table of documents


class DataError(KindlingError):
    """Data cannot be read, built or used."""


class Batch(NamedTuple):
    """Rows to train on or to evaluate, all int64 (B, T)."""

    idx: np.ndarray
    targets: np.ndarray  # IGNORE where nothing is supervised
    position_ids: np.ndarray | None = None  # position in the document, to mask documents from each other; None: no mask

    def part(self, rows: slice) -> Batch:
        """Return some of the rows."""
        return Batch(self.idx[rows], self.targets[rows], None if self.position_ids is None else self.position_ids[rows])


def document_position_ids(idx: np.ndarray, eos_id: int) -> np.ndarray:
    """Return each token's position in its own document, (B, T) int64, of packed rows idx (B, T) int64.

    An end-of-text token has position 0 and belongs to the document after it. Generation from an empty prompt starts with
    this token, so in training, too, the first token of a document is predicted from it alone. The first token of a row has
    position 0 as well.
    """
    place = np.arange(idx.shape[1])  # (T,)
    return place - np.maximum.accumulate(np.where(idx == eos_id, place, 0), axis=1)  # (B, T)


@dataclass
class SplitInfo:
    """What the manifest says about one split. `bytes` counts UTF-8 source, for bits per byte; of examples, responses."""

    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    max_id: int = -1
    shards: list[dict[str, Any]] = field(default_factory=list)
    segments: dict[str, Any] | None = None  # only of examples: the file with the table of segments
    pieces: dict[str, Any] | None = None  # only with fill-in-the-middle: the file with the table of pieces
    table: dict[str, Any] | None = None  # the file with a row for each document; its languages and sources by number

    @property
    def files(self) -> list[str]:
        """The names of all its files."""
        return [entry["file"] for entry in (*self.shards, self.segments, self.pieces, self.table) if entry is not None]


class ShardWriter:
    """Collects the documents of one split and writes them as shards of at most SHARD_TOKENS tokens."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype):
        self.folder, self.split, self.dtype = folder, split, dtype
        self.info = SplitInfo()
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0
        self._documents = array("q")  # the table, row by row
        self._names: tuple[dict[str, int], dict[str, int]] = {}, {}  # languages and sources by number

    @property
    def position(self) -> int:
        """The position in the split at which the next document begins, in tokens."""
        return self.info.tokens + self._pending_tokens

    def add(self, ids: np.ndarray, n_bytes: int, language: str = "unknown", source: str = "unknown") -> None:
        """Append one document, with its end-of-text token. Raises DataError for ids that do not fit the dtype."""
        self.info.documents += 1
        self.info.bytes += n_bytes
        self.info.max_id = max(self.info.max_id, int(ids.max()))
        if self.info.max_id > np.iinfo(self.dtype).max:
            raise DataError(
                f"a token id must fit in {self.dtype}, but {self.info.max_id} does not; the tokenizer's vocab_size is wrong"
            )
        numbers = (known.setdefault(name, len(known)) for known, name in zip(self._names, (language, source)))
        self._documents.extend((len(ids), n_bytes, *numbers))
        self._pending.append(ids.astype(self.dtype))
        self._pending_tokens += len(ids)
        if self._pending_tokens >= SHARD_TOKENS:
            self.flush()

    def close(self) -> None:
        """Write what is left, and the table of documents."""
        self.flush()
        languages, sources = map(list, self._names)
        entry = self._save("documents", np.array(self._documents, dtype=np.int64).reshape(-1, 4))  # (D, 4)
        self.info.table = {**entry, "languages": languages, "sources": sources}

    def flush(self) -> None:
        """Write what is pending as the next shard."""
        if not self._pending_tokens:
            return
        tokens = np.concatenate(self._pending)
        self._pending, self._pending_tokens = [], 0
        entry = self._save(f"{len(self.info.shards):05d}", tokens)
        self.info.tokens += len(tokens)
        self.info.shards.append({"file": entry["file"], "tokens": len(tokens), "sha256": entry["sha256"]})

    def _save(self, name: str, array: np.ndarray) -> dict[str, Any]:
        """Write an array to SPLIT-NAME.npy; return its entry in the manifest."""
        path = self.folder / f"{self.split}-{name}.npy"
        np.save(path, array)
        return {"file": path.name, "sha256": sha256_file(path)}


def repair_advice(folder: Path, fingerprint: str = "") -> str:
    """Return the advice for a data folder that cannot be used."""
    if (folder.parent / "config.yaml").is_file():  # the copy in a run, which a build does not restore
        source = f"data/{fingerprint}" if fingerprint else "the folder under data/ that the run was trained on"
        return f"copy the files of the same names from {source}, or start the run over with --fresh"
    return f"delete {folder} and run again to rebuild it"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a data folder's manifest; raises DataError if it is missing, incomplete or changed."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(f"{path} must be readable JSON, but is not ({e}); {repair_advice(folder)}") from None
    keys = {"format", "fingerprint", "dtype", "tokenizer_sha256", "vocab_size", "eos_id", "splits"}
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not keys <= manifest.keys():
        raise DataError(f"{path} must be a whole manifest of format {FORMAT}, but is not; {repair_advice(folder)}")
    if not checksum_matches(manifest):
        raise DataError(f"{path} must be as it was written, but has changed; {repair_advice(folder)}")
    return manifest


class TokenDataset:
    """One split of a data folder, memory-mapped as one long sequence of token ids."""

    def __init__(self, folder: Path, split: str):
        """Open and verify every shard of the split; raises DataError that names the first damaged one."""
        self.folder, self.split = folder, split
        self.manifest = read_manifest(folder)
        try:
            self.info = SplitInfo(**self.manifest["splits"][split])
            self._maps = [self._open(shard) for shard in self.info.shards]
            self.documents = None if self.info.table is None else self._open_table(self.info.table)  # (D, 4)
        except (KeyError, TypeError) as e:
            raise DataError(
                f"{folder / 'manifest.json'} must list the shards of the {split} split, but does not ({e!r}); "
                f"{repair_advice(folder, self.manifest['fingerprint'])}"
            ) from None
        self._ends = np.cumsum([len(m) for m in self._maps], dtype=np.int64)

    def _open(self, shard: dict[str, Any]) -> np.ndarray:
        tokens = self._open_table(shard, "a whole token shard, but cannot be read")
        if tokens.dtype != self.manifest["dtype"] or tokens.shape != (shard["tokens"],):
            raise DataError(
                f"{self.folder / shard['file']} must hold {shard['tokens']} tokens of {self.manifest['dtype']}, but holds "
                f"{tokens.size} of {tokens.dtype}; {repair_advice(self.folder, self.manifest['fingerprint'])}"
            )
        return tokens

    def _open_table(self, entry: dict[str, Any], must: str = "a readable table, but is not") -> np.ndarray:
        """Open a file of the split; raises DataError if it is damaged, or as `must` says if it cannot be read."""
        path, advice = self.folder / entry["file"], repair_advice(self.folder, self.manifest["fingerprint"])
        try:
            if whole := sha256_file(path) == entry["sha256"]:  # the header is parsed only if the file is intact
                table = np.lib.format.open_memmap(path, mode="r")
        except (OSError, ValueError, EOFError) as e:  # ValueError: a pickle
            raise DataError(f"{path} must be {must} ({e}); {advice}") from None
        if not whole:
            raise DataError(f"{path} must have the sha256 of its manifest, but is damaged; {advice}")
        return table

    def __len__(self) -> int:
        return self.info.tokens

    def read(self, start: int, count: int) -> np.ndarray:
        """Return `count` token ids from position `start` as int64 (count,), across shards."""
        out = np.empty(count, dtype=np.int64)
        filled, shard = 0, int(np.searchsorted(self._ends, start, side="right"))
        while filled < count:
            base = 0 if shard == 0 else int(self._ends[shard - 1])
            piece = self._maps[shard][start + filled - base : start + count - base]
            out[filled : filled + len(piece)] = piece
            filled, shard = filled + len(piece), shard + 1
        return out

    @cached_property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each document, (D,): from the table, or without one from the end-of-text tokens."""
        if self.documents is not None:
            return self.documents[:, TOKENS]
        ends = [0, len(self)]
        for start in range(0, len(self), SHARD_TOKENS):
            ids = self.read(start, min(SHARD_TOKENS, len(self) - start))
            ends += (np.flatnonzero(ids == self.manifest["eos_id"]) + start + 1).tolist()
        return np.diff(np.unique(ends))

    @property
    def n_targets(self) -> int:
        """The number of supervised tokens in an evaluation of the whole split."""
        return max(0, len(self) - 1)

    def n_rows_in_order(self, cfg: ModelConfig) -> int:
        """Return the number of rows of `in_order`."""
        return len(row_starts(self.n_targets, cfg.block_size, cfg.block_size))

    def in_order(self, cfg: ModelConfig, batch_size: int, part: int | None = None) -> Iterator[Batch]:
        """Yield the split once, in the rows for evaluating a model of `cfg`: all, or `part` of them, evenly spaced."""
        return blocks_in_order(self, cfg.block_size, batch_size, cfg.document_mask, part=part)

    def targets_in_order(self, cfg: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
        """Return the documents in the order of `in_order`, and the number of supervised targets of each, (D,) int64 both."""
        counts = np.array(self.lengths)
        counts[:1] -= 1  # the first token of the split is not a target
        return np.arange(len(counts)), counts

    def require_fits(self, vocab_size: int, tokenizer_sha256: str) -> None:
        """Raise DataError unless these shards were made with that tokenizer and every id is below `vocab_size`."""
        if self.manifest["tokenizer_sha256"] != tokenizer_sha256:
            raise DataError(
                f"the shards of {self.folder} must be of the run's tokenizer, but are of another; "
                f"delete the folder and run again to rebuild it, or start over with --fresh"
            )
        if self.info.max_id >= vocab_size:
            raise DataError(
                f"every token id must be below model.vocab_size={vocab_size}, but {self.folder} holds {self.info.max_id}; "
                f"set --model.vocab-size to at least {self.manifest['vocab_size']}"
            )


class TrainingRows(Protocol):
    """Training rows, addressed by their position in the run: `PackedBlocks` and `ExampleRows`."""

    n_rows: int  # of an epoch

    @property
    def dataset(self) -> TokenDataset:
        """The split that the rows are cut from."""
        ...

    def rows(self, first: int, count: int) -> Batch:
        """Return the rows at positions first, first + 1, ..."""
        ...

    def tokens_of(self, position: int) -> list[range]:
        """Return which tokens of the split the row at a position is cut from."""
        ...


class ShuffledRows:
    """The row at each position of a run: every row once an epoch, in an order that depends on (seed, epoch) alone."""

    def __init__(self, n_rows: int, seed: int):
        self.n_rows, self.seed = n_rows, seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))  # the epoch of the last call

    def order_of(self, epoch: int) -> np.ndarray:
        """Return the numbers of the rows in their order in an epoch, (n_rows,)."""
        known = self._order  # read once: another thread may replace it
        if known[0] != epoch:
            known = self._order = epoch, self._shuffle(epoch, np.random.default_rng([self.seed, epoch]))
        return known[1]

    def row_at(self, position: int) -> int:
        """Return the number of the row at a position of the run."""
        epoch, place = divmod(position, self.n_rows)
        return int(self.order_of(epoch)[place])

    def _shuffle(self, epoch: int, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(self.n_rows)


class PackedBlocks(ShuffledRows):
    """The training order: blocks of `block_size` tokens without padding, each once an epoch, shuffled by (seed, epoch).

    One integer addresses a row: its position in the run. So the step alone decides the batch, and a resumed run sees
    exactly the rows that it would have seen.
    """

    def __init__(self, dataset: TokenDataset, block_size: int, seed: int, document_mask: bool = False):
        """With `document_mask` batches have positions, so that no document of a block sees another."""
        self.dataset, self.block_size, self.document_mask = dataset, block_size, document_mask
        super().__init__((len(dataset) - 1) // block_size, seed)  # the targets of a row end one token after it
        if self.n_rows < 1:
            raise DataError(
                f"the {dataset.split} split must hold at least one block of {block_size + 1} tokens, but holds "
                f"{len(dataset)}; add files, or lower --model.block-size"
            )

    def tokens_of(self, position: int) -> list[range]:
        """Return the tokens of the split in the row at a position; the last of them is only a target."""
        start = self.row_at(position) * self.block_size
        return [range(start, start + self.block_size + 1)]

    def rows(self, first: int, count: int) -> Batch:
        """Return the rows at positions first, first + 1, ..., each of block_size tokens."""
        tokens = [t for i in range(count) for t in self.tokens_of(first + i)]
        rows = np.stack([self.dataset.read(t.start, len(t)) for t in tokens])  # (B, T + 1)
        return packed(self.dataset, rows[:, :-1], rows[:, 1:], self.document_mask)


def packed(dataset: TokenDataset, idx: np.ndarray, targets: np.ndarray, document_mask: bool) -> Batch:
    """Return packed rows as a batch; with `document_mask`, with the positions in their documents."""
    return Batch(idx, targets, document_position_ids(idx, dataset.manifest["eos_id"]) if document_mask else None)


def rank_rows(position: int, batch_size: int, rank: int = 0, world_size: int = 1) -> range:
    """Return the positions of one rank's rows in the batch that begins at `position`; together the ranks cover the batch."""
    share = batch_size // world_size
    return range(position + rank * share, position + (rank + 1) * share)


def row_starts(n_targets: int, block_size: int, stride: int) -> range:
    """Return where rows begin, every `stride` tokens, so that each of `n_targets` tokens is a target once.

    The first row supervises all its targets. Each later row supervises its last `stride`, which the row before did not
    reach.
    """
    return range(0, max(n_targets - block_size, 0) + stride if n_targets > 0 else 0, stride)


def evenly_spaced(n: int, part: int | None) -> list[int]:
    """Return `part` of the numbers below n, evenly spaced; all of them for None, or if there are not more."""
    part = n if part is None else min(part, n)
    return [i * n // part for i in range(part)]


def blocks_in_order(
    dataset: TokenDataset,
    block_size: int,
    batch_size: int,
    document_mask: bool = False,
    stride: int | None = None,
    part: int | None = None,
) -> Iterator[Batch]:
    """Yield the whole split once, in rows of block_size tokens: every token but the first is a target once.

    With a `stride` below block_size the rows overlap: every target has at least block_size - stride + 1 tokens before it in its
    row, if the split has them. With `part`, only this many of the rows, evenly spaced. Every batch has `batch_size` rows, so
    that code is compiled for one shape. The rest of the last batch is id 0 with targets of -100.
    """
    stride = block_size if stride is None else stride
    every_start = row_starts(len(dataset) - 1, block_size, stride)
    starts = [every_start[i] for i in evenly_spaced(len(every_start), part)]
    for i in range(0, len(starts), batch_size):
        idx = np.zeros((batch_size, block_size), dtype=np.int64)
        targets = np.full_like(idx, IGNORE)
        for row, start in enumerate(starts[i : i + batch_size]):
            tokens = dataset.read(start, min(block_size + 1, len(dataset) - start))
            idx[row, : len(tokens) - 1] = tokens[:-1]
            targets[row, : len(tokens) - 1] = tokens[1:]
            targets[row, : block_size - stride if start else 0] = IGNORE  # the row before supervises them
        yield packed(dataset, idx, targets, document_mask)


def write_manifest(folder: Path, **content: Any) -> None:
    """Write the manifest, the last file of a data folder; `splits` maps names to SplitInfo."""
    content["splits"] = {name: asdict(info) for name, info in content["splits"].items()}
    write_json(folder / "manifest.json", with_checksum({"format": FORMAT, **content}))


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the type that stores token ids: two bytes if they suffice, else four."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")

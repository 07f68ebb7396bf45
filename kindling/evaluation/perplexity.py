"""Measures how well a model predicts text: loss, perplexity and bits per byte, for each document.

    losses = document_losses(model, run.heldout("val"), runtime)
    losses.summary()["bits_per_byte"], losses.by_language()["python"]["perplexity"]
    text_losses(model, run.tokenizer(), Path("book.txt"), runtime).summary()

A held-out split is predicted in the same rows as in `validation.validate`, and the total is the same figure. Rows cut
documents, so the first tokens of a row have little context. With a `stride` below the context length, rows overlap: each token
is predicted from at least context - stride tokens, where the document has as many. It costs context / stride times the
computation.

Bits per byte are the loss of all supervised tokens, including end-of-text, over the UTF-8 bytes of the documents (of
conversations: of the responses). So they can be compared across tokenizers. Loss and perplexity are per token and cannot.

Limit: each text is in memory as a whole.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from config import IGNORE, ModelConfig, SourceConfig
from kindling.data.conversations import REWRITTEN
from kindling.data.examples import Examples
from kindling.data.shards import BYTES, LANGUAGE, SOURCE, Batch, DataError, TokenDataset, blocks_in_order, row_starts
from kindling.data.sources import Document, LocalFile, documents, language_of
from kindling.device import Runtime
from kindling.errors import TokenizerError, one_line, require
from kindling.json_rows import DAMAGE, is_rows, open_text
from kindling.loss import linear_nll
from kindling.paths import expand_home
from kindling.tokenization.tokenizer import Tokenizer
from model import LanguageModel

BATCH_ROWS = 16  # predicted at a time
POOL = 32  # batches of texts whose rows are sorted by length at a time
PROBED_ROWS = 100  # the first rows of a file, in which the column of the text is searched
BOM = "\ufeff"

Progress = Callable[[int], object]  # is called with the number of tokens that were predicted since the last call
Summary = dict[str, float | int | None]


@dataclass(frozen=True)
class Losses:
    """The loss of each document, as arrays (D,): `nll` in nats, float64; `tokens` the number of supervised tokens.

    The documents' bytes, languages and sources are None for an old split without a table of documents. `notes` counts the
    documents that were left out or changed.
    """

    nll: np.ndarray
    tokens: np.ndarray
    total_bytes: int
    bytes: np.ndarray | None = None
    languages: np.ndarray | None = None
    sources: np.ndarray | None = None
    notes: Counter[str] = field(default_factory=Counter)

    def summary(self, mask: np.ndarray | None = None) -> Summary:
        """Return loss (nats per token), perplexity, bits per byte, tokens, bytes and documents: of all, or of `mask` (D,) bool.

        A figure is None if it is not known or would be a division by zero.
        """
        chosen = slice(None) if mask is None else mask
        nll, tokens = float(self.nll[chosen].sum()), int(self.tokens[chosen].sum())
        n_bytes = self.total_bytes if mask is None else None if self.bytes is None else int(self.bytes[chosen].sum())
        loss = nll / tokens if tokens else None
        return {
            "loss": loss,
            "perplexity": None if loss is None else math.exp(min(loss, 700.0)),
            "bits_per_byte": nll / math.log(2) / n_bytes if n_bytes else None,
            "tokens": tokens,
            "bytes": n_bytes,
            "documents": len(self.nll[chosen]),
        }

    def by_language(self) -> dict[str, Summary]:
        """Return the summary of each language, the one with the most tokens first; empty if languages are not known."""
        return self._by(self.languages)

    def by_source(self) -> dict[str, Summary]:
        """Return the summary of each source, the one with the most tokens first; empty if sources are not known."""
        return self._by(self.sources)

    def by_group(self) -> dict[str, Any]:
        """Return the summaries of all documents, of each language and of each source, as in eval.json."""
        return {"all": self.summary(), "by_language": self.by_language(), "by_source": self.by_source()}

    def lines(self) -> list[dict[str, Any]]:
        """Return the loss of each document as a line of losses.jsonl; empty for an old split without a table of documents."""
        if self.bytes is None or self.languages is None or self.sources is None:
            return []
        columns = (self.languages, self.sources, self.tokens, self.bytes, self.nll)
        names = ("language", "source", "tokens", "bytes", "nll")
        rows = zip(*(column.tolist() for column in columns))
        return [{"document": i, **dict(zip(names, row))} for i, row in enumerate(rows)]

    def of_text(self) -> dict[str, Any]:
        """Return the figures of a text, as in eval.json. `losses` are number, bytes and nll of each document."""
        pairs = [] if self.bytes is None else zip(self.bytes.tolist(), self.nll.tolist())
        lines = [[number, *pair] for number, pair in enumerate(pairs)]
        return {"all": self.summary(), "by_language": self.by_language(), "notes": dict(self.notes), "losses": lines}

    def _by(self, names: np.ndarray | None) -> dict[str, Summary]:
        if names is None:
            return {}
        found = {name: self.summary(names == name) for name in sorted(set(names))}
        return dict(sorted(found.items(), key=lambda item: -(item[1]["tokens"] or 0)))


@contextmanager
def _evaluating(model: LanguageModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def token_losses(model: LanguageModel, batch: Batch, runtime: Runtime) -> np.ndarray:
    """Return the loss in nats of each supervised token in a batch, row by row, (n,) float64."""
    idx, targets = (torch.from_numpy(rows).to(runtime.device) for rows in (batch.idx, batch.targets))  # (B, T)
    position_ids = (
        None if batch.position_ids is None else torch.from_numpy(batch.position_ids).to(runtime.device)
    )  # (B, T)
    supervised = targets != IGNORE  # (B, T)
    with runtime.autocast():
        x = model.hidden(idx, position_ids)[supervised]  # (n, C)
        nll = linear_nll(x, model.head.weight, model.head.bias, targets[supervised])  # (n,)
    return nll.cpu().numpy().astype(np.float64)


def _require_stride(stride: int | None, cfg: ModelConfig) -> None:
    must = f"at least 1 and below the model's context of {cfg.block_size} tokens"
    require(stride is None or 1 <= stride < cfg.block_size, "eval.stride", must, stride, "choose one, or leave it out")


def document_losses(
    model: LanguageModel,
    dataset: TokenDataset,
    runtime: Runtime,
    stride: int | None = None,
    batch_size: int = BATCH_ROWS,
    progress: Progress | None = None,
) -> Losses:
    """Return the losses of a split, where the first token is no target; for conversations, those of the responses.

    Several ranks share the batches, and each returns all losses. `progress` is called after each batch.

    `stride` as above. Raises ConfigError for an impossible stride, and for any stride with conversations, as each of them has
    its whole context.
    """
    cfg = model.cfg
    _require_stride(stride, cfg)
    of_examples = isinstance(dataset, Examples)
    must = "None for conversations, each of which is predicted from its whole context"
    require(stride is None or not of_examples, "eval.stride", must, stride, "leave it out")
    batches = dataset.in_order(cfg, batch_size)
    if stride is not None:
        batches = blocks_in_order(dataset, cfg.block_size, batch_size, cfg.document_mask, stride)
    numbers, counts = dataset.targets_in_order(cfg)
    tokens = np.bincount(numbers, counts).astype(np.int64)  # a document may be in several pieces
    nll = np.zeros(len(tokens))
    ends, done, world = counts.cumsum(), 0, runtime.world
    with _evaluating(model):
        for i, batch in enumerate(batches):
            n = int((batch.targets != IGNORE).sum())
            if i % world.size == world.rank:
                losses = token_losses(model, batch, runtime)
                places = np.searchsorted(ends, np.arange(done, done + n), side="right")
                np.add.at(nll, numbers[places], losses)
            done += n
            if progress is not None:
                progress(n)
    nll = np.array(world.sum(nll.tolist()))
    table, info = dataset.documents, dataset.info
    if table is None or info.table is None:
        return Losses(nll, tokens, info.bytes)
    languages, sources = (np.array(info.table[names], dtype=object) for names in ("languages", "sources"))
    return Losses(nll, tokens, info.bytes, table[:, BYTES], languages[table[:, LANGUAGE]], sources[table[:, SOURCE]])


# -- any text ---------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A part of a text to predict: its document, its tokens (n,), and how many tokens at its end are targets."""

    document: int
    tokens: np.ndarray
    n_targets: int


class _Texts:
    """Reads the documents of one file one by one, and keeps counts of those that were read so far."""

    def __init__(self, path: Path, field: str, tokenizer: Tokenizer):
        self.path, self.tokenizer = path, tokenizer
        self.rows = is_rows(path)
        self.field = self._column(field) if self.rows else field
        self.notes: Counter[str] = Counter()
        self.examples: dict[str, str] = {}  # of documents that are left out, by the rule
        self.tokens: list[int] = []
        self.bytes: list[int] = []
        self.languages: list[str] = []

    def _column(self, field: str) -> str:
        """Return the first of `field`, "content" and "text" that has a text in one of the file's first rows."""
        for name in dict.fromkeys((field, "content", "text")):
            if any(d.text is not None for d in islice(self._documents(name), PROBED_ROWS)):
                if name != field:
                    print(f"note: {self.path} has no column {field!r}: the text is {name!r}", file=sys.stderr)
                return name
        return field

    def _documents(self, field: str) -> Iterator[Document]:
        path = self.path
        source = SourceConfig(kind="jsonl" if self.rows else "text", path=str(path), field=field)
        if self.rows:
            stat = path.stat()
            yield from documents(source, [LocalFile(path.name, path, stat.st_size, stat.st_mtime_ns)])
            return
        try:  # read it here, as a source of texts would strip newlines at both ends
            with open_text(path) as f:
                yield Document(path.name, language_of(source, path), text=f.read())
        except DAMAGE as e:
            yield Document(path.name, "", unreadable=one_line(e))

    def _leave_out(self, document: Document, rule: str, why: str) -> None:
        self.notes[rule] += 1
        self.examples.setdefault(rule, f"{document.key}: {why}")

    def left_out(self) -> str:
        """Return how many documents were left out and why, with an example for each rule."""
        return ", ".join(f"{rule} {self.notes[rule]:,} (such as {said})" for rule, said in self.examples.items())

    def encoded(self) -> Iterator[np.ndarray]:
        """Yield the tokens of each document, between the tokens that enclose it in training, (n,) int64."""
        start = self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id
        for document in self._documents(self.field):
            if document.text is None:
                self._leave_out(document, "unreadable", document.unreadable or "no text")
                continue
            text = document.text.removeprefix(BOM)
            try:
                n_bytes = len(text.encode("utf-8"))
                ids = self.tokenizer.encode(text)
            except UnicodeEncodeError as e:
                self._leave_out(document, "not UTF-8", f"character {e.start:,}")
            except TokenizerError as e:
                self._leave_out(document, e.rule, e.reason)
            else:
                if not ids:
                    self._leave_out(document, "empty", "no characters")
                    continue
                if self.tokenizer.may_rewrite and self.tokenizer.rewritten(text, ids) is not None:
                    self.notes[REWRITTEN] += 1
                if len(text) < len(document.text):
                    self.notes["byte-order mark cut off"] += 1
                self.tokens.append(len(ids) + 1)
                self.bytes.append(n_bytes)
                self.languages.append(document.language)
                yield np.array([start, *ids, self.tokenizer.eos_id], dtype=np.int64)


def _rows(texts: _Texts, block_size: int, stride: int) -> Iterator[Row]:
    """Yield rows in which each token of each document is a target exactly once."""
    for number, tokens in enumerate(texts.encoded()):
        for start in row_starts(len(tokens) - 1, block_size, stride):
            part = tokens[start : start + block_size + 1]
            yield Row(number, part, len(part) - 1 - (block_size - stride if start else 0))


def _padded(rows: list[Row]) -> Batch:
    """Return rows as a batch as wide as the longest row. Padding is at the end, where no token attends to it."""
    idx = np.zeros((len(rows), max(len(row.tokens) for row in rows) - 1), dtype=np.int64)
    targets = np.full_like(idx, IGNORE)
    for i, (_, tokens, n_targets) in enumerate(rows):
        stop = len(tokens) - 1
        idx[i, :stop], targets[i, stop - n_targets : stop] = tokens[:-1], tokens[len(tokens) - n_targets :]
    return Batch(idx, targets)


def row_losses(
    model: LanguageModel, rows: Iterator[Row], runtime: Runtime, batch_size: int, progress: Progress | None = None
) -> list[tuple[int, float]]:
    """Return each row's document and the loss of its targets in nats. Rows of similar length are predicted together.

    `progress` is called after each batch.
    """
    found = []
    with _evaluating(model):
        while pool := sorted(islice(rows, POOL * batch_size), key=lambda row: len(row.tokens)):
            for i in range(0, len(pool), batch_size):
                batch = pool[i : i + batch_size]
                losses = token_losses(model, _padded(batch), runtime)
                edges = np.cumsum([0, *(row.n_targets for row in batch)])
                parts = zip(batch, edges, edges[1:])
                found += [(row.document, float(losses[start:stop].sum())) for row, start, stop in parts]
                if progress is not None:
                    progress(len(losses))
    return found


def text_losses(
    model: LanguageModel,
    tokenizer: Tokenizer,
    path: Path,
    runtime: Runtime,
    field: str = "text",
    stride: int | None = None,
    batch_size: int = BATCH_ROWS,
    progress: Progress | None = None,
) -> Losses:
    """Return the losses of a file. In .jsonl and .json (.gz too), each row is a document; any other file is one document.

    A row's text is in `field`, else in `content` or `text`; its language is in `language` or `lang`. Each document is
    predicted alone, after the token that begins documents in training (or end-of-text if there is none). The end-of-text token
    after it is predicted too. `progress` is called after each batch. Raises DataError if the file has no text, ConfigError for
    an impossible stride.
    """
    path = expand_home(path, "the text to predict")
    _require_stride(stride, model.cfg)
    if not path.is_file():
        raise DataError(f"the text to predict must be a file that exists, but {str(path)!r} is not; check the path")
    texts = _Texts(path, field, tokenizer)
    rows = _rows(texts, model.cfg.block_size, model.cfg.block_size if stride is None else stride)
    found = row_losses(model, rows, runtime, batch_size, progress)
    nll = [0.0] * len(texts.tokens)
    for document, loss in found:
        nll[document] += loss
    why = texts.left_out()
    if nll and why:
        print(f"warning: of {path} are left out: {why}", file=sys.stderr)
    if not nll:
        raise DataError(
            f"{path} must hold a text to predict, but holds none ({why or 'it is empty'}); check the file"
            + (f" and the column {field!r}" if texts.rows else "")
        )
    n_bytes = np.array(texts.bytes)
    languages, sources = np.array(texts.languages, dtype=object), np.array([path.name] * len(nll), dtype=object)
    return Losses(
        np.array(nll), np.array(texts.tokens), int(n_bytes.sum()), n_bytes, languages, sources, notes=texts.notes
    )

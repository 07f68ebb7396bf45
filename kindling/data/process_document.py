"""Processes one document: reads it, applies the filters, computes hashes, and tokenises it.

    process = DocumentProcessor(cfg.data, benchmarks, tokenizer, context=cfg.model.block_size)
    processed = process(document)          # processed.drop says why it is dropped; else processed.ids holds its token ids

The result depends on the document, the settings and the tokenizer alone. This runs in the worker processes of workers.py,
because a document can crash or hang it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from itertools import chain

import numpy as np

from config import DataConfig
from kindling.data.conversations import (
    REWRITTEN,
    Example,
    conversation_text,
    encode_conversation,
    normalize_exchanges,
    refusal,
)
from kindling.data.decontamination import Benchmarks
from kindling.data.docstrings import Pair, mine_pairs
from kindling.data.duplicates import signature, word_hashes
from kindling.data.filters import COMPILE_BYTES, Drop, first_failed_filter, strip_header
from kindling.data.infilling import Pieces, Shares, cut_document
from kindling.data.prompts import Exchange
from kindling.data.sources import Document
from kindling.errors import TokenizerError, one_line
from kindling.json_rows import n_bytes_of
from kindling.tokenization.tokenizer import Tokenizer

_NO_WORDS = np.empty(0, dtype=np.uint64)


def split_of(digest: bytes, cfg: DataConfig) -> str:
    """Return the split of a document. It follows from a hash of the content, so other documents cannot change it."""
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < cfg.val_fraction:
        return "val"
    return "test" if place < cfg.val_fraction + cfg.test_fraction else "train"


@dataclasses.dataclass
class ProcessedDocument:
    """A processed document. `drop` says which filter dropped it and why; else `ids` is set, or `text` without a tokenizer.

    `size` is the number of bytes read. `changes` names what was cut off or is unusual, with the number of bytes cut.
    """

    key: str
    language: str
    size: int
    drop: Drop | None = None
    changes: tuple[tuple[str, int], ...] = ()
    digest: bytes = b""
    group: bytes = b""  # documents of one group go into the same split; without a group, the digest decides
    signature: bytes = b""
    text: str | None = None
    ids: np.ndarray | None = None
    example: Example | None = None  # of a conversation; `ids` are its ids
    pieces: Pieces | None = None  # with fill-in-the-middle: of training, `ids` are its ids; held out, `ids` are whole
    broken: str | None = None  # why the stream broke off here


class DocumentProcessor:
    """Processes documents, one at a time; the result depends on the document, the settings and the tokenizer alone."""

    def __init__(
        self,
        cfg: DataConfig,
        benchmarks: Benchmarks | None = None,
        tokenizer: Tokenizer | None = None,
        context: int = 0,
    ):
        """`context` is the model's block size in tokens; an example of fine-tuning and a piece must fit into it."""
        self.cfg, self.benchmarks, self.tokenizer, self.context = cfg, benchmarks, tokenizer, context

    def all_of(self, document: Document) -> list[ProcessedDocument]:
        """Process a document with `_examine_text` or `_examine_conversation`; return one result.

        A file with docstrings to mine gives one for each example in it.
        """
        if not document.mined or document.path is None:
            return [self(document)]
        try:
            raw = document.path.read_bytes()
        except OSError as e:
            return [_dropped(document, "unreadable", e.strerror or type(e).__name__)]
        if len(raw) > COMPILE_BYTES:
            return [_dropped(document, "too large to parse", f"{len(raw):,} bytes, above {COMPILE_BYTES:,}")]
        try:
            pairs = mine_pairs(raw.decode("utf-8"))
        except (SyntaxError, ValueError, RecursionError) as e:  # bytes that are not UTF-8 are a ValueError too
            return [_dropped(document, "file is no Python", one_line(e))]
        mined = [self(_conversation_from(document, pair)) for pair in pairs]
        group = hashlib.sha256(raw).digest()[:16]
        for processed in mined:
            processed.group = group
        return mined or [_dropped(document, "undocumented file", "")]

    def __call__(self, document: Document) -> ProcessedDocument:
        """Process a document that is a text or a conversation."""
        out = ProcessedDocument(document.key, document.language, document.size)
        examine = self._examine_conversation if document.exchanges else self._examine_text
        out.drop = examine(document, out)
        if document.broken:
            out.broken = document.unreadable
        return out

    def _examine_text(self, document: Document, out: ProcessedDocument) -> Drop | None:
        """Process a text: fill in `out`, and return why the document is dropped, or None."""
        text = self._read(document, out)
        if isinstance(text, Drop):
            return text
        try:
            content = text.encode("utf-8")
        except UnicodeEncodeError as e:
            return Drop("not UTF-8", f"{e.reason} at character {e.start:,}")
        text, content, out.changes = self._changed(text, content, document)
        if drop := first_failed_filter(text, document.inner, document.language, self.cfg):
            return drop
        if drop := self._marked(text, content, out):
            return drop
        if self.tokenizer is None:
            out.text = text
            return None
        try:
            out.ids = self._encode(text, self.tokenizer, out)
            if self.cfg.fim_rate:
                self._cut(out, out.ids.tolist(), self.tokenizer)
        except TokenizerError as e:
            return Drop(e.rule, e.reason)
        return None

    def _encode(self, text: str, tokenizer: Tokenizer, out: ProcessedDocument) -> np.ndarray:
        """Return the ids of a document, between the tokens that enclose it, (N,); note in `out` if they are of another text."""
        ids, bos, eos = tokenizer.encode(text), tokenizer.bos_id, tokenizer.eos_id
        if tokenizer.may_rewrite and tokenizer.rewritten(text, ids) is not None:
            out.changes += ((REWRITTEN, 0),)
        return np.fromiter(chain([] if bos is None else [bos], ids, [eos]), np.uint32, len(ids) + 1 + (bos is not None))

    def _cut(self, out: ProcessedDocument, ids: list[int], tokenizer: Tokenizer) -> None:
        """Cut a document to pieces: in training `fim_rate` of them are filled in, held out all of them."""
        train = split_of(out.group or out.digest, self.cfg) == "train"
        # held out, all runs have the same pieces, wherever they cut in training
        rate, line_share = (self.cfg.fim_rate, self.cfg.fim_line_share) if train else (1.0, 0.0)
        shares = Shares(rate, self.cfg.fim_spm_share, line_share)
        out.pieces = cut_document(ids, tokenizer, shares, self.context, out.digest)
        if train:
            out.ids = out.pieces.ids

    def _read(self, document: Document, out: ProcessedDocument) -> str | Drop:
        """Return the text of a document, from its file if it has one, or why it cannot be read."""
        if document.path is None:
            return Drop("unreadable", document.unreadable or "no text") if document.text is None else document.text
        if document.size > 4 * self.cfg.max_chars:
            # a character has at most 4 bytes, so the file is too long: no need to read it
            wanted = f"{self.cfg.min_chars:,} to {self.cfg.max_chars:,} characters"
            return Drop("characters", f"{document.size:,} bytes, not {wanted}")
        try:
            raw = document.path.read_bytes()
        except OSError as e:
            return Drop("unreadable", e.strerror or type(e).__name__)
        out.size = len(raw)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as e:
            return Drop("not UTF-8", f"{e.reason} at byte {e.start:,}")

    def _changed(self, text: str, content: bytes, document: Document) -> tuple[str, bytes, tuple[tuple[str, int], ...]]:
        """Cut off the byte-order mark and a long header. Returns the text, its UTF-8 bytes, and `ProcessedDocument.changes`."""
        changes = [("newlines around it cut off", document.trimmed)] if document.trimmed else []
        if text.startswith("\ufeff"):
            text, content = text[1:], content[3:]
            changes.append(("byte-order mark cut off", 3))
        if self.cfg.max_header_lines is not None:
            body = strip_header(text, document.language, self.cfg.max_header_lines)
            if len(body) < len(text):
                shorter = body.encode("utf-8")
                changes.append(("long header cut off", len(content) - len(shorter)))
                text, content = body, shorter
        if "\r\n" in text:
            changes.append(("CRLF line ends, kept", 0))
        return text, content, tuple(changes)

    def _examine_conversation(self, document: Document, out: ProcessedDocument) -> Drop | None:
        """Process a conversation: fill in `out`, and return why the document is dropped, or None."""
        assert self.tokenizer is not None, "examples are made with the tokenizer of the run that is fine-tuned"
        exchanges = normalize_exchanges(document.exchanges, self.tokenizer)
        text = conversation_text(exchanges)
        try:
            content = text.encode("utf-8")
        except UnicodeEncodeError as e:
            return Drop("not UTF-8", f"{e.reason} at character {e.start:,}")
        # without a language, because a conversation need not be code
        drop = refusal(exchanges, self.cfg, self.tokenizer) or first_failed_filter(text, document.inner, "", self.cfg)
        if drop := drop or self._marked(text, content, out):
            return drop
        example = encode_conversation(exchanges, self.cfg, self.tokenizer, self.context)
        if isinstance(example, Drop):
            return example
        # it knows the lengths of its prompts and responses; `ExampleWriter` stores them, `ExampleRows` makes rows with `targets`
        out.example, out.ids, out.changes = example, example.ids, example.changes
        if exchanges != document.exchanges and (REWRITTEN, 0) not in out.changes:
            out.changes += ((REWRITTEN, 0),)
        return None

    def _marked(self, text: str, content: bytes, out: ProcessedDocument) -> Drop | None:
        """Compute the hashes for deduplication; return a Drop if the text contains a problem of a benchmark."""
        wanted = self.benchmarks is not None or self.cfg.near_dedup is not None
        words = word_hashes(text) if wanted else _NO_WORDS
        if self.benchmarks is not None and (found := self.benchmarks.find(text, words)):
            return Drop("benchmark", found)
        out.digest = hashlib.sha256(content).digest()[:16]
        if self.cfg.near_dedup is not None:
            out.signature = signature(words)
        return None


def _dropped(document: Document, rule: str, value: str) -> ProcessedDocument:
    return ProcessedDocument(document.key, document.language, document.size, Drop(rule, value))


def _conversation_from(document: Document, pair: Pair) -> Document:
    """Return a document of its own for a conversation that was mined from a file."""
    exchange = Exchange(pair.instruction, pair.response)
    size = n_bytes_of(f"{pair.instruction}{pair.response}")
    key = f"{document.key}:{pair.name}"
    return Document(key, document.language, size=size, inner=document.inner, exchanges=(exchange,))

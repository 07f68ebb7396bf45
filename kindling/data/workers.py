"""Worker processes that filter and tokenise documents, and survive what the documents do to them.

A document that kills its process, or hangs it, is dropped, and only that one. Results come back in the order of the
stream, whatever the number of workers. What needs no other document is done here: reading, filters, hashes, tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import hashlib
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from config import DataConfig, TokenizerConfig
from kindling.data.conversations import example_of, joined, normalized, refusal
from kindling.data.docstrings import pairs_of
from kindling.data.duplicates import Benchmarks, signature, word_hashes
from kindling.data.filters import COMPILE_BYTES, Drop, first_refusal, strip_header
from kindling.data.prompts import Exchange
from kindling.data.shards import DataError
from kindling.data.sources import Document
from kindling.errors import one_line
from kindling.pool import sigint_blocked
from kindling.tokenization.tokenizer import Tokenizer, TokenizerError, load_json

DOCUMENT_LIMIT_S = 10  # a worker that spends longer on one document is killed, and the document dropped
WORKER_MEMORY_BYTES = 2**30  # on top of what a worker starts with
BATCH_BYTES, BATCH_DOCUMENTS = 2**19, 64
_NO_WORDS = np.empty(0, dtype=np.uint64)


@dataclasses.dataclass
class Examined:
    """A worker's answer. `drop` says which filter dropped the document and why; else `ids` (or `text`) is set.

    `size` is what was read, in bytes; `changes` says what was cut off or found odd in it, with the bytes cut.
    """

    key: str
    language: str
    size: int
    drop: Drop | None = None
    changes: tuple[tuple[str, int], ...] = ()
    digest: bytes = b""
    group: bytes = b""  # documents with the same one go into the same split; without one, the digest decides
    signature: bytes = b""
    text: str | None = None
    ids: np.ndarray | None = None
    segments: np.ndarray | None = None  # of a conversation, as in conversations.EncodedExample
    supervised_bytes: int = 0
    broken: str | None = None  # a stream ended here that should have gone on


_worker: dict[str, Any] = {}  # a worker process's own settings


def _start_worker(cfg: DataConfig, benchmarks: Benchmarks | None, context: int, tokenizer_cfg: TokenizerConfig) -> None:
    import multiprocessing
    import threading

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()
    assert parent is not None
    # a parent that was killed leaves no orphans
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import rensa  # noqa: F401  before the limit, which is on top of what the libraries take
    import tokenizers  # noqa: F401

    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no resource, macOS no statm
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + WORKER_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sink = open(os.devnull, "w", encoding="utf-8")
    _worker.update(
        examiner=Examiner(cfg, benchmarks, context=context), tokenizer_cfg=tokenizer_cfg, tokenizer_file=None, sink=sink
    )


def _examine_batch(batch: list[Document], tokenizer_file: Path | None) -> list[Examined]:
    if tokenizer_file != _worker["tokenizer_file"]:
        tokenizer = None if tokenizer_file is None else load_json(tokenizer_file, _worker["tokenizer_cfg"])
        _worker["examiner"].tokenizer, _worker["tokenizer_file"] = tokenizer, tokenizer_file
    examined = []
    for document in batch:
        # ends this process if the document hangs in C code, where no Python signal handler would run
        faulthandler.dump_traceback_later(DOCUMENT_LIMIT_S, exit=True, file=_worker["sink"])
        try:
            examined += _worker["examiner"].all_of(document)
        except MemoryError:
            drop = Drop("memory", f"more than {WORKER_MEMORY_BYTES:,} bytes")
            examined.append(Examined(document.key, document.language, document.size, drop))
        except BaseException as e:  # whatever a document does to a library, a panic of Rust included, costs it alone
            drop = Drop("unexpected", one_line(e))
            examined.append(Examined(document.key, document.language, document.size, drop))
        finally:
            faulthandler.cancel_dump_traceback_later()
    return examined


class Examiner:
    """What is done with one document: a pure function of the document, the settings and the tokenizer."""

    def __init__(
        self,
        cfg: DataConfig,
        benchmarks: Benchmarks | None = None,
        tokenizer: Tokenizer | None = None,
        context: int = 0,
    ):
        """`context` is the model's, in tokens, which an example of fine-tuning must fit in."""
        self.cfg, self.benchmarks, self.tokenizer, self.context = cfg, benchmarks, tokenizer, context

    def all_of(self, document: Document) -> list[Examined]:
        """Return what came of a document: one answer, or of a file that is mined for examples one for each of these."""
        if not document.mined or document.path is None:
            return [self(document)]
        none = Examined(document.key, document.language, document.size)
        try:
            raw = document.path.read_bytes()
            if len(raw) > COMPILE_BYTES:
                none.drop = Drop("too large to parse", f"{len(raw):,} bytes, above {COMPILE_BYTES:,}")
                return [none]
            pairs = pairs_of(raw.decode("utf-8"))
        except OSError as e:
            none.drop = Drop("unreadable", e.strerror or type(e).__name__)
        except (SyntaxError, ValueError, RecursionError) as e:  # bytes that are no UTF-8 are a ValueError too
            none.drop = Drop("file is no Python", one_line(e))
        if none.drop is not None:
            return [none]
        none.drop, group = Drop("undocumented file", ""), hashlib.sha256(raw).digest()[:16]
        out = []
        for pair in pairs:
            exchange = Exchange(pair.instruction, pair.response)
            size = len(f"{pair.instruction}{pair.response}".encode())
            key = f"{document.key}:{pair.name}"
            examined = self(Document(key, document.language, size=size, inner=document.inner, exchanges=(exchange,)))
            examined.group = group
            out.append(examined)
        return out or [none]

    def __call__(self, document: Document) -> Examined:
        out = Examined(document.key, document.language, document.size)
        out.drop = self._examine(document, out)
        if document.broken:
            out.broken = document.unreadable
        return out

    def _examine(self, document: Document, out: Examined) -> Drop | None:
        """Fill in `out`; return why the document is dropped, or None."""
        cfg, raw = self.cfg, b""
        if document.exchanges:
            return self._examine_conversation(document, out)
        if document.path is not None:
            if document.size > 4 * cfg.max_chars:
                # a character is at most 4 bytes: too long, known without reading gigabytes
                return Drop(
                    "characters", f"{document.size:,} bytes, not {cfg.min_chars:,} to {cfg.max_chars:,} characters"
                )
            try:
                raw = document.path.read_bytes()
            except OSError as e:
                return Drop("unreadable", e.strerror or type(e).__name__)
            out.size = len(raw)
        elif document.text is None:
            return Drop("unreadable", document.unreadable or "no text")
        try:
            text = raw.decode("utf-8") if document.text is None else document.text
            content = text.encode("utf-8")
        except UnicodeError as e:
            return Drop(
                "not UTF-8", f"{e.reason} at {'character' if isinstance(e, UnicodeEncodeError) else 'byte'} {e.start:,}"
            )
        text, content, out.changes = self._changed(text, content, document)
        if drop := first_refusal(text, document.inner, document.language, cfg):
            return drop
        if drop := self._marked(text, content, out):
            return drop
        if self.tokenizer is None:
            out.text = text
            return None
        try:
            ids = self.tokenizer.encode(text)
        except TokenizerError as e:
            return Drop("not in the vocabulary", str(e).split(";")[0])
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        out.ids = np.fromiter(
            chain([] if bos is None else [bos], ids, [eos]), np.uint32, len(ids) + 1 + (bos is not None)
        )
        return None

    def _marked(self, text: str, content: bytes, out: Examined) -> Drop | None:
        """Fill in by what a duplicate is known; return why a text that a benchmark holds is dropped."""
        wanted = self.benchmarks is not None or self.cfg.near_dedup is not None
        words = word_hashes(text) if wanted else _NO_WORDS
        if self.benchmarks is not None and (found := self.benchmarks.find(text, words)):
            return Drop("benchmark", found)
        out.digest = hashlib.sha256(content).digest()[:16]
        if self.cfg.near_dedup is not None:
            out.signature = signature(words)
        return None

    def _examine_conversation(self, document: Document, out: Examined) -> Drop | None:
        """Fill in `out` for a document of exchanges; return why it is dropped, or None."""
        assert self.tokenizer is not None, "examples are made with the tokenizer of the run that is fine-tuned"
        exchanges = normalized(document.exchanges, self.tokenizer)
        text = joined(exchanges)
        try:
            content = text.encode("utf-8")
        except UnicodeError as e:
            return Drop("not UTF-8", f"{e.reason} at character {e.start:,}")
        # no language: what is said in a conversation need not be code
        drop = refusal(exchanges, self.cfg, self.tokenizer) or first_refusal(text, document.inner, "", self.cfg)
        if drop := drop or self._marked(text, content, out):
            return drop
        example = example_of(exchanges, self.cfg, self.tokenizer, self.context)
        if isinstance(example, Drop):
            return example
        out.ids, out.segments, out.changes = example.ids, example.segments, example.changes
        out.supervised_bytes = example.n_bytes
        return None

    def _changed(self, text: str, content: bytes, document: Document) -> tuple[str, bytes, tuple[tuple[str, int], ...]]:
        """Return the text without mark and long header, its bytes, and what was cut off or odd, with the bytes cut."""
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


class WorkerPool:
    """Processes that examine batches of documents; a document that kills its process is dropped, and only that one."""

    def __init__(
        self,
        cfg: DataConfig,
        tokenizer_cfg: TokenizerConfig,
        context: int = 0,
        examine: Callable[[list[Document], Path | None], list[Examined]] = _examine_batch,
    ):
        self._n_workers, self._examine = cfg.n_workers, examine
        benchmarks = Benchmarks(cfg.decontaminate) if cfg.decontaminate else None  # read once, not by every worker
        self._arguments = (cfg, benchmarks, context, tokenizer_cfg)
        self.unrecognisable = [] if benchmarks is None else benchmarks.lost
        self._generation = 0
        self._start()

    def _start(self) -> None:
        import multiprocessing

        # spawn: a fork would copy this process's threads and memory, torch's among them
        self._executor = ProcessPoolExecutor(
            self._n_workers, multiprocessing.get_context("spawn"), _start_worker, self._arguments
        )
        # Start all workers now: the executor would start one at a later submit, and one that starts while another dies
        # is never ended, so that shutdown would wait for it for ever
        self._started: list[Future[int]] = []
        with sigint_blocked(), contextlib.suppress(BrokenProcessPool):  # which the next to ask will be told
            for _ in range(self._n_workers):
                self._started.append(self._executor.submit(os.getpid))

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *error: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def map(self, stream: Iterable[Document], tokenizer_file: Path | None = None) -> Iterator[Examined]:
        """Examine a stream of documents, a few batches ahead of the consumer; yields in the stream's order.

        With a tokenizer's file the answers hold token ids, without one the text.
        """
        window: deque[tuple[list[Document], Future[list[Examined]], int]] = deque()
        for batch in _batches(stream):
            window.append((batch, *self._submit(batch, tokenizer_file)))
            if len(window) > 2 * self._n_workers:
                yield from self._result(tokenizer_file, *window.popleft())
        while window:
            yield from self._result(tokenizer_file, *window.popleft())

    def _result(
        self, tokenizer_file: Path | None, batch: list[Document], future: Future[list[Examined]], generation: int
    ) -> list[Examined]:
        while True:
            try:
                return future.result()
            except (BrokenProcessPool, CancelledError):
                # some worker died. If that is old news, this batch only needs another try; else it is suspect
                if generation == self._generation:
                    self._restart()
                    return [examined for document in batch for examined in self._alone(document, tokenizer_file)]
            future, generation = self._submit(batch, tokenizer_file)

    def _submit(self, batch: list[Document], tokenizer_file: Path | None) -> tuple[Future[list[Examined]], int]:
        """Hand a batch to a worker; return its future and the generation of workers that it went to."""
        try:
            with sigint_blocked():  # submitting starts processes, which must not meet Ctrl-C before they ignore it
                return self._executor.submit(self._examine, batch, tokenizer_file), self._generation
        except BrokenProcessPool:  # an earlier batch broke the pool, which its own future will tell
            broken: Future[list[Examined]] = Future()
            broken.set_exception(BrokenProcessPool())
            return broken, self._generation

    def _alone(self, document: Document, tokenizer_file: Path | None) -> list[Examined]:
        started = time.monotonic()
        try:
            return self._submit([document], tokenizer_file)[0].result()
        except BrokenProcessPool:
            slow = time.monotonic() - started >= DOCUMENT_LIMIT_S
            self._restart()
            drop = (
                Drop("timeout", f"more than {DOCUMENT_LIMIT_S} s") if slow else Drop("crash", "its worker process died")
            )
            return [Examined(document.key, document.language, document.size, drop)]

    def _restart(self) -> None:
        """Replace the workers; raises DataError if the new ones cannot even start."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._generation += 1
        self._start()
        try:
            for started in self._started:
                started.result()
        except BrokenProcessPool:
            raise DataError(
                "worker processes must be able to start, but die at once; run a script from its file, not from standard input, "
                "and see that memory is free"
            ) from None


def _batches(stream: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in stream:
        batch.append(document)
        size += document.size
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch

"""Worker processes that filter and tokenise documents, and survive what the documents do to them.

A document that kills its process, or hangs it, is dropped, and only that one. Results come back in the order of the
stream, whatever the number of workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import hashlib
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from config import DataConfig, TokenizerConfig
from filters import reason_to_drop
from shards import DataError
from sources import Document
from tokenizer import Tokenizer, TokenizerError, from_json

DOCUMENT_LIMIT_S = 10  # a worker that spends longer on one document is killed, and the document dropped
WORKER_MEMORY_BYTES = 2**30  # on top of what a worker starts with
BATCH_BYTES, BATCH_DOCUMENTS = 2**19, 64


@dataclasses.dataclass
class Examined:
    """A worker's answer. `reason` names the filter that dropped the document; else `ids` (or `text`) is set."""

    key: str
    size: int
    reason: str | None = None
    digest: bytes = b""
    text: str | None = None
    ids: np.ndarray | None = None


_worker: dict[str, Any] = {}  # a worker process's own settings


def _start_worker(cfg: DataConfig, tokenizer_json: str | None, tokenizer_cfg: TokenizerConfig) -> None:
    import multiprocessing
    import threading

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()
    assert parent is not None
    # a parent that was killed leaves no orphans
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = None
    if tokenizer_json is not None:
        tokenizer = from_json(tokenizer_json, tokenizer_cfg)
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no resource, macOS no statm
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + WORKER_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    _worker.update(cfg=cfg, tokenizer=tokenizer, sink=open(os.devnull, "w", encoding="utf-8"))


def _examine_batch(batch: list[Document]) -> list[Examined]:
    examined = []
    for document in batch:
        # ends this process if the document hangs in C code, where no Python signal handler would run
        faulthandler.dump_traceback_later(DOCUMENT_LIMIT_S, exit=True, file=_worker["sink"])
        try:
            examined.append(_examine(document, _worker["cfg"], _worker["tokenizer"]))
        except MemoryError:
            examined.append(Examined(document.key, document.size, "memory"))
        finally:
            faulthandler.cancel_dump_traceback_later()
    return examined


def _examine(document: Document, cfg: DataConfig, tokenizer: Tokenizer | None) -> Examined:
    size, text = document.size, document.text
    if document.path is not None:
        if size > 4 * cfg.max_chars:  # a character is at most 4 bytes: too long, known without reading gigabytes
            return Examined(document.key, size, "characters")
        try:
            raw = document.path.read_bytes()
        except OSError:
            return Examined(document.key, size, "unreadable")
        size = len(raw)
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            return Examined(document.key, size, "not UTF-8")
    if text is None:
        return Examined(document.key, size, "unreadable")
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError:
        return Examined(document.key, size, "not UTF-8")
    if reason := reason_to_drop(text, document.language, cfg):
        return Examined(document.key, size, reason)
    digest = hashlib.sha256(content).digest()
    if tokenizer is None:
        return Examined(document.key, len(content), digest=digest, text=text)
    try:
        ids = tokenizer.encode(text)
    except TokenizerError:
        return Examined(document.key, size, "not in the vocabulary")
    framed = chain([] if tokenizer.bos_id is None else [tokenizer.bos_id], ids, [tokenizer.eos_id])
    return Examined(document.key, len(content), digest=digest, ids=np.fromiter(framed, np.uint32))


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WorkerPool:
    """Processes that examine batches of documents; a document that kills its process is dropped, and only that one."""

    def __init__(
        self,
        cfg: DataConfig,
        tokenizer: Tokenizer | None,
        tokenizer_cfg: TokenizerConfig,
        examine: Callable[[list[Document]], list[Examined]] = _examine_batch,
    ):
        self._n_workers, self._examine = cfg.n_workers, examine
        self._arguments = (cfg, None if tokenizer is None else tokenizer.to_json(), tokenizer_cfg)
        self._generation = 0
        self._start()

    def _start(self) -> None:
        import multiprocessing

        # spawn: a fork would copy this process's threads and memory, torch's among them
        self._executor = ProcessPoolExecutor(
            self._n_workers, multiprocessing.get_context("spawn"), _start_worker, self._arguments
        )

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *error: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def map(self, stream: Iterable[Document]) -> Iterator[Examined]:
        """Examine a stream of documents, a few batches ahead of the consumer; yields in the stream's order."""
        window: deque[tuple[list[Document], Future[list[Examined]], int]] = deque()
        for batch in _batches(stream):
            window.append((batch, *self._submit(batch)))
            if len(window) > 2 * self._n_workers:
                yield from self._result(*window.popleft())
        while window:
            yield from self._result(*window.popleft())

    def _result(self, batch: list[Document], future: Future[list[Examined]], generation: int) -> list[Examined]:
        while True:
            try:
                return future.result()
            except (BrokenProcessPool, CancelledError):
                # some worker died. If that is old news, this batch only needs another try; else it is suspect
                if generation == self._generation:
                    self._restart()
                    return [self._alone(document) for document in batch]
            future, generation = self._submit(batch)

    def _submit(self, batch: list[Document]) -> tuple[Future[list[Examined]], int]:
        """Hand a batch to a worker; return its future and the generation of workers that it went to."""
        try:
            with _sigint_blocked():  # submitting starts processes, which must not meet Ctrl-C before they ignore it
                return self._executor.submit(self._examine, batch), self._generation
        except BrokenProcessPool:  # an earlier batch broke the pool, which its own future will tell
            broken: Future[list[Examined]] = Future()
            broken.set_exception(BrokenProcessPool())
            return broken, self._generation

    def _alone(self, document: Document) -> Examined:
        try:
            return self._submit([document])[0].result()[0]
        except BrokenProcessPool:
            self._restart()
            return Examined(document.key, document.size, "killed its worker")

    def _restart(self) -> None:
        """Replace the workers; raises DataError if the new ones cannot even start."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._generation += 1
        self._start()
        try:
            with _sigint_blocked():
                probe = self._executor.submit(os.getpid)
            probe.result()
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

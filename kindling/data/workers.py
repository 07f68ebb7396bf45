"""Runs process_document.py in worker processes, and survives documents that crash or hang it.

A document that kills or hangs its process is dropped; no other document is lost. Results come back in the order of the
stream, whatever the number of workers.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import DataConfig, TokenizerConfig
from kindling.data.decontamination import Benchmarks
from kindling.data.filters import Drop
from kindling.data.process_document import DocumentProcessor, ProcessedDocument
from kindling.data.shards import DataError
from kindling.data.sources import Document
from kindling.errors import one_line
from kindling.pool import sigint_blocked
from kindling.tokenization.tokenizer import load_json

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

DOCUMENT_LIMIT_S = 10  # a worker that spends more CPU time on one document is killed, and the document dropped
WORKER_MEMORY_BYTES = 2**30  # in addition to what a worker uses at its start
BATCH_BYTES, BATCH_DOCUMENTS = 2**19, 64


class WorkerPool:
    """Processes that process batches of documents. A document that kills its process is dropped."""

    def __init__(
        self,
        cfg: DataConfig,
        tokenizer_cfg: TokenizerConfig,
        context: int = 0,
        examine: Callable[[list[Document], Path | None], list[ProcessedDocument]] | None = None,
    ):
        """`examine` replaces `_process_batch` as what a worker does with a batch."""
        self._n_workers, self._process = cfg.n_workers, examine or _process_batch
        benchmarks = Benchmarks(cfg.decontaminate) if cfg.decontaminate else None  # read once, not by every worker
        self._arguments = (cfg, benchmarks, context, tokenizer_cfg)
        self.undetectable = [] if benchmarks is None else benchmarks.undetectable
        self.unreadable = benchmarks.unreadable_note() if benchmarks is not None and benchmarks.unreadable else None
        self._generation = 0
        self._start()

    def _start(self) -> None:
        import multiprocessing

        # spawn, because a fork would copy the threads and memory of this process, and those of torch
        self._executor = ProcessPoolExecutor(
            self._n_workers, multiprocessing.get_context("spawn"), _start_worker, self._arguments
        )
        # Start all workers now. The executor would start some at a later submit; if one starts while another dies, the
        # executor never ends it, and shutdown waits for ever
        self._started: list[Future[int]] = []
        with sigint_blocked(), contextlib.suppress(BrokenProcessPool):  # the next call finds out
            for _ in range(self._n_workers):
                self._started.append(self._executor.submit(os.getpid))

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *error: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def map(self, stream: Iterable[Document], tokenizer_file: Path | None = None) -> Iterator[ProcessedDocument]:
        """Process a stream of documents (`DocumentProcessor.all_of`), a few batches ahead of the consumer.

        Yields the results in the stream's order. With `tokenizer_file` the results hold token ids, without it the text.
        """
        window: deque[tuple[list[Document], Future[list[ProcessedDocument]], int]] = deque()
        for batch in _batches(stream):
            window.append((batch, *self._submit(batch, tokenizer_file)))
            if len(window) > 2 * self._n_workers:
                yield from self._result(tokenizer_file, *window.popleft())
        while window:
            yield from self._result(tokenizer_file, *window.popleft())

    def _result(
        self,
        tokenizer_file: Path | None,
        batch: list[Document],
        future: Future[list[ProcessedDocument]],
        generation: int,
    ) -> list[ProcessedDocument]:
        while True:
            try:
                return future.result()
            except (BrokenProcessPool, CancelledError):
                # A worker died. If the workers were replaced since, try the batch again. Else its documents are suspects:
                # try each alone
                if generation == self._generation:
                    self._restart()
                    return [processed for document in batch for processed in self._alone(document, tokenizer_file)]
            future, generation = self._submit(batch, tokenizer_file)

    def _submit(
        self, batch: list[Document], tokenizer_file: Path | None
    ) -> tuple[Future[list[ProcessedDocument]], int]:
        """Give a batch to a worker; return its future and the generation of workers that got it."""
        try:
            with sigint_blocked():  # submitting may start a process, which must not get Ctrl-C before it ignores it
                return self._executor.submit(self._process, batch, tokenizer_file), self._generation
        except BrokenProcessPool:  # an earlier batch broke the pool; its own future will say so
            broken: Future[list[ProcessedDocument]] = Future()
            broken.set_exception(BrokenProcessPool())
            return broken, self._generation

    def _alone(self, document: Document, tokenizer_file: Path | None) -> list[ProcessedDocument]:
        started = time.monotonic()
        try:
            return self._submit([document], tokenizer_file)[0].result()
        except BrokenProcessPool:
            slow = time.monotonic() - started >= DOCUMENT_LIMIT_S
            self._restart()
            drop = (
                Drop("timeout", f"more than {DOCUMENT_LIMIT_S} s") if slow else Drop("crash", "its worker process died")
            )
            return [ProcessedDocument(document.key, document.language, document.size, drop)]

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


# -- inside a worker process ---------------------------------------------------------------------------------------------

_worker: dict[str, Any] = {}  # the state of a worker process


def _start_worker(cfg: DataConfig, benchmarks: Benchmarks | None, context: int, tokenizer_cfg: TokenizerConfig) -> None:
    import multiprocessing
    import threading

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import rensa  # noqa: F401  before the limit, so that the memory of the libraries is not counted
    import tokenizers  # noqa: F401

    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no resource, macOS no statm
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + WORKER_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sink = open(os.devnull, "w", encoding="utf-8")
    _worker.update(
        processor=DocumentProcessor(cfg, benchmarks, context=context),
        tokenizer_cfg=tokenizer_cfg,
        tokenizer_file=None,
        sink=sink,
        limited_from=-math.inf,
    )


def _exit_after(parent: BaseProcess) -> None:
    """End this process when its parent has ended, so that a parent that was killed leaves no orphans."""
    parent.join()
    os._exit(1)


def _process_batch(batch: list[Document], tokenizer_file: Path | None) -> list[ProcessedDocument]:
    if tokenizer_file != _worker["tokenizer_file"]:
        tokenizer = None if tokenizer_file is None else load_json(tokenizer_file, _worker["tokenizer_cfg"])
        _worker["processor"].tokenizer, _worker["tokenizer_file"] = tokenizer, tokenizer_file
    processed = []
    try:
        for document in batch:
            processed += _process_or_drop(document)
    finally:
        faulthandler.cancel_dump_traceback_later()  # while this process waits for the next batch
        _worker["limited_from"] = -math.inf
    return processed


def _process_or_drop(document: Document) -> list[ProcessedDocument]:
    """Process a document within the limits of time and memory; drop it if that fails."""
    _limit_time(DOCUMENT_LIMIT_S)
    try:
        found: list[ProcessedDocument] = _worker["processor"].all_of(document)
        return found
    except MemoryError:
        drop = Drop("memory", f"more than {WORKER_MEMORY_BYTES:,} bytes")
    except BaseException as e:  # any failure of a library, a panic of Rust included, costs only this document
        drop = Drop("unexpected", one_line(e))
    finally:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, 0)
    return [ProcessedDocument(document.key, document.language, document.size, drop)]


def _limit_time(cpu_s: float) -> None:
    """End this process after `cpu_s` seconds of CPU time, even inside C code, or after about 60 times as long in all.

    The limit is CPU time, because a busy machine must not drop other documents than an idle one. To limit the time
    in all, a thread is started, which costs more than many a document does. So that limit is set again only after a tenth of it.
    """
    wall_s, again_s = 60 * cpu_s, 6 * cpu_s
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, cpu_s)  # sends SIGPROF, which ends a process without a handler for it
    else:  # Windows
        wall_s, again_s = cpu_s, 0
    if (now := time.monotonic()) - _worker["limited_from"] >= again_s:
        faulthandler.dump_traceback_later(wall_s, exit=True, file=_worker["sink"])
        _worker["limited_from"] = now

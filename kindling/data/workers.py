"""Worker processes that filter and tokenise documents, and survive what the documents do to them.

A document that kills its process, or hangs it, is dropped, and only that one. Results come back in the order of the
stream, whatever the number of workers. What is done with each document is in process_document.py.
"""

from __future__ import annotations

import contextlib
import faulthandler
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
from kindling.data.duplicates import Benchmarks
from kindling.data.filters import Drop
from kindling.data.process_document import Examined, Examiner
from kindling.data.shards import DataError
from kindling.data.sources import Document
from kindling.errors import one_line
from kindling.pool import sigint_blocked
from kindling.tokenization.tokenizer import load_json

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

DOCUMENT_LIMIT_S = 10  # a worker that spends longer on one document is killed, and the document dropped
WORKER_MEMORY_BYTES = 2**30  # on top of what a worker starts with
BATCH_BYTES, BATCH_DOCUMENTS = 2**19, 64


class WorkerPool:
    """Processes that examine batches of documents; a document that kills its process is dropped, and only that one."""

    def __init__(
        self,
        cfg: DataConfig,
        tokenizer_cfg: TokenizerConfig,
        context: int = 0,
        examine: Callable[[list[Document], Path | None], list[Examined]] | None = None,
    ):
        """`examine` is what a worker does with a batch, in place of `_examine_batch`."""
        self._n_workers, self._examine = cfg.n_workers, examine or _examine_batch
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


# -- inside a worker process ---------------------------------------------------------------------------------------------

_worker: dict[str, Any] = {}  # a worker process's own settings


def _start_worker(cfg: DataConfig, benchmarks: Benchmarks | None, context: int, tokenizer_cfg: TokenizerConfig) -> None:
    import multiprocessing
    import threading

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()
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


def _exit_after(parent: BaseProcess) -> None:
    """End this process when its parent has ended, so that a parent that was killed leaves no orphans."""
    parent.join()
    os._exit(1)


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

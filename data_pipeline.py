"""From sources to token shards: filter, deduplicate, split, tokenise, pack.

    python data_pipeline.py --preset demo

Documents are filtered and tokenised in worker processes, and arrive in their source's order whatever the number of
workers, so that a build is a pure function of its inputs. The result is `data/PRESET-FINGERPRINT/`; the fingerprint
covers every setting and the name, size and time of every local input file, so that a second call with nothing
changed reuses the shards at once, and any change builds new ones. Limit: the content of a data set on the hub is
taken as fixed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from cli import ConfigFlags, parse_cli, run_script
from config import Config, DataConfig, TokenizerConfig
from shards import FORMAT, SPLITS, DataError, ShardWriter, TokenDataset, write_json, write_manifest
from sources import Document, LocalFile, documents, local_files
from tokenizer import Tokenizer, TokenizerError, load_pretrained, train_bpe

DATA = Path("data")
COMPILE_BYTES = 256 * 1024  # larger sources are refused unread: compile() can take seconds and gigabytes on them
DOCUMENT_LIMIT_S = 10  # a worker that spends longer on one document is killed, and the document dropped
WORKER_MEMORY_BYTES = 2**30  # on top of what a worker starts with
BATCH_BYTES, BATCH_DOCUMENTS = 2**19, 64
ALPHANUMERIC = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


# ---------------------------------------------------------------------------------------------------------------------
# Filters: what a worker does to one document

@dataclasses.dataclass
class Examined:
    """A worker's answer. `reason` names the filter that dropped the document; else `ids` (or `text`) is set."""

    key: str
    size: int
    reason: str | None = None
    digest: bytes = b""
    text: str | None = None
    ids: np.ndarray | None = None


def reason_to_drop(text: str, language: str, cfg: DataConfig) -> str | None:
    """Return the name of the first filter that refuses the document, or None. Seed 000's filters, in its order."""
    if not cfg.min_chars <= len(text) <= cfg.max_chars:
        return "characters"
    if not cfg.min_lines <= text.count("\n") + (not text.endswith("\n")) <= cfg.max_lines:
        return "lines"
    if alphanumeric_share(text) < cfg.min_alphanumeric:
        return "alphanumeric"
    if cfg.check_syntax and language == "python" and not compiles(text):
        return "syntax"
    return None


def alphanumeric_share(text: str) -> float:
    """Return the share of the characters that are letters or digits, as str.isalnum says; 0 for an empty text."""
    raw = text.encode("utf-8")
    count = len(raw) - len(raw.translate(None, ALPHANUMERIC))
    if not text.isascii():
        count += sum(c.isalnum() for c in text if c > "\x7f")
    return count / max(1, len(text))


def compiles(text: str) -> bool:
    """Return whether this interpreter's compile() accepts `text`; it is not run. Sources over 256 KiB are refused.

    Strangers' code can make compile() raise all of these; what kills the process instead is the worker pool's part.
    """
    import warnings
    if len(text.encode("utf-8")) > COMPILE_BYTES:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compile(text, "<document>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, MemoryError, RecursionError, OverflowError):
            return False
    return True


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
        from tokenizers import Tokenizer as Backend
        tokenizer = Tokenizer(Backend.from_str(tokenizer_json), tokenizer_cfg)
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no resource, macOS no statm
        import resource
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + WORKER_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    _worker.update(cfg=cfg, tokenizer=tokenizer, sink=open(os.devnull, "w", encoding="utf-8"))


def _examine_batch(batch: list[Document]) -> list[Examined]:
    import faulthandler
    examined = []
    for document in batch:
        # ends this process if the document hangs in C code, where no Python signal handler would run
        faulthandler.dump_traceback_later(DOCUMENT_LIMIT_S, exit=True, file=_worker["sink"])
        examined.append(_examine(document, _worker["cfg"], _worker["tokenizer"]))
        faulthandler.cancel_dump_traceback_later()
    return examined


def _examine(document: Document, cfg: DataConfig, tokenizer: Tokenizer | None) -> Examined:
    size, text = document.size, document.text
    if document.path is not None:
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
    except MemoryError:
        return Examined(document.key, size, "memory")
    framed = chain([] if tokenizer.bos_id is None else [tokenizer.bos_id], ids, [tokenizer.eos_id])
    return Examined(document.key, len(content), digest=digest, ids=np.fromiter(framed, np.uint32))


class WorkerPool:
    """Processes that examine batches of documents; a document that kills its process is dropped, and only that one."""

    def __init__(self, cfg: DataConfig, tokenizer: Tokenizer | None, tokenizer_cfg: TokenizerConfig,
                 examine: Callable[[list[Document]], list[Examined]] = _examine_batch):
        self._n_workers, self._examine = cfg.n_workers, examine
        self._arguments = (cfg, None if tokenizer is None else tokenizer.to_json(), tokenizer_cfg)
        self._generation = 0
        self._start()

    def _start(self) -> None:
        import multiprocessing
        # spawn: a fork would copy this process's threads and memory, torch's among them
        self._executor = ProcessPoolExecutor(self._n_workers, multiprocessing.get_context("spawn"), _start_worker, self._arguments)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *error: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)

    def map(self, stream: Iterable[Document]) -> Iterator[Examined]:
        """Examine a stream of documents, a few batches ahead of the consumer; yields in the stream's order."""
        window: deque[tuple[list[Document], Future[list[Examined]], int]] = deque()
        for batch in _batches(stream):
            window.append((batch, self._executor.submit(self._examine, batch), self._generation))
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
            generation, future = self._generation, self._executor.submit(self._examine, batch)

    def _alone(self, document: Document) -> Examined:
        try:
            return self._executor.submit(self._examine, [document]).result()[0]
        except BrokenProcessPool:
            self._restart()
            return Examined(document.key, document.size, "killed its worker")

    def _restart(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._generation += 1
        self._start()


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


# ---------------------------------------------------------------------------------------------------------------------
# The build

def split_of(digest: bytes, cfg: DataConfig) -> str:
    """Return the split of a document by its content's hash, so that it stays there whatever is added beside it."""
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < cfg.val_fraction:
        return "val"
    return "test" if place < cfg.val_fraction + cfg.test_fraction else "train"


class Ledger:
    """Counts what was read, dropped by each filter, and kept, by source, in documents and bytes."""

    def __init__(self, labels: list[str]):
        self.rows: list[dict[str, Any]] = [{"source": label, "read": [0, 0], "dropped": {}, "kept": [0, 0], "tokens": 0} for label in labels]

    def add(self, source: int, examined: Examined, reason: str | None) -> None:
        row = self.rows[source]
        counters = [row["read"], row["kept"] if reason is None else row["dropped"].setdefault(reason, [0, 0])]
        for counter in counters:
            counter[0] += 1
            counter[1] += examined.size
        if examined.ids is not None and reason is None:
            row["tokens"] += len(examined.ids)

    def table(self) -> str:
        """Return the counts over all sources, and the realised shares of a mixture."""
        def total(counters: list[list[int]]) -> tuple[int, int]:
            return sum(c[0] for c in counters), sum(c[1] for c in counters)

        lines = [("read", *total([r["read"] for r in self.rows]))]
        for reason in dict.fromkeys(reason for r in self.rows for reason in r["dropped"]):
            lines.append((f"  dropped: {reason}", *total([r["dropped"].get(reason, [0, 0]) for r in self.rows])))
        lines.append(("kept", *total([r["kept"] for r in self.rows])))
        out = [f"{'':<32}{'documents':>12}{'MB':>10}"] + [f"{label:<32}{n:>12,}{b / 1e6:>10.2f}" for label, n, b in lines]
        if len(self.rows) > 1:
            tokens = max(1, sum(r["tokens"] for r in self.rows))
            out += [f"  {r['source']}: {r['tokens'] / tokens:.1%} of the tokens" for r in self.rows]
        return "\n".join(out)


def examined_documents(cfg: Config, files: list[list[LocalFile] | None], tokenizer: Tokenizer | None,
                       ledger: Ledger) -> Iterator[tuple[Examined, str]]:
    """Yield each kept document with its split, mixed from the sources by weight; the ledger counts the others.

    The next document comes from the source that is furthest behind its share of the tokens (of the bytes, before
    there is a tokenizer), which depends on nothing but the documents so far.
    """
    seen: set[bytes] = set()
    with WorkerPool(cfg.data, tokenizer, cfg.tokenizer) as pool:
        streams = {i: pool.map(documents(s, files[i])) for i, s in enumerate(cfg.data.sources)}
        drawn = dict.fromkeys(streams, 0)
        while streams:
            i = min(streams, key=lambda i: drawn[i] / cfg.data.sources[i].weight)
            examined = next(streams[i], None)
            if examined is None:
                del streams[i]
                if streams:
                    print(f"source {cfg.data.sources[i].label} ran dry; the others go on", file=sys.stderr)
                continue
            reason = examined.reason
            if reason is None and cfg.data.dedup:
                reason = "duplicate" if examined.digest in seen else None
                seen.add(examined.digest)
            ledger.add(i, examined, reason)
            if reason is None:
                drawn[i] += examined.size if examined.ids is None else len(examined.ids)
                yield examined, split_of(examined.digest, cfg.data)


def _tokenizer_sample(cfg: Config, files: list[list[LocalFile] | None]) -> Iterator[str]:
    """Yield training documents until there are `tokenizer.train_bytes` of them."""
    total = 0
    stream = examined_documents(cfg, files, None, Ledger([s.label for s in cfg.data.sources]))
    with contextlib.closing(stream):
        for examined, split in stream:
            if split == "train" and examined.text is not None:
                yield examined.text
                total += examined.size
                if total >= cfg.tokenizer.train_bytes:
                    return


def make_tokenizer(cfg: Config, files: list[list[LocalFile] | None]) -> Tokenizer:
    """Load the pretrained tokenizer, or train one on the training split."""
    if cfg.tokenizer.kind == "pretrained":
        return load_pretrained(cfg.tokenizer)
    print(f"training a tokenizer of {cfg.model.vocab_size:,} tokens ...", flush=True)
    return train_bpe(_tokenizer_sample(cfg, files), cfg.tokenizer, cfg.model.vocab_size)


def fingerprint(cfg: Config, files: list[list[LocalFile] | None]) -> str:
    """Return a short hash of everything that the shards depend on and that can be known without reading the inputs."""
    import tokenizers
    parts: dict[str, Any] = {
        "format": FORMAT, "python": list(sys.version_info[:3]), "tokenizers": tokenizers.__version__,
        "data": dataclasses.asdict(dataclasses.replace(cfg.data, workers=None)), "tokenizer": dataclasses.asdict(cfg.tokenizer),
        "files": [f and [(x.key, x.size, x.mtime_ns) for x in f] for f in files],
    }
    if cfg.tokenizer.kind == "bpe":
        parts["vocab_size"] = cfg.model.vocab_size
    elif Path(cfg.tokenizer.path or "").expanduser().exists():
        parts["tokenizer_sha256"] = load_pretrained(cfg.tokenizer).sha256
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode("utf-8")).hexdigest()[:12]


def exit_on_terminate() -> None:
    """Turn SIGTERM into SystemExit, so that a build that is told to stop cleans up behind it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def prepare(cfg: Config) -> Path:
    """Return the folder with the shards that `cfg` describes, building it first where it is not there yet.

    Raises DataError for sources that are missing or empty, for splits with nothing in them, and for a full disk.
    """
    for source in cfg.data.sources:
        if source.response_field is not None:
            raise DataError(f"preset {cfg.preset} must train on documents, but its source {source.label} holds instructions and answers; "
                            f"it is for fine-tuning: pre-train an earlier stage with --preset, such as smallcoder-3")
    files = [None if s.kind == "datasets" else local_files(s) for s in cfg.data.sources]
    folder = DATA / f"{cfg.preset}-{fingerprint(cfg, files)}"
    if folder.is_dir():
        return folder
    try:
        return build(cfg, files, folder)
    except OSError as e:
        raise DataError(f"{DATA}/ must be writable and have room for the shards, but writing gave: {e}; "
                        f"free some space, or run from a folder on another disk") from None


def _stale(folder: Path) -> bool:
    """Return whether the process that was building this folder is gone."""
    pid = folder.name.rpartition("-")[2]
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def build(cfg: Config, files: list[list[LocalFile] | None], folder: Path) -> Path:
    """Build `folder`: under another name, renamed when whole, so that a killed build leaves nothing that looks done."""
    DATA.mkdir(parents=True, exist_ok=True)
    for old in DATA.glob(".building-*"):
        if _stale(old):
            shutil.rmtree(old, ignore_errors=True)
    partial = DATA / f".building-{folder.name}-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _fill(cfg, files, partial, folder.name)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process built the same shards meanwhile
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _fill(cfg: Config, files: list[list[LocalFile] | None], partial: Path, name: str) -> None:
    from tqdm import tqdm
    started = time.perf_counter()
    tokenizer = make_tokenizer(cfg, files)
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise TokenizerError(f"model.vocab_size must be at least the tokenizer's {tokenizer.vocab_size}, but is {cfg.model.vocab_size}; "
                             f"set --model.vocab-size")
    (partial / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    writers = {split: ShardWriter(partial, split, dtype) for split in SPLITS}
    ledger = Ledger([s.label for s in cfg.data.sources])
    total = sum(f.size for fs in files if fs for f in fs) if all(s.kind in ("files", "local-python") for s in cfg.data.sources) else None
    drawn = 0
    stream = examined_documents(cfg, files, tokenizer, ledger)
    with contextlib.closing(stream), tqdm(total=total, unit="B", unit_scale=True, desc="data", mininterval=0.5) as bar:
        for examined, split in stream:
            assert examined.ids is not None
            writers[split].add(examined.ids, examined.size)
            drawn += len(examined.ids) if split == "train" else 0
            bar.update(sum(r["read"][1] for r in ledger.rows) - bar.n)
            if cfg.data.max_tokens is not None and drawn >= cfg.data.max_tokens:
                break
        bar.update(sum(r["read"][1] for r in ledger.rows) - bar.n)
    for writer in writers.values():
        writer.flush()
    seconds = time.perf_counter() - started
    print(ledger.table())
    for split, writer in writers.items():
        info = writer.info
        print(f"{split:<32}{info.documents:>12,}{info.bytes / 1e6:>10.2f}   {info.tokens:,} tokens")
        if not info.tokens:
            raise DataError(f"the {split} split must not be empty, but none of the {sum(r['kept'][0] for r in ledger.rows)} documents kept fell into it; "
                            f"add documents, relax the filters, or raise --data.{'val' if split == 'train' else split}-fraction")
    print(f"built in {seconds:.1f} s, {sum(r['read'][1] for r in ledger.rows) / 1e6 / seconds:.1f} MB/s from files to shards")
    write_json(partial / "ledger.json", ledger.rows)
    write_manifest(partial, fingerprint=name, dtype=dtype.str, tokenizer_sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size,
                   eos_id=tokenizer.eos_id, splits={split: writer.info for split, writer in writers.items()})


@dataclasses.dataclass
class Flags:
    config: ConfigFlags


def main(argv: list[str] | None = None) -> int:
    flags = parse_cli(Flags, __doc__ or "", argv)
    folder = prepare(flags.config)
    splits = [TokenDataset(folder, split) for split in SPLITS]
    print(f"shards in {folder}: " + ", ".join(f"{s.split} {len(s):,} tokens" for s in splits))
    print(f"next: python main.py --preset {flags.config.preset}")
    return 0


if __name__ == "__main__":
    exit_on_terminate()
    run_script(main)

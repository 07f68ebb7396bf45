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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cli import ConfigFlags, parse_cli, run_script
from config import Config, DataConfig
from files import write_json
from shards import FORMAT, SPLITS, DataError, ShardWriter, TokenDataset, write_manifest
from sources import LocalFile, documents, local_files
from tokenizer import Tokenizer, TokenizerError, load_pretrained, train
from workers import Examined, WorkerPool

DATA = Path("data")


def split_of(digest: bytes, cfg: DataConfig) -> str:
    """Return the split of a document by its content's hash, so that it stays there whatever is added beside it."""
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < cfg.val_fraction:
        return "val"
    return "test" if place < cfg.val_fraction + cfg.test_fraction else "train"


class Ledger:
    """Counts what was read, dropped by each filter, and kept, by source, in documents and bytes."""

    def __init__(self, labels: list[str]):
        self.rows: list[dict[str, Any]] = [
            {"source": label, "read": [0, 0], "dropped": {}, "kept": [0, 0], "tokens": 0} for label in labels
        ]

    def add(self, source: int, examined: Examined, reason: str | None) -> None:
        """Count one document of a source as dropped for `reason`, or as kept."""
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
        out = [f"{'':<32}{'documents':>12}{'MB':>10}"] + [
            f"{label:<32}{n:>12,}{b / 1e6:>10.2f}" for label, n, b in lines
        ]
        if len(self.rows) > 1:
            tokens = max(1, sum(r["tokens"] for r in self.rows))
            out += [f"  {r['source']}: {r['tokens'] / tokens:.1%} of the tokens" for r in self.rows]
        return "\n".join(out)


def examined_documents(
    cfg: Config, files: list[list[LocalFile] | None], tokenizer: Tokenizer | None, ledger: Ledger
) -> Iterator[tuple[Examined, str]]:
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
    return train(_tokenizer_sample(cfg, files), cfg.tokenizer, cfg.model.vocab_size)


def fingerprint(cfg: Config, files: list[list[LocalFile] | None]) -> str:
    """Return a short hash of everything that the shards depend on and that can be known without reading the inputs."""
    import tokenizers

    parts: dict[str, Any] = {
        "format": FORMAT,
        "python": list(sys.version_info[:3]),
        "tokenizers": tokenizers.__version__,
        "data": dataclasses.asdict(dataclasses.replace(cfg.data, workers=None)),
        "tokenizer": dataclasses.asdict(cfg.tokenizer),
        "files": [f and [(x.key, x.size, x.mtime_ns) for x in f] for f in files],
    }
    for i, source in enumerate(cfg.data.sources):
        if source.kind == "datasets" and Path(source.path or "").is_dir():  # laid out like the hub, but local
            parts[f"folder_{i}"] = [
                (str(p), p.stat().st_size, p.stat().st_mtime_ns)
                for p in sorted(Path(source.path or "").rglob("*"))
                if p.is_file()
            ]
    if cfg.tokenizer.kind != "pretrained":
        parts["vocab_size"] = cfg.model.vocab_size
    elif Path(cfg.tokenizer.path or "").expanduser().exists():
        parts["tokenizer_sha256"] = load_pretrained(cfg.tokenizer).sha256
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode("utf-8")).hexdigest()[:12]


def exit_on_terminate() -> None:
    """Turn SIGTERM into SystemExit, so that a build that is told to stop cleans up behind it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def require_documents(cfg: Config) -> None:
    """Raise DataError if a source holds instructions and answers, which only fine-tuning can use."""
    for source in cfg.data.sources:
        if source.response_field is not None:
            raise DataError(
                f"preset {cfg.preset} must train on documents, but its source {source.label} holds instructions and answers; "
                f"it is for fine-tuning: pre-train an earlier stage with --preset, such as smallcoder-3"
            )


def prepare(cfg: Config) -> Path:
    """Return the folder with the shards that `cfg` describes, building it first where it is not there yet.

    Raises DataError for sources that are missing or empty, for splits with nothing in them, and for a full disk.
    """
    require_documents(cfg)
    files = [None if s.kind == "datasets" else local_files(s) for s in cfg.data.sources]
    folder = DATA / f"{cfg.preset}-{fingerprint(cfg, files)}"
    if folder.is_dir():
        return folder
    try:
        return build(cfg, files, folder)
    except OSError as e:
        raise DataError(
            f"{DATA}/ must be writable and have room for the shards, but writing gave: {e}; "
            f"free some space, or run from a folder on another disk"
        ) from None


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
        raise TokenizerError(
            f"model.vocab_size must be at least the tokenizer's {tokenizer.vocab_size}, but is {cfg.model.vocab_size}; "
            f"set --model.vocab-size"
        )
    (partial / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    writers = {split: ShardWriter(partial, split, dtype) for split in SPLITS}
    ledger = Ledger([s.label for s in cfg.data.sources])
    total = (
        sum(f.size for fs in files if fs for f in fs)
        if all(s.kind in ("files", "local-python") for s in cfg.data.sources)
        else None
    )
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
            kept = sum(r["kept"][0] for r in ledger.rows)
            more = "" if split == "train" else f", or raise --data.{split}-fraction"
            raise DataError(
                f"the {split} split must not be empty, but none of the {kept} documents kept fell into it; "
                f"add documents, relax the filters{more}"
            )
    print(
        f"built in {seconds:.1f} s, {sum(r['read'][1] for r in ledger.rows) / 1e6 / seconds:.1f} MB/s from files to shards"
    )
    write_json(partial / "ledger.json", ledger.rows)
    write_manifest(
        partial,
        fingerprint=name,
        dtype=dtype.str,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        splits={split: writer.info for split, writer in writers.items()},
    )


@dataclasses.dataclass
class Flags:
    """The script's command line."""

    config: ConfigFlags


def main(argv: list[str] | None = None) -> int:
    """Build the shards of the config, or find them built."""
    flags = parse_cli(Flags, __doc__ or "", argv)
    folder = prepare(flags.config)
    splits = [TokenDataset(folder, split) for split in SPLITS]
    print(f"shards in {folder}: " + ", ".join(f"{s.split} {len(s):,} tokens" for s in splits))
    print(f"next: python main.py --preset {flags.config.preset}")
    return 0


if __name__ == "__main__":
    exit_on_terminate()
    run_script(main)

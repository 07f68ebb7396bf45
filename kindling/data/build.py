"""Builds the data: reads the sources, filters, deduplicates, splits and tokenises, and writes token shards.

    folder = prepare(cfg)      # builds the folder unless it exists

Worker processes filter and tokenise the documents. The results keep the order of the source, so the number of workers
does not change a byte. The result is `data/PRESET-FINGERPRINT/`. The fingerprint covers every setting and the name, size
and time of every local input file: if nothing changed, the next call reuses the shards at once; any change builds new
ones. Limit: a data set on the hub is assumed not to change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from config import Config
from kindling import hub
from kindling.config_io import by_old_names
from kindling.data.atomic_folder import atomic_folder
from kindling.data.decontamination import benchmark_files
from kindling.data.examples import ExampleWriter
from kindling.data.infilling import KIND, KINDS
from kindling.data.ledger import DocumentLog, Ledger
from kindling.data.mixture import Mixture, Reader
from kindling.data.packing import INFILLING, PieceWriter
from kindling.data.preflight import require_fits, require_possible, require_tokenizer_file
from kindling.data.process_document import ProcessedDocument
from kindling.data.prompts import rendered_template
from kindling.data.shards import FORMAT, SPLITS, DataError, ShardWriter, read_manifest, token_dtype, write_manifest
from kindling.data.sources import SourceFiles, documents, list_files, require_paths
from kindling.data.workers import WorkerPool
from kindling.files import sha256_text
from kindling.paths import expand_home
from kindling.public_paths import is_hub_tokenizer, is_on_hub
from kindling.tokenization.infilling import require_fim
from kindling.tokenization.pretrained import load_pretrained, rewrites
from kindling.tokenization.tokenizer import Tokenizer
from kindling.tokenization.train_tokenizer import require_room, train

DATA = Path("data")
RECIPE = 6  # raise it when a change of the code gives other shards for the same settings and inputs


def prepare(cfg: Config, tokenizer: Tokenizer | None = None) -> Path:
    """Return the folder with the shards that `cfg` describes; build it first, on this machine, if it does not exist.

    To train a tokenizer, the sources are read twice: first for the tokenizer, then for the shards. For fine-tuning, `tokenizer`
    is the run's own. None: the config says which one. Raises DataError for a source that is missing or empty, a split without
    documents, and a full disk.
    """
    if cfg.data.instructions and tokenizer is None and cfg.tokenizer.kind != "pretrained":
        raise DataError(
            f"examples must be made with the tokenizer of the run that is fine-tuned on them, but preset {cfg.preset} "
            f"names none; build and look at them with `python sft_train.py --preset {cfg.preset} --audit`"
        )
    if tokenizer is None:
        require_tokenizer_file(cfg.tokenizer)
    files, folder = _files_and_folder(cfg, tokenizer)
    if folder.is_dir():
        for broken in read_manifest(folder).get("broken", []):
            print(f"warning: {folder} was built without {broken}; delete it to build it anew", file=sys.stderr)
        return folder
    tokenizer = require_possible(cfg, files, tokenizer, DATA)
    with atomic_folder(folder) as partial, WorkerPool(cfg.data, cfg.tokenizer, cfg.model.block_size) as pool:
        started = time.perf_counter()
        tokenizer, notes = load_or_train_tokenizer(cfg, files, pool, tokenizer)
        path = (partial / "tokenizer.json").absolute()

        def read(i: int) -> Iterator[ProcessedDocument]:
            return pool.map(documents(cfg.data.sources[i], files[i]), path)

        ledger = fill(cfg, files, partial, folder.name, tokenizer, read, notes)
        seconds = time.perf_counter() - started
        print(f"built in {seconds:.1f} s, {ledger.total('read')[1] / 1e6 / seconds:.1f} MB/s from files to shards")
    return folder


def require_inputs(cfg: Config, tokenizer: Tokenizer | None = None) -> None:
    """Raise KindlingError within seconds if `prepare` would find a file, a folder or the hub missing; build nothing."""
    if tokenizer is None:
        require_tokenizer_file(cfg.tokenizer)
    for source in cfg.data.sources:
        require_paths(source)
    if any(map(is_on_hub, cfg.data.sources)) or (tokenizer is None and is_hub_tokenizer(cfg.tokenizer)):
        hub.ask_ahead()
        files, folder = _files_and_folder(cfg, tokenizer)
        if not folder.is_dir():  # else the hub is not needed
            require_possible(cfg, files, tokenizer, DATA)


def _files_and_folder(cfg: Config, tokenizer: Tokenizer | None) -> tuple[SourceFiles, Path]:
    """Return the files of each source, and the folder of the shards that are made of them."""
    files = list_files(cfg)
    return files, DATA / f"{cfg.preset}-{fingerprint(cfg, files, tokenizer)}"


def _version(package: str) -> str | None:
    """Return the version of an installed package; None for one that only some configs need, and that is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def fingerprint(cfg: Config, files: SourceFiles, tokenizer: Tokenizer | None = None) -> str:
    """Return a short hash of everything that the shards depend on, as far as it is known without reading the inputs."""
    import tokenizers

    parts: dict[str, Any] = {
        "recipe": [FORMAT, RECIPE],
        "python": list(sys.version_info[:3]),
        "libraries": [tokenizers.__version__, *map(_version, ("rensa", "regex", "sentencepiece"))],
        "benchmarks": benchmark_files(cfg.data),
        "data": by_old_names(dataclasses.asdict(dataclasses.replace(cfg.data, workers=None))),
        "tokenizer": dataclasses.asdict(cfg.tokenizer),
        "files": [f and [(x.key, x.size, x.mtime_ns) for x in f] for f in files],
    }
    if not cfg.tokenizer.lossy:
        del parts["tokenizer"]["lossy"]  # data from before this setting is found
    for i, source in enumerate(cfg.data.sources):
        root = expand_home(source.path or "", "data.sources.path")
        if source.kind == "datasets" and root.is_dir():  # a local folder with the layout of the hub
            parts[f"folder_{i}"] = [
                (str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(root.rglob("*")) if p.is_file()
            ]
    if cfg.data.instructions or cfg.data.fim_rate:
        parts["context"] = cfg.model.block_size
    if cfg.data.instructions:
        parts["template"] = rendered_template(cfg.data.template)
    if tokenizer is not None:
        parts["tokenizer_sha256"] = tokenizer.sha256
    elif cfg.tokenizer.kind != "pretrained":
        parts["vocab_size"] = cfg.model.vocab_size
    elif expand_home(cfg.tokenizer.path or "", "tokenizer.path").exists():
        parts["tokenizer_sha256"] = load_pretrained(cfg.tokenizer).sha256
    return sha256_text(json.dumps(parts, sort_keys=True, ensure_ascii=True))[:12]


# -- the first pass: a tokenizer --------------------------------------------------------------------------------------


def load_or_train_tokenizer(
    cfg: Config, files: SourceFiles, pool: WorkerPool, tokenizer: Tokenizer | None = None
) -> tuple[Tokenizer, list[str]]:
    """Return the tokenizer of a build: `tokenizer` if given, else the pretrained one, else one that is trained now.

    It is trained on `tokenizer.train_bytes` bytes of the training split. Also returns notes for the ledger. Raises
    TokenizerError if the tokenizer does not fit into `model.vocab_size`.
    """
    notes: list[str] = [] if pool.unreadable is None else [pool.unreadable]
    if pool.undetectable:
        notes.append(f"{len(pool.undetectable)} problems of data.decontaminate are too short to be recognised")
    if tokenizer is None and cfg.tokenizer.kind == "pretrained":
        tokenizer = load_pretrained(cfg.tokenizer)
    elif tokenizer is None:
        print(f"training a tokenizer of {cfg.model.vocab_size:,} tokens ...", flush=True)
        require_room(cfg.tokenizer, cfg.model.vocab_size)
        data = cfg.data
        if data.stopping_strategy == "repeat":  # a tokenizer gains nothing from reading the same text again
            data = dataclasses.replace(data, stopping_strategy="continue")
        mixture = Mixture(data, lambda i: pool.map(documents(data.sources[i], files[i])), silent=True)
        texts, total = [], 0  # all are held in memory
        with contextlib.closing(iter(mixture)) as stream:
            for document in stream:
                if document.split == "train" and document.processed.text is not None:
                    texts.append(document.processed.text)
                    total += document.processed.size
                    if total >= cfg.tokenizer.train_bytes:
                        break
        tokenizer = train(texts, cfg.tokenizer, cfg.model.vocab_size)
        notes += [f"the tokenizer was trained without {source}" for source in mixture.broken.values()]
    if tokenizer.cfg.lossy and (said := rewrites(tokenizer)):
        notes.append(f"the tokenizer rewrites text: {said}")
    require_fits(tokenizer, cfg.model.vocab_size)
    if cfg.data.fim_rate:
        require_fim(tokenizer, "set --data.fim-rate 0, or train one with --tokenizer.kind bpe")
    return tokenizer, notes


# -- the second pass: the shards --------------------------------------------------------------------------------------


def fill(
    cfg: Config, files: SourceFiles, partial: Path, name: str, tokenizer: Tokenizer, read: Reader, notes: list[str]
) -> Ledger:
    """Write all files of the data folder `name` to `partial`.

    `read` gives the processed documents of a source, from this machine or from others. `notes` go into the ledger. Raises
    DataError for a split without documents.
    """
    (partial / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    dtype = token_dtype(tokenizer.vocab_size)
    writers = _writers(cfg, partial, dtype)
    ledger = Ledger([s.label for s in cfg.data.sources], [s.weight for s in cfg.data.sources])
    mixture = Mixture(cfg.data, read)
    drops = _write_documents(cfg, files, mixture, partial, writers, ledger)
    for writer in writers.values():
        writer.close()
    ledger.notes += notes + _notes(cfg, mixture, writers["train"])
    if not cfg.data.instructions:  # the audit of fine-tuning shows it
        print(ledger.table())
    for split, writer in writers.items():
        info = writer.info
        print(f"{split:<32}{info.documents:>12,}{info.bytes / 1e6:>10.2f}   {info.tokens:,} tokens")
    for split, writer in writers.items():
        if not writer.info.tokens:
            raise DataError(_empty_split(split, ledger, drops))
    ledger.write(partial)
    how: dict[str, Any] = {"fim_ids": tokenizer.fim} if cfg.data.fim_rate else {}
    of_examples = [writer for writer in writers.values() if isinstance(writer, ExampleWriter)]
    if of_examples:  # how they were made
        how = {
            "max_exchanges": max(w.max_exchanges for w in of_examples),
            "template": rendered_template(cfg.data.template),
        }
    write_manifest(
        partial,
        **how,
        fingerprint=name,
        dtype=dtype.str,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        broken=list(mixture.broken.values()),
        splits={split: writer.info for split, writer in writers.items()},
    )
    return ledger


def _writers(cfg: Config, partial: Path, dtype: np.dtype) -> dict[str, ShardWriter]:
    """Return the writer of each split: with fill-in-the-middle, held-out splits have one more beside them, all of pieces."""
    if cfg.data.instructions:
        return {split: ExampleWriter(partial, split, dtype) for split in SPLITS}
    if not cfg.data.fim_rate:
        return {split: ShardWriter(partial, split, dtype) for split in SPLITS}
    writers = {split: (PieceWriter if split == "train" else ShardWriter)(partial, split, dtype) for split in SPLITS}
    return writers | {split + INFILLING: PieceWriter(partial, split + INFILLING, dtype) for split in ("val", "test")}


def _write_documents(
    cfg: Config, files: SourceFiles, mixture: Mixture, partial: Path, writers: Mapping[str, ShardWriter], ledger: Ledger
) -> dict[str, str]:
    """Write each document of the mixture to its split, the ledger and the log.

    Returns one dropped document for each rule, for the error about an empty split.
    """
    from tqdm import tqdm

    known = all(s.kind in ("files", "local-python") for s in cfg.data.sources)
    total = sum(f.size for fs in files if fs for f in fs) if known else None
    drops: dict[str, str] = {}
    with (
        contextlib.closing(iter(mixture)) as stream,
        contextlib.closing(DocumentLog(partial)) as log,
        tqdm(total=total, unit="B", unit_scale=True, desc="data", mininterval=0.5) as bar,
    ):
        for document in stream:
            processed, source = document.processed, cfg.data.sources[document.source].label
            line: dict[str, Any] = {"key": processed.key, "source": source, "language": processed.language}
            line |= {"bytes": processed.size} | ({"changes": processed.changes} if processed.changes else {})
            if document.drop is not None:
                ledger.drop(document.source, processed.language, processed.size, document.drop.rule)
                drops.setdefault(document.drop.rule, f"{processed.key}: {document.drop.value}")
                of = {} if document.original is None else {"of": document.original}
                log.write(**line, dropped=document.drop.rule, value=document.drop.value, **of)
            else:
                assert processed.ids is not None
                n_tokens, writer = len(processed.ids), writers[document.split]
                again = {"repeated": True} if document.repeated else {}
                log.write(**line, split=document.split, start=writer.position, tokens=n_tokens, **again)
                kept = ledger.keep(
                    document.source, processed.language, processed.size, processed.changes, n_tokens, document.repeated
                )
                _add(writers, document.split, processed, kept, source)
                if document.split == "train" and processed.pieces is not None:
                    kinds = (KINDS[kind] for kind in processed.pieces.table[:, KIND])
                    ledger.count_pieces(document.source, processed.language, kinds)
            bar.update(0 if document.repeated else processed.size)
            if cfg.data.max_tokens is not None and writers["train"].position >= cfg.data.max_tokens:
                break
    return drops


def _add(
    writers: Mapping[str, ShardWriter], split: str, processed: ProcessedDocument, n_bytes: int, source: str
) -> None:
    """Write a document to its split; if it is held out and in pieces, to the split of pieces beside it too."""
    assert processed.ids is not None
    writer = writers[split]
    if isinstance(writer, ExampleWriter):
        assert processed.example is not None
        writer.add_example(processed.example, processed.language, source)
    elif isinstance(writer, PieceWriter):
        assert processed.pieces is not None
        writer.add_pieces(processed.pieces, n_bytes, processed.language, source)
    else:
        writer.add(processed.ids, n_bytes, processed.language, source)
        if processed.pieces is not None:
            _add(writers, split + INFILLING, processed, n_bytes, source)


def _notes(cfg: Config, mixture: Mixture, train: ShardWriter) -> list[str]:
    """Return the ledger's notes about whole sources."""
    notes = []
    wanted, found = cfg.data.max_tokens, train.info.tokens
    if wanted is not None and found < wanted:
        notes.append(f"the sources held {found:,} of the {wanted:,} training tokens wanted (data.max_tokens)")
    notes += mixture.notes + [f"without {broken}" for broken in mixture.broken.values()]
    return notes + [f"source {s.label} was begun {n} times" for s, n in zip(cfg.data.sources, mixture.reads) if n > 1]


def _empty_split(split: str, ledger: Ledger, drops: dict[str, str]) -> str:
    """Return the error text for a split without documents."""
    rules = [
        f"{rule} {ledger.total('dropped', rule)[0]:,} (such as {drops[rule]})" for rule in ledger.names("dropped")[:3]
    ]
    more = "" if split == "train" else f", or raise --data.{split}-fraction"
    return (
        f"the {split} split must not be empty, but none of the {ledger.total('kept')[0]:,} documents kept fell into it"
        + (f"; dropped were: {', '.join(rules)}" if rules else "")
        + f"; add documents, relax the filters{more}"
    )

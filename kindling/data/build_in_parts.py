"""A data build in parts: make a plan, process the parts on any machine, and gather them into one data folder.

    plan = make_plan(cfg, list_files(cfg), name, 8, pool)
    for number in plan.missing():
        run_part(plan, number, pool)      # on any machine
    folder = gather(plan)

A part filters and tokenises some of the files, with the functions of the single build, into a folder of its own. What
needs all documents (duplicates, mixture, splits) is decided when the parts are gathered, in the order and by the code of
the single build. So the data folder has the same bytes. Nothing is pickled, and files that are read back are checked by
their sha256. Limits: a file is never split; sources on the hub and instructions need the single build.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import shutil
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from config import Config
from kindling.config_io import from_yaml, to_yaml
from kindling.data.atomic_folder import atomic_folder
from kindling.data.build import DATA, fill, fingerprint, load_or_train_tokenizer
from kindling.data.filters import Drop
from kindling.data.infilling import Pieces
from kindling.data.process_document import ProcessedDocument
from kindling.data.shards import DataError, token_dtype
from kindling.data.sources import WHOLE_FILES, LocalFile, SourceFiles, documents, list_files, within_limits
from kindling.data.workers import WorkerPool
from kindling.files import sha256_file
from kindling.tokenization.tokenizer import load_json

PLAN_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """What every part must know. It is kept in `folder`, beside the parts that are done."""

    folder: Path
    cfg: Config
    files: list[list[LocalFile]]
    n_parts: int
    notes: list[str]  # for the ledger

    @property
    def name(self) -> str:
        """The name of the data folder that is built."""
        return self.folder.name.removeprefix("parts-")

    @property
    def logs(self) -> Path:
        """The folder of datatrove's logs. It stays when the parts are deleted."""
        return self.folder.with_name(f"logs-{self.name}")

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer that all parts share."""
        return self.folder / "tokenizer.json"

    def part(self, number: int) -> Path:
        """Return the folder of a part. It exists if the part is done."""
        return self.folder / f"part-{number:05d}"

    def missing(self) -> list[int]:
        """Return the numbers of the parts that are not done yet."""
        return [k for k in range(self.n_parts) if not self.part(k).is_dir()]


def cut(files: list[LocalFile], n: int) -> list[list[LocalFile]]:
    """Cut a list of files into n pieces of about the same bytes, in order. With few files, some pieces are empty."""
    total = max(1, sum(f.size for f in files))
    out: list[list[LocalFile]] = [[] for _ in range(n)]
    for f, end in zip(files, accumulate(f.size for f in files)):
        out[min(n - 1, (2 * end - f.size) * n // (2 * total))].append(f)  # by the middle of the file
    return out


def require_parts_possible(cfg: Config) -> None:
    """Raise DataError for sources that only the single build can read."""
    for source in cfg.data.sources:
        if source.is_instructions:
            raise DataError(
                f"a build in parts must be of documents, but the source {source.label} holds instructions and answers; "
                f"run `python sft_train.py --preset {cfg.preset}`, which builds them"
            )
        if source.kind == "datasets":
            raise DataError(
                f"a build in parts must read files, but the source {source.label} is streamed from the hub; download it and "
                f"set --data.sources.0.kind parquet --data.sources.0.path FOLDER, or run `python data_pipeline.py`"
            )


def make_plan(cfg: Config, files: SourceFiles, name: str, n_parts: int, pool: WorkerPool) -> Plan:
    """Return the plan of a build; make it first if it does not exist. Raises DataError for another number of parts."""
    folder = (DATA / f"parts-{name}").absolute()
    if not folder.is_dir():
        data = dataclasses.replace(cfg.data, workers=None)  # each machine chooses its own number
        with atomic_folder(folder) as partial:
            tokenizer, notes = load_or_train_tokenizer(cfg, files, pool)
            (partial / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
            rows = [[(f.key, str(f.path.absolute()), f.size, f.mtime_ns) for f in fs or ()] for fs in files]
            content = {"format": PLAN_FORMAT, "parts": n_parts, "notes": notes, "files": rows}
            content["config"] = to_yaml(dataclasses.replace(cfg, data=data))
            content["tokenizer_sha256"] = sha256_file(partial / "tokenizer.json")
            # ASCII, because file names that are not UTF-8 contain surrogates
            (partial / "plan.json").write_text(json.dumps(content), encoding="ascii")
    plan = read_plan(folder)
    if plan.n_parts != n_parts:
        raise DataError(
            f"--parts must be {plan.n_parts}, with which this build was begun, but is {n_parts}; "
            f"go on with --parts {plan.n_parts}, or delete {folder} to begin anew"
        )
    return plan


def read_plan(folder: Path) -> Plan:
    """Return the plan in a folder; raises DataError if it is damaged or made with other versions of Python or libraries."""
    path = folder / "plan.json"
    try:
        content = json.loads(path.read_text(encoding="ascii"))
        if content["format"] != PLAN_FORMAT:
            raise ValueError(f"its format is {content['format']}")
        if content["tokenizer_sha256"] != sha256_file(folder / "tokenizer.json"):
            raise ValueError("the tokenizer beside it is another")
        files = [[LocalFile(key, Path(file), *stat) for key, file, *stat in rows] for rows in content["files"]]
        plan = Plan(folder, from_yaml(content["config"], str(path)), files, content["parts"], content["notes"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(f"{path} must be a whole plan, but is not ({e}); delete {folder} and run again") from None
    found = f"{plan.cfg.preset}-{fingerprint(plan.cfg, [*files])}"
    if found != plan.name:
        raise DataError(
            f"every machine must have the Python, the libraries, the benchmarks and the tokenizer that {folder} was planned "
            f"with, but here they give {found}; install the same, or delete {folder} and run again"
        )
    return plan


def require_unchanged(plan: Plan, files: list[LocalFile]) -> None:
    """Raise DataError if a file has changed since the build was planned."""
    for f in files:
        if f.size == f.mtime_ns == 0:  # a file that may not be asked, see sources.UNKNOWN
            continue
        try:
            stat = f.path.stat()
            now = f"{stat.st_size:,} bytes of time {stat.st_mtime_ns}"
        except OSError as e:
            now = e.strerror or type(e).__name__
        if now != (then := f"{f.size:,} bytes of time {f.mtime_ns}"):
            raise DataError(
                f"{f.path} must stay as it was when the build was planned ({then}), but has changed ({now}); "
                f"delete {plan.folder} and run again"
            )


# -- the parts --------------------------------------------------------------------------------------------------------


def run_part(plan: Plan, number: int, pool: WorkerPool) -> None:
    """Filter and tokenise the files of a part, unless it is done. Raises DataError if a file changed since the plan."""
    if plan.part(number).is_dir():
        return
    started, n_documents, n_bytes = time.perf_counter(), 0, 0
    mine = [cut(files, plan.n_parts)[number] for files in plan.files]
    every = [f for files in mine for f in files]
    dtype = token_dtype(load_json(plan.tokenizer_file, plan.cfg.tokenizer).vocab_size)
    require_unchanged(plan, every)
    with atomic_folder(plan.part(number)) as partial:
        for i, source in enumerate(plan.cfg.data.sources):
            with open(partial / f"{i}.jsonl", "w", encoding="ascii") as lines, open(partial / f"{i}.ids", "wb") as ids:
                for processed in pool.map(documents(source, mine[i]), plan.tokenizer_file):
                    lines.write(json.dumps(_to_line(processed)) + "\n")
                    for part in _ids_of(processed):
                        ids.write(part.astype(dtype).tobytes())
                    n_documents, n_bytes = n_documents + 1, n_bytes + processed.size
        require_unchanged(plan, every)  # while they were read
        hashes = {p.name: sha256_file(p) for p in sorted(partial.iterdir())}
        (partial / "done.json").write_text(json.dumps(hashes), encoding="ascii")
    seconds = time.perf_counter() - started
    print(
        f"part {number} of {plan.n_parts}: {n_documents:,} documents, {n_bytes / 1e6:.2f} MB in {seconds:.1f} s, "
        f"{n_bytes / 1e6 / seconds:.2f} MB/s",
        flush=True,
    )


def _ids_of(e: ProcessedDocument) -> list[np.ndarray]:
    """Return the arrays of ids of a document: its own and, if they are others, those of its pieces."""
    if e.ids is None:
        return []
    return [e.ids] if e.pieces is None or e.pieces.ids is e.ids else [e.ids, e.pieces.ids]


def _to_line(e: ProcessedDocument) -> list[Any]:
    """Return what a part stores of a document besides its ids, for the gathering and the ledger."""
    digest, signature = (base64.b64encode(b).decode("ascii") for b in (e.digest, e.signature))
    table = None if e.pieces is None else e.pieces.table.tolist()
    return [e.key, e.language, e.size, e.drop, e.changes, digest, signature, table, [len(ids) for ids in _ids_of(e)]]


def _from_line(line: list[Any], ids: list[np.ndarray]) -> ProcessedDocument:
    key, language, size, drop, changes, digest, signature, table, _ = line
    return ProcessedDocument(
        key,
        language,
        size,
        None if drop is None else Drop(*drop),
        tuple((name, n) for name, n in changes),
        digest=base64.b64decode(digest),
        signature=base64.b64decode(signature),
        ids=ids[0] if ids else None,
        pieces=None if table is None else Pieces(ids[-1], np.array(table, dtype=np.int64).reshape(-1, 2)),
    )


def read_part(folder: Path, source: int, dtype: np.dtype) -> Iterator[ProcessedDocument]:
    """Yield the documents of a source that are in a part, in the source's order."""
    with open(folder / f"{source}.jsonl", encoding="ascii") as lines, open(folder / f"{source}.ids", "rb") as ids:
        for line in map(json.loads, lines):
            yield _from_line(line, [np.frombuffer(ids.read(n * dtype.itemsize), dtype) for n in line[-1]])


def require_whole(folder: Path) -> None:
    """Raise DataError if a file of a finished part has changed since it was written."""
    try:
        hashes = json.loads((folder / "done.json").read_text(encoding="ascii"))
        bad = [name for name, sha256 in hashes.items() if sha256_file(folder / name) != sha256]
    except (OSError, ValueError, AttributeError) as e:
        bad = [f"done.json: {e}"]
    if bad:
        raise DataError(f"{folder} must be as it was written, but is not ({bad[0]}); delete it and run again") from None


# -- the gathering ----------------------------------------------------------------------------------------------------


def gather(plan: Plan) -> Path:
    """Build the data folder from the parts, which must all be done, and delete the parts.

    Raises DataError for parts that are missing or damaged, and if a source has changed since the build was planned.
    """
    if missing := plan.missing():
        raise DataError(
            f"all {plan.n_parts} parts must be done, but {len(missing)} are not ({', '.join(map(str, missing[:8]))}); "
            f"run again, and see {plan.logs} if it happens twice"
        )
    cfg, folder, started = plan.cfg, DATA / plan.name, time.perf_counter()
    files = list_files(cfg)
    if (found := f"{cfg.preset}-{fingerprint(cfg, files)}") != plan.name:
        raise DataError(
            f"the sources must stay as they were when the build was planned, but now give {found} in place of {plan.name}; "
            f"delete {plan.folder} and run again"
        )
    for number in range(plan.n_parts):
        require_whole(plan.part(number))
    tokenizer = load_json(plan.tokenizer_file, cfg.tokenizer)
    dtype = token_dtype(tokenizer.vocab_size)

    def read(i: int) -> Iterator[ProcessedDocument]:
        rows = (e for number in range(plan.n_parts) for e in read_part(plan.part(number), i, dtype))
        # for rows, each part applied the limits to its own files only
        return rows if cfg.data.sources[i].kind in WHOLE_FILES else within_limits(cfg.data.sources[i], rows)

    with atomic_folder(folder) as partial:
        ledger = fill(cfg, files, partial, plan.name, tokenizer, read, plan.notes)
    seconds = time.perf_counter() - started
    print(f"gathered in {seconds:.1f} s, {ledger.total('read')[1] / 1e6 / seconds:.1f} MB/s of source")
    shutil.rmtree(plan.folder, ignore_errors=True)  # the next call deletes what is left
    return folder

"""Where documents come from: local files, the Python source of this machine, and data sets on the hub.

A source yields `Document`s. Those of files carry a path and are read by the worker that filters them; rows of JSONL,
Parquet and hub data sets carry their text. The order is a fixed pseudo-random one for files (so that the first
megabytes are a fair sample of all), the file's own for rows.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import SourceConfig
from shards import DataError

LANGUAGES = {
    ".py": "python",
    ".pyi": "python",
    ".c": "c",
    ".h": "c",
    ".java": "java",
    ".md": "markdown",
    ".txt": "text",
}


@dataclass(frozen=True)
class LocalFile:
    """A file of a source. `key` names it independently of where the source lies."""

    key: str
    path: Path
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Document:
    """One document on its way to a worker: the text, or the file that holds it; `text` None and `path` None is a bad row."""

    key: str
    language: str
    path: Path | None = None
    text: str | None = None
    size: int = 0


def local_files(source: SourceConfig) -> list[LocalFile]:
    """List the files of a local source in its fixed pseudo-random order, cut to `max_bytes`.

    Raises DataError if the folder does not exist or no file matches.
    """
    if source.kind == "local-python":
        paths = sysconfig.get_paths()
        roots = {
            "stdlib": Path(paths["stdlib"]),
            "site-packages": Path(paths["purelib"]),
            "site-packages-arch": Path(paths["platlib"]),
        }
        if roots["site-packages-arch"] == roots["site-packages"]:
            del roots["site-packages-arch"]
        files = [f for name, root in roots.items() if root.is_dir() for f in _walk(root, name + "/", ("**/*.py",))]
    else:
        assert source.path is not None
        root = Path(source.path).expanduser()
        if root.is_file():
            stat = root.stat()
            files = [LocalFile(root.name, root, stat.st_size, stat.st_mtime_ns)]
        elif root.is_dir():
            files = list(_walk(root, "", source.globs))
        else:
            raise DataError(
                f"data.sources.path must be a file or folder that exists, but {source.path!r} is not; "
                f"set --data.sources.0.path"
            )
    if not files:
        raise DataError(
            f"a source must hold at least one file, but {source.label} has none that matches {', '.join(source.globs)}; "
            f"check --data.sources.0.path and --data.sources.0.globs"
        )
    files.sort(key=lambda f: hashlib.sha256(f.key.encode("utf-8", "surrogateescape")).digest())
    if source.kind not in ("files", "local-python"):
        return files  # rows are counted while they are read
    if source.max_bytes is not None:
        total, kept = 0, []
        for f in files:
            if total >= source.max_bytes:
                break
            kept.append(f)
            total += f.size
        files = kept
    return files[: source.max_documents]


def _walk(root: Path, prefix: str, globs: tuple[str, ...]) -> Iterator[LocalFile]:
    """Yield the regular files under `root` that match a glob; hidden folders, caches and nested site-packages are left out."""
    # fnmatch's * crosses slashes, so **/*.py also has to match at the top level, as pathlib's does
    patterns = [p for g in globs for p in (g, g.removeprefix("**/"))]
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            d
            for d in subfolders
            if not d.startswith(".") and d not in ("__pycache__", "site-packages", "dist-packages")
        ]
        for name in names:
            path = Path(folder, name)
            inner = path.relative_to(root).as_posix()
            if any(fnmatch.fnmatchcase(inner, p) for p in patterns) and path.is_file():
                stat = path.stat()
                yield LocalFile(prefix + inner, path, stat.st_size, stat.st_mtime_ns)


def language_of(source: SourceConfig, path: Path) -> str:
    """Return the source's language, or the one that the file's suffix says."""
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    return source.language or LANGUAGES.get(suffix, "unknown")


def documents(source: SourceConfig, files: list[LocalFile] | None) -> Iterator[Document]:
    """Yield the documents of a source. `files` is `local_files(source)`, or None for a data set on the hub.

    A row that cannot be read is yielded without path and text, so that it is counted rather than lost.
    """
    if source.kind in ("files", "local-python"):
        assert files is not None
        for f in files:
            yield Document(f.key, language_of(source, f.path), path=f.path, size=f.size)
        return
    seen_bytes = 0
    for number, document in enumerate(_rows(source, files)):
        if number == source.max_documents or (source.max_bytes is not None and seen_bytes >= source.max_bytes):
            return
        seen_bytes += document.size
        yield document


def _rows(source: SourceConfig, files: list[LocalFile] | None) -> Iterator[Document]:
    if files is None:
        for number, row in enumerate(_hub_rows(source)):
            yield _row_document(source, f"{source.label}:{number}", row, source.language or "unknown")
        return
    for f in files:
        language = language_of(source, f.path)
        if source.kind == "text":
            rows: Iterator[Any] = ({source.field: text} for text in _split_text(f.path, source.separator))
        else:
            rows = _jsonl_rows(f.path) if source.kind == "jsonl" else _parquet_rows(f.path, source.field)
        try:
            for number, row in enumerate(rows):
                yield _row_document(source, f"{f.key}:{number}", row, language)
        except (OSError, EOFError, zlib.error):  # an unreadable file, or a gzip stream cut short: its rows so far stay
            yield Document(f"{f.key}:rest", language)


def _row_document(source: SourceConfig, key: str, row: Any, language: str) -> Document:
    text = row.get(source.field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        return Document(key, language)
    if source.language is None and isinstance(row.get("language"), str):
        language = row["language"].lower()
    return Document(key, language, text=text, size=len(text.encode("utf-8", "surrogatepass")))


def _open_text(path: Path) -> Any:
    # a lone byte survives as a surrogate, which the filters then name, so that one bad byte does not end the file
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8", errors="surrogateescape", newline="")


def _split_text(path: Path, separator: str) -> Iterator[str]:
    with _open_text(path) as f:
        if not separator:
            yield f.read()
            return
        rest = ""
        while chunk := f.read(1 << 20):
            *whole, rest = (rest + chunk).split(separator)
            yield from (text.strip("\n") for text in whole)
        if rest.strip():
            yield rest.strip("\n")


def _jsonl_rows(path: Path) -> Iterator[Any]:
    with _open_text(path) as f:
        for line in f:
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError:
                    yield None


def _parquet_rows(path: Path, field: str) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        columns = [name for name in (field, "language") if name in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=256, columns=columns):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as e:
        raise DataError(
            f"{path} must be a Parquet file, but is not ({' '.join(str(e).split())[:200]}); check the file"
        ) from None


def _hub_rows(source: SourceConfig) -> Iterator[Any]:
    """Stream a data set of the hub, or of a local folder laid out like one; never the whole set on disk."""
    from datasets import load_dataset

    try:
        yield from load_dataset(
            source.path, name=source.subset, data_dir=source.data_dir, split=source.split, streaming=True
        )
    except GeneratorExit:
        raise
    except Exception as e:  # connection, authorisation, naming and format errors share no base class
        raise DataError(
            f"the data set {source.label!r} must be reachable with split {source.split!r}, but gave {type(e).__name__}: "
            f"{' '.join(str(e).split())[:300]}; check the network and the name (a gated set needs its terms accepted on its page "
            f"and `hf auth login`), or read local copies with --data.sources.0.kind parquet --data.sources.0.path FOLDER"
        ) from None

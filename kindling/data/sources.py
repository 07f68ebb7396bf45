"""Where documents come from: local files, the Python source of this machine, and data sets on the hub.

A source yields `Document`s. Those of files carry a path and are read by the worker that filters them; rows of JSONL,
Parquet and hub data sets carry their text, or the exchanges of the conversation that they hold. The order is a fixed
pseudo-random one for files (so that the first megabytes are a fair sample of all), the file's own for rows. What cannot be
read is a document too, one that says why: a bad row, the rest of a file that is cut short, the rest of a stream whose
connection broke.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import os
import re
import stat
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from config import SourceConfig
from kindling.data.dataset_rows import (
    PATH_COLUMNS,
    REPOSITORY_COLUMNS,
    BadRow,
    Line,
    NotJson,
    conversation_of,
    n_bytes_of,
    rows_of,
    text_of,
)
from kindling.data.prompts import Exchange
from kindling.data.shards import DataError
from kindling.errors import one_line

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


WHOLE_FILES = ("files", "local-python", "docstrings")  # sources whose files are read whole, by the workers


@dataclass(frozen=True)
class Document:
    """One document on its way to a worker: the text, or the file that holds it, or why there is neither."""

    key: str
    language: str
    path: Path | None = None
    text: str | None = None
    size: int = 0  # bytes that it is counted with
    trimmed: int = 0  # of them already cut off, at the ends
    inner: str = ""  # the path inside its repository or folder, where known
    unreadable: str | None = None
    broken: bool = False  # not one bad row, but the end of a stream that should have gone on
    exchanges: tuple[Exchange, ...] = ()  # of a conversation, in place of the text
    mined: bool = False  # the path is that of a file whose documented functions are such conversations


SourceFiles = list[list[LocalFile] | None]  # the files of each source, None for one on the hub


class _HasSize(Protocol):
    @property
    def size(self) -> int: ...


Sized = TypeVar("Sized", bound=_HasSize)  # a document, or what came of it


def source_roots(source: SourceConfig) -> dict[str, Path]:
    """Return the folders of a local source, by what the keys of their files begin with."""
    if source.path is not None:
        return {"": Path(source.path).expanduser()}
    paths = sysconfig.get_paths()
    roots = {"stdlib/": paths["stdlib"], "site-packages/": paths["purelib"]}
    if paths["platlib"] != paths["purelib"]:
        roots["site-packages-arch/"] = paths["platlib"]
    return {prefix: Path(root) for prefix, root in roots.items() if Path(root).is_dir()}


def local_files(source: SourceConfig) -> list[LocalFile]:
    """List the files of a local source in its fixed pseudo-random order, cut to `max_bytes`.

    Raises DataError if the folder does not exist or no file matches.
    """
    files: list[LocalFile] = []
    for prefix, root in source_roots(source).items():
        if root.is_dir():
            files += _walk(root, prefix, source.file_globs)
        elif root.is_file():
            found = root.stat()
            files.append(LocalFile(root.name, root, found.st_size, found.st_mtime_ns))
        else:
            raise DataError(
                f"data.sources.path must be a file or folder that exists, but {source.path!r} is not; "
                f"set --data.sources.0.path"
            )
    if not files:
        raise DataError(
            f"a source must hold at least one file, but {source.label} has none that matches {', '.join(source.file_globs)}; "
            f"check --data.sources.0.path and --data.sources.0.globs"
        )
    files.sort(key=lambda f: hashlib.sha256(f.key.encode("utf-8", "surrogateescape")).digest())
    if source.kind not in WHOLE_FILES:
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
    wanted = re.compile("|".join(fnmatch.translate(p) for p in patterns)).match
    for folder, subfolders, names in os.walk(root, onerror=_cannot_list):
        subfolders[:] = [
            d
            for d in subfolders
            if not d.startswith(".") and d not in ("__pycache__", "site-packages", "dist-packages")
        ]
        above = Path(folder).relative_to(root).as_posix()
        for name in names:
            inner = name if above == "." else f"{above}/{name}"
            if wanted(inner) and (found := _regular(os.path.join(folder, name))) is not None:
                yield LocalFile(prefix + inner, Path(folder, name), found.st_size, found.st_mtime_ns)


def _regular(path: str) -> os.stat_result | None:
    """Return what the system says of a regular file; None of anything else, such as a link to nothing."""
    try:
        found = os.stat(path)
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP):
            return None
        raise
    return found if stat.S_ISREG(found.st_mode) else None


def _cannot_list(error: OSError) -> None:
    print(f"warning: {error.filename} cannot be listed ({error.strerror}): its files are left out", file=sys.stderr)


def language_of(source: SourceConfig, path: Path) -> str:
    """Return the source's language, or the one that the file's suffix says."""
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    return source.language or LANGUAGES.get(suffix, "unknown")


def documents(source: SourceConfig, files: list[LocalFile] | None) -> Iterator[Document]:
    """Yield the documents of a source. `files` is `local_files(source)`, or None for a data set on the hub.

    Raises DataError for a data set of which not one row can be read.
    """
    if source.kind in WHOLE_FILES:
        assert files is not None
        for f in files:
            language, mined = language_of(source, f.path), source.kind == "docstrings"
            yield Document(f.key, language, path=f.path, size=f.size, inner=f.key, mined=mined)
        return
    rows = _hub_documents(source) if files is None else (d for f in files for d in _file_documents(source, f))
    yield from within_limits(source, rows)


def within_limits(source: SourceConfig, rows: Iterable[Sized]) -> Iterator[Sized]:
    """Yield the rows of a source of rows until there are its `max_documents` or `max_bytes` of them."""
    seen_bytes = 0
    for number, row in enumerate(rows):
        if number == source.max_documents or (source.max_bytes is not None and seen_bytes >= source.max_bytes):
            return
        seen_bytes += row.size
        yield row


def _file_documents(source: SourceConfig, f: LocalFile) -> Iterator[Document]:
    """Yield the documents of one file of rows; the rows before a place that cannot be read stay."""
    language = language_of(source, f.path)
    number = 0
    try:
        for number, row in enumerate(rows_of(source, f.path), 1):
            key = f"{f.key}:{number - 1}"
            if source.kind == "text":
                text = row.strip("\n")
                yield Document(key, language, text=text, size=n_bytes_of(row), trimmed=len(row) - len(text))
            else:
                yield _row_document(source, key, row, language)
    except Exception as e:  # gzip, zlib, Arrow and the system share no base class
        yield Document(f"{f.key}:{number}", language, unreadable=f"the rest of the file: {one_line(e)}")


def _row_document(source: SourceConfig, key: str, row: Any, language: str) -> Document:
    """Return the document of one row, which comes as a `Line` of JSON or as the value itself; only a dict holds a text."""
    size = 0  # of the row as a whole, where it came as a line
    if isinstance(row, Line):
        row, size = row.content, row.size
    if not isinstance(row, dict):
        why = row if isinstance(row, NotJson) else f"a row must be an object, but is a {type(row).__name__}"
        return Document(key, language, size=size, unreadable=str(why))
    folder, path = (
        next((str(row[c]) for c in columns if row.get(c)), "") for columns in (REPOSITORY_COLUMNS, PATH_COLUMNS)
    )
    if path:
        key = ":".join((key, "/".join(part for part in (folder, path) if part)))
    if source.language is None:
        named = row.get("language") or row.get("lang")
        language = named.lower() if isinstance(named, str) else LANGUAGES.get(Path(path).suffix, language)
    try:
        if source.is_instructions:
            exchanges = conversation_of(source, row)
            size = sum(n_bytes_of(text) for e in exchanges for text in (e.instruction, e.input, e.response))
            return Document(key, language, size=size, inner=path, exchanges=exchanges)
        text = text_of(row, source.field)
    except BadRow as e:
        return Document(key, language, size=size, unreadable=str(e))
    return Document(key, language, text=text, size=n_bytes_of(text), inner=path)


def _hub_documents(source: SourceConfig) -> Iterator[Document]:
    """Stream a data set of the hub, or of a local folder laid out like one; never the whole set on disk."""
    if (source.path or "").startswith(("/", "./", "../", "~")) and not Path(source.path or "").expanduser().is_dir():
        raise DataError(
            f"data.sources.path must be a name on the hub or a folder laid out like one, but there is no folder "
            f"{source.path!r}; correct --data.sources.0.path"
        )
    from datasets import load_dataset

    number = 0
    try:
        path = os.path.expanduser(source.path or "")  # a name on the hub keeps its slash on every system
        rows = load_dataset(path, name=source.subset, data_dir=source.data_dir, split=source.split, streaming=True)
        for number, row in enumerate(rows, 1):
            document = _row_document(source, f"{source.label}:{number - 1}", row, source.language or "unknown")
            if number == 1 and document.unreadable is not None:
                # a wrong name would stream the whole set for nothing
                raise DataError(
                    f"each row of the data set {source.label!r} must hold its text where the config says, but in the first "
                    f"{document.unreadable}; set the source's field (and response_field or messages_field)"
                )
            yield document
    except DataError:
        raise
    except Exception as e:  # connection, authorisation, naming and format errors share no base class
        if number == 0:
            raise DataError(_no_data_set(source, e)) from None
        why = f"the rest of the data set, after row {number - 1:,}: {one_line(e)}"
        yield Document(f"{source.label}:{number}", source.language or "unknown", unreadable=why, broken=True)


def _no_data_set(source: SourceConfig, error: Exception) -> str:
    """Return the line that says why a data set cannot be read at all, and what to do."""
    said = one_line(error, 300)
    local = "or read local copies with --data.sources.0.kind parquet --data.sources.0.path FOLDER"
    if "gated" in said.lower() or "GatedRepo" in type(error).__name__:
        return (
            f"the data set {source.path!r} is gated, so its terms must be accepted first: log in and accept them at "
            f"https://huggingface.co/datasets/{source.path}, create a token at https://huggingface.co/settings/tokens, give it "
            f"to `hf auth login` (or set HF_TOKEN), and run this again; {local} ({said})"
        )
    return (
        f"the data set {source.label!r} must be reachable with split {source.split!r}, but gave {said}; check the network and "
        f"the name (a gated set needs its terms accepted on its page and `hf auth login`), {local}"
    )

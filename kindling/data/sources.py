"""Yields the documents of a source: local files, the Python source of this machine, or a data set on the hub.

A document of a whole file carries its path; the worker that filters it reads the file. A row of JSONL, Parquet or a hub
data set carries its text, or the exchanges of its conversation. Files come in a fixed pseudo-random order, so that the
first megabytes are a fair sample; rows come in the order of their file. What cannot be read is a document too, which says
why: a bad row, the rest of a damaged file, the rest of a stream whose connection broke.
"""

from __future__ import annotations

import contextlib
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

from config import Config, SourceConfig
from kindling import hub
from kindling.data.dataset_rows import (
    PATH_COLUMNS,
    REPOSITORY_COLUMNS,
    BadRow,
    exchanges_of_row,
    is_message,
    rows_of,
    text_of,
)
from kindling.data.prompts import Exchange
from kindling.data.shards import DataError
from kindling.errors import one_line
from kindling.files import printable
from kindling.json_rows import PACKED, Broken, Row, n_bytes_of
from kindling.paths import expand_home
from kindling.public_paths import is_on_hub

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
    """A file of a source. `key` is its name inside the source, wherever the source's folder is."""

    key: str
    path: Path
    size: int
    mtime_ns: int


WHOLE_FILES = ("files", "local-python", "docstrings")  # sources whose files are whole documents, read by the workers


@dataclass(frozen=True)
class Document:
    """A document to process: its text, or its file, or its conversation, or why it cannot be read."""

    key: str
    language: str
    path: Path | None = None
    text: str | None = None
    size: int = 0  # bytes, as counted in the ledger
    trimmed: int = 0  # newlines that were cut off at both ends, in bytes
    inner: str = ""  # the path inside its repository or folder, if known
    unreadable: str | None = None
    broken: bool = False  # the stream broke off here; False for one bad row
    exchanges: tuple[Exchange, ...] = ()  # of a conversation, instead of a text
    mined: bool = False  # `path` is Python source: each documented function becomes a conversation


SourceFiles = list[list[LocalFile] | None]  # the files of each source, None for one on the hub


class _HasSize(Protocol):
    @property
    def size(self) -> int: ...


Sized = TypeVar("Sized", bound=_HasSize)  # a document, before or after processing


def source_roots(source: SourceConfig) -> dict[str, Path]:
    """Return the folders of a local source, by the prefix of their files' keys."""
    if source.path is not None:
        return {"": expand_home(source.path, "data.sources.path")}
    paths = sysconfig.get_paths()
    roots = {"stdlib/": paths["stdlib"], "site-packages/": paths["purelib"]}
    if paths["platlib"] != paths["purelib"]:
        roots["site-packages-arch/"] = paths["platlib"]
    return {prefix: Path(root) for prefix, root in roots.items() if Path(root).is_dir()}


def require_paths(source: SourceConfig) -> None:
    """Raise DataError if the file or folder of a local source does not exist."""
    if source.kind == "datasets":
        return
    for root in source_roots(source).values():
        if not (root.is_dir() or root.is_file()):
            raise DataError(
                f"data.sources.path must be a file or folder that exists, but {source.path!r} is not; "
                f"set --data.sources.0.path"
            )


def local_files(source: SourceConfig) -> list[LocalFile]:
    """List the files of a local source in its fixed pseudo-random order, cut to `max_bytes`.

    Raises DataError if the folder does not exist or no file matches.
    """
    require_paths(source)
    files: list[LocalFile] = []
    for prefix, root in source_roots(source).items():
        if root.is_dir():
            files += _walk(root, prefix, source.file_globs)
        else:
            found = root.stat()
            files.append(LocalFile(root.name, root, found.st_size, found.st_mtime_ns))
    if not files:
        raise DataError(
            f"a source must hold at least one file, but {source.label} has none that matches {', '.join(source.file_globs)}; "
            f"check --data.sources.0.path and --data.sources.0.globs"
        )
    files.sort(key=lambda f: hashlib.sha256(f.key.encode("utf-8", "surrogateescape")).digest())
    if source.kind not in WHOLE_FILES:
        return files  # the limits count rows, while they are read
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
    """Yield the regular files under `root` that match a glob, without hidden folders, caches and nested site-packages."""
    # fnmatch's **/*.py wants a slash; without the prefix it matches at the top level too, as in pathlib
    patterns = [p for g in globs for p in (g, g.removeprefix("**/"))]
    wanted = re.compile("|".join(fnmatch.translate(p) for p in patterns)).match
    links: list[str] = []
    for folder, subfolders, names in os.walk(root, onerror=_cannot_list):
        subfolders[:] = [
            d
            for d in subfolders
            if not d.startswith(".") and d not in ("__pycache__", "site-packages", "dist-packages")
        ]
        links += [path for d in subfolders if os.path.islink(path := os.path.join(folder, d))]
        above = Path(folder).relative_to(root).as_posix()
        for name in names:
            inner = name if above == "." else f"{above}/{name}"
            if wanted(inner) and (found := _regular(os.path.join(folder, name))) is not None:
                yield LocalFile(prefix + inner, Path(folder, name), found.st_size, found.st_mtime_ns)
    if links:  # they are not followed, because they can lead in a circle or to the same files again
        print(
            f"warning: {len(links)} linked folders are left out, such as {links[0]}; name its target as a source to read it",
            file=sys.stderr,
        )


UNKNOWN = os.stat_result((stat.S_IFREG, *[0] * 9), {"st_mtime_ns": 0})  # of a file that may not be asked


def _regular(path: str) -> os.stat_result | None:
    """Return the status of a regular file; None for anything else, such as a broken link."""
    try:
        found = os.stat(path)
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP):
            return None
        return (
            UNKNOWN  # such as a file in a folder that may be listed but not entered; reading it says why it cannot be
        )
    return found if stat.S_ISREG(found.st_mode) else None


def _cannot_list(error: OSError) -> None:
    print(f"warning: {error.filename} cannot be listed ({error.strerror}): its files are left out", file=sys.stderr)


def language_of(source: SourceConfig, path: Path) -> str:
    """Return the source's language; without one, the language of the file's suffix."""
    suffix = path.with_suffix("").suffix if path.suffix in PACKED else path.suffix
    return source.language or LANGUAGES.get(suffix, "unknown")


def documents(source: SourceConfig, files: list[LocalFile] | None) -> Iterator[Document]:
    """Yield the documents of a source. `files` is `local_files(source)`, or None for a data set on the hub.

    Raises DataError for a data set on the hub if not even its first row can be read.
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
    """Yield rows until the source's `max_documents` or `max_bytes` is reached."""
    seen_bytes = 0
    for number, row in enumerate(rows):
        if number == source.max_documents or (source.max_bytes is not None and seen_bytes >= source.max_bytes):
            return
        seen_bytes += row.size
        yield row


def _file_documents(source: SourceConfig, f: LocalFile) -> Iterator[Document]:
    """Yield the documents of a file of rows. If the file is damaged, the rows before the damage are kept."""
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
    except Exception as e:  # gzip, zlib, Arrow and OS errors share no base class
        yield Document(f"{f.key}:{number}", language, unreadable=f"the rest of the file: {one_line(e)}")


def _row_document(source: SourceConfig, key: str, row: Any, language: str) -> Document:
    """Return the document of a row, which is a `Row` of JSON or a value; only a dict or a chat can be used."""
    size = line = 0  # of the whole row, if it is JSON
    if isinstance(row, Row):
        row, size, line = row
    column = source.messages_field
    if column is not None and isinstance(row, list) and all(is_message(message, column) for message in row[:1]):
        row = {column: row}  # a chat that is a list of its messages
    if not isinstance(row, dict):
        why = row if isinstance(row, Broken) else f"a row must be an object, but is a {type(row).__name__}"
        return Document(key, language, size=size, unreadable=f"line {line:,}: {why}" if line else str(why))
    folder, path = (  # NaN is not equal to itself
        next((str(value) for c in columns if (value := row.get(c)) and value == value), "")
        for columns in (REPOSITORY_COLUMNS, PATH_COLUMNS)
    )
    if path:
        key = ":".join((key, "/".join(part for part in (folder, path) if part)))
    inner = "" if "://" in path else path  # the address of a page says nothing about the text
    if source.language is None:
        named = row.get("language") or row.get("lang")
        language = (
            printable(named.lower())
            if isinstance(named, str) and named.strip()
            else LANGUAGES.get(Path(inner).suffix, language)
        )
    try:
        if source.is_instructions:
            exchanges = exchanges_of_row(source, row)
            size = sum(n_bytes_of(text) for e in exchanges for text in (e.instruction, e.input, e.response))
            return Document(key, language, size=size, inner=inner, exchanges=exchanges)
        text = text_of(row, source.field)
    except BadRow as e:
        return Document(key, language, size=size, unreadable=str(e))
    return Document(key, language, text=text, size=n_bytes_of(text), inner=inner)


def _hub_documents(source: SourceConfig) -> Iterator[Document]:
    """Stream a data set from the hub, or from a local folder with the same layout; it is not downloaded as a whole."""
    path = source.path or ""
    if path.startswith("~"):  # not else: a name on the hub keeps its slash on Windows
        path = str(expand_home(path, "data.sources.path"))
    if path.startswith(("/", "./", "../", "~")) and not Path(path).is_dir():
        raise DataError(
            f"data.sources.path must be a name on the hub or a folder laid out like one, but there is no folder "
            f"{source.path!r}; correct --data.sources.0.path"
        )
    number = 0
    try:
        for number, row in enumerate(_rows_of_hub(source, path), 1):
            document = _row_document(source, f"{source.label}:{number - 1}", row, source.language or "unknown")
            if number == 1 and document.unreadable is not None:
                # with a wrong column, the whole set would be streamed for nothing
                raise DataError(
                    f"each row of the data set {source.label!r} must hold its text where the config says, but in the first "
                    f"{document.unreadable}; set the source's field (and response_field or messages_field)"
                )
            yield document
    except DataError:
        raise
    except Exception as e:  # errors of connection, authorisation, name and format share no base class
        if number == 0:
            raise DataError(_no_data_set(source, e)) from None
        why = f"the rest of the data set, after row {number - 1:,}: {one_line(e)}"
        yield Document(f"{source.label}:{number}", source.language or "unknown", unreadable=why, broken=True)


def _rows_of_hub(source: SourceConfig, path: str) -> Iterator[Any]:
    """Yield the rows of the data set at `path`. Raises DataError if the hub does not answer, and the set is not in the cache."""
    with require_answer(source):
        from datasets import load_dataset

        yield from load_dataset(path, name=source.subset, data_dir=source.data_dir, split=source.split, streaming=True)


@contextlib.contextmanager
def require_answer(source: SourceConfig) -> Iterator[None]:
    """Use only the cache of data sets in the `with` statement if the hub is needed and does not answer.

    Raises DataError within seconds if the cache has nothing of the data set.
    """
    if not is_on_hub(source):
        yield
        return
    with hub.cache_if_unreachable() as why:
        if why is not None and not hub.is_cached("datasets", source.path or ""):
            raise DataError(
                f"the data set {source.label!r} must be reachable, but {why}; check the network, or read local copies with "
                f"--data.sources.0.kind parquet --data.sources.0.path FOLDER"
            )
        yield


def _no_data_set(source: SourceConfig, error: Exception) -> str:
    """Return the error text for a data set that cannot be read at all."""
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


def list_files(cfg: Config) -> SourceFiles:
    """Return the files of each source, None for one on the hub."""
    return [None if s.kind == "datasets" else local_files(s) for s in cfg.data.sources]

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
import gzip
import hashlib
import json
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
# the columns in which data sets keep the path of a row's file, and the repository that it is from
PATH_COLUMNS = ("path", "max_stars_repo_path", "url")
REPOSITORY_COLUMNS = ("repo", "max_stars_repo_name", "repo_name")


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
    if source.kind == "text":
        rows: Iterator[Any] = _split_text(f.path, source.separator)
    elif source.kind == "jsonl":
        rows = _json_rows(f.path)
    else:
        rows = _parquet_rows(f.path, source)
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            key = f"{f.key}:{number - 1}"
            if source.kind == "text":
                text = row.strip("\n")
                yield Document(key, language, text=text, size=_size(row), trimmed=len(row) - len(text))
            else:
                yield _row_document(source, key, row, language)
    except Exception as e:  # gzip, zlib, Arrow and the system share no base class
        yield Document(f"{f.key}:{number}", language, unreadable=f"the rest of the file: {one_line(e)}")


def _row_document(source: SourceConfig, key: str, row: Any, language: str) -> Document:
    """Return the document of one row, which comes as a `_Line` of JSON or as the value itself; only a dict holds a text."""
    size = 0  # of the row as a whole, where it came as a line
    if isinstance(row, _Line):
        row, size = row.content, row.size
    if not isinstance(row, dict):
        why = row if isinstance(row, _NotJson) else f"a row must be an object, but is a {type(row).__name__}"
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
            exchanges = _conversation(source, row)
            size = sum(_size(text) for e in exchanges for text in (e.instruction, e.input, e.response))
            return Document(key, language, size=size, inner=path, exchanges=exchanges)
        text = _text(row, source.field)
    except _BadRow as e:
        return Document(key, language, size=size, unreadable=str(e))
    return Document(key, language, text=text, size=_size(text), inner=path)


class _BadRow(Exception):
    """Why a row has not what the source says that it has."""


def _text(row: dict[str, Any], field: str) -> str:
    """Return the text in a column of a row."""
    if isinstance(text := row.get(field), str):
        return text
    given = f"is a {type(text).__name__}" if field in row else f"is not among {', '.join(map(str, row)) or 'none'}"
    raise _BadRow(f"the column {field!r} must hold text, but {given}")


def _conversation(source: SourceConfig, row: dict[str, Any]) -> tuple[Exchange, ...]:
    """Return the exchanges of a row of instructions, in which nothing but the input may be missing or None."""
    if source.messages_field is not None:
        return _exchanges(row.get(source.messages_field), source.messages_field)
    assert source.response_field is not None
    instruction, response = _text(row, source.field), _text(row, source.response_field)
    about = row.get(source.input_field) if source.input_field is not None else None
    if not isinstance(about, (str, type(None))):
        raise _BadRow(f"the column {source.input_field!r} must hold text or nothing, but is a {type(about).__name__}")
    return (Exchange(instruction, response, about or ""),)


def _exchanges(messages: Any, field: str) -> tuple[Exchange, ...]:
    """Return the exchanges of a list of messages, in either of the two spellings that data sets have.

    A system message at the beginning goes before the first instruction.
    """
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise _BadRow(f"the column {field!r} must hold a list of messages, but does not")
    said = [(m.get("role", m.get("from")), m.get("content", m.get("value"))) for m in messages]
    for role, text in said:
        if not isinstance(text, str):
            raise _BadRow(f"a message must hold text, but that of {role!r} is a {type(text).__name__}")
    system = f"{said.pop(0)[1]}\n\n" if said and said[0][0] == "system" else ""
    roles = [{"human": "user", "gpt": "assistant"}.get(str(role), str(role)) for role, _ in said]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise _BadRow(f"messages must be of user and assistant in turn, but are of {', '.join(roles) or 'none'}")
    texts = [system + said[0][1], *(text for _, text in said[1:])]
    return tuple(Exchange(asked, answered) for asked, answered in zip(texts[::2], texts[1::2]))


class _NotJson(str):
    """Why a line could not be parsed."""


@dataclass(frozen=True)
class _Line:
    """One line of a JSONL file: its value, or `_NotJson`, and its bytes."""

    content: Any
    size: int


def _size(text: str) -> int:
    """Return the bytes of a text as it was read, where a surrogate stands for a byte that is no UTF-8."""
    try:
        return len(text.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:  # a surrogate that JSON spelt out
        return len(text.encode("utf-8", "surrogatepass"))


def open_text(path: Path, encoding: str = "utf-8") -> Any:
    """Open a text file, packed by gzip where its name ends so, with its line ends as they are."""
    # a lone byte survives as a surrogate, which the filters then name, so that one bad byte does not end the file
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding=encoding, errors="surrogateescape", newline="")


def _split_text(path: Path, separator: str) -> Iterator[str]:
    with open_text(path) as f:
        if not separator:
            yield f.read()
            return
        rest = ""
        while chunk := f.read(1 << 20):
            seen = max(0, len(rest) - len(separator))  # no separator begins before
            rest += chunk
            if rest.find(separator, seen) >= 0:
                *whole, rest = rest.split(separator)
                yield from whole
        if rest:
            yield rest


def _json_rows(path: Path) -> Iterator[Any]:
    """Yield the rows of a file with one JSON object a line, or with one list of them."""
    with open_text(path, "utf-8-sig") as f:
        if ".json" in path.suffixes[-2:]:
            if f.read(4096).lstrip().startswith("["):
                f.seek(0)
                yield from json.load(f)
                return
            f.seek(0)
        for line in f:
            if line.strip():
                try:
                    content = json.loads(line)
                except (ValueError, RecursionError) as e:
                    content = _NotJson(f"not JSON: {one_line(e)}")
                yield _Line(content, _size(line))


def _parquet_rows(path: Path, source: SourceConfig) -> Iterator[Any]:
    """Yield the rows of a Parquet file, with no columns but those that a document is made of."""
    from pyarrow.parquet import ParquetFile

    own = (source.field, source.response_field, source.input_field, source.messages_field)
    wanted = (*own, "language", "lang", *PATH_COLUMNS, *REPOSITORY_COLUMNS)
    with ParquetFile(path) as file:
        columns = [name for name in dict.fromkeys(wanted) if name in file.schema_arrow.names]
        if (source.messages_field or source.field) not in columns:  # so that the message can name what there is
            columns = file.schema_arrow.names
        for batch in file.iter_batches(batch_size=256, columns=columns):
            yield from batch.to_pylist()


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

"""Reads the rows of text, JSON and Parquet files, and takes a text or a conversation from a row.

    for row in rows_of(source, path):
        text = text_of(row, source.field)              # or, for instructions,
        exchanges = conversation_of(source, row)

A bad row raises BadRow; the rows after it can still be read. A damaged file raises the error of the library that reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from config import SourceConfig
from kindling.data.prompts import Exchange
from kindling.rows import open_text, read_rows

# the columns for the path of a row's file, and for its repository, in the data sets that we know
PATH_COLUMNS = ("path", "max_stars_repo_path", "url")
REPOSITORY_COLUMNS = ("repo", "max_stars_repo_name", "repo_name")


def rows_of(source: SourceConfig, path: Path) -> Iterator[Any]:
    """Yield the rows of a file: strings of a text file, `Row`s of JSON, values of Parquet."""
    if source.kind == "text":
        return _split_text(path, source.separator)
    return read_rows(path) if source.kind == "jsonl" else _parquet_rows(path, source)


def _split_text(path: Path, separator: str) -> Iterator[str]:
    with open_text(path) as f:
        if not separator:
            yield f.read()
            return
        rest = ""
        while chunk := f.read(1 << 20):
            seen = max(0, len(rest) - len(separator))  # no separator begins before this place
            rest += chunk
            if rest.find(separator, seen) >= 0:
                *whole, rest = rest.split(separator)
                yield from whole
        if rest:
            yield rest


def _parquet_rows(path: Path, source: SourceConfig) -> Iterator[Any]:
    """Yield the rows of a Parquet file, with only the columns that a document needs."""
    from pyarrow.parquet import ParquetFile

    own = (source.field, source.response_field, source.input_field, source.messages_field)
    wanted = (*own, "language", "lang", *PATH_COLUMNS, *REPOSITORY_COLUMNS)
    with ParquetFile(path) as file:
        columns = [name for name in dict.fromkeys(wanted) if name in file.schema_arrow.names]
        if (source.messages_field or source.field) not in columns:  # keep all, so that the error can name them
            columns = file.schema_arrow.names
        for batch in file.iter_batches(batch_size=256, columns=columns):
            yield from batch.to_pylist()


class BadRow(Exception):
    """A row that does not have the columns or the messages that the source's settings say. The text says why."""


def text_of(row: dict[str, Any], field: str) -> str:
    """Return the text in a column of a row; raises BadRow if there is none."""
    if isinstance(text := row.get(field), str):
        return text
    given = f"is a {type(text).__name__}" if field in row else f"is not among {', '.join(map(str, row)) or 'none'}"
    raise BadRow(f"the column {field!r} must hold text, but {given}")


def conversation_of(source: SourceConfig, row: dict[str, Any]) -> tuple[Exchange, ...]:
    """Return the exchanges of a row of instructions. Only the input may be missing or None. Raises BadRow."""
    if source.messages_field is not None:
        return _exchanges(row.get(source.messages_field), source.messages_field)
    assert source.response_field is not None
    instruction, response = text_of(row, source.field), text_of(row, source.response_field)
    about = row.get(source.input_field) if source.input_field is not None else None
    if not isinstance(about, (str, type(None))):
        raise BadRow(f"the column {source.input_field!r} must hold text or nothing, but is a {type(about).__name__}")
    return (Exchange(instruction, response, about or ""),)


def _exchanges(messages: Any, field: str) -> tuple[Exchange, ...]:
    """Return the exchanges of a list of messages: with `role` and `content`, or with `from` and `value`.

    A system message at the beginning is put before the first instruction.
    """
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise BadRow(f"the column {field!r} must hold a list of messages, but does not")
    said = [(m.get("role", m.get("from")), m.get("content", m.get("value"))) for m in messages]
    for role, text in said:
        if not isinstance(text, str):
            raise BadRow(f"a message must hold text, but that of {role!r} is a {type(text).__name__}")
    system = f"{said.pop(0)[1]}\n\n" if said and said[0][0] == "system" else ""
    roles = [{"human": "user", "gpt": "assistant"}.get(str(role), str(role)) for role, _ in said]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise BadRow(f"messages must be of user and assistant in turn, but are of {', '.join(roles) or 'none'}")
    texts = [system + said[0][1], *(text for _, text in said[1:])]
    return tuple(Exchange(asked, answered) for asked, answered in zip(texts[::2], texts[1::2]))

"""Reads the rows of text, JSON and Parquet files, and takes a text or a conversation from a row.

    for row in rows_of(source, path):
        text = text_of(row, source.field)              # or, for instructions,
        exchanges = exchanges_of_row(source, row)

A bad row raises BadRow; the rows after it can still be read. A damaged file raises the error of the library that reads it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from config import SourceConfig
from kindling.data.prompts import Exchange
from kindling.json_rows import open_text, read_rows

# the columns for the path of a row's file, and for its repository, in the data sets that we know
PATH_COLUMNS = ("path", "max_stars_repo_path", "url")
REPOSITORY_COLUMNS = ("repo", "max_stars_repo_name", "repo_name")

# the names of roles in the sets that we know
ROLES = {"human": "user", "user": "user", "prompter": "user", "system": "system", "developer": "system"}
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "ai"), "assistant")
MESSAGE_COLUMNS = ("content", "value", "tool_calls", "function_call")
TOOL_ROLES = ("tool", "function", "function_call", "tool_call", "tool_response", "observation", "ipython")


def rows_of(source: SourceConfig, path: Path) -> Iterator[Any]:
    """Yield the rows of a file: strings of a text file, `Row`s of JSON, values of Parquet."""
    if source.kind == "text":
        return _split_text(path, source.separator)
    if source.kind == "parquet":
        return _parquet_rows(path, source)
    column = source.messages_field
    return read_rows(path) if column is None else read_rows(path, lambda value: is_message(value, column))


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


def is_message(value: Any, field: str) -> bool:
    """Return whether a value is a message of a chat, and not a row with its messages in the column `field`."""
    has = value.keys() if isinstance(value, dict) else ()
    return field not in has and ("role" in has or "from" in has) and any(c in has for c in MESSAGE_COLUMNS)


def is_missing(value: Any) -> bool:
    """Return whether a column has no value: null, or the NaN that pandas puts in its place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def text_of(row: dict[str, Any], field: str) -> str:
    """Return the text in a column of a row; raises BadRow if there is none."""
    if isinstance(text := row.get(field), str):
        return text
    given = f"is {_kind(text)}" if field in row else f"is not among {', '.join(map(str, row))[:300] or 'none'}"
    raise BadRow(f"the column {field!r} must hold text, but {given}")


def _kind(value: Any) -> str:
    return "NaN, a missing value" if value is not None and is_missing(value) else f"a {type(value).__name__}"


def exchanges_of_row(source: SourceConfig, row: dict[str, Any]) -> tuple[Exchange, ...]:
    """Return the exchanges of a row of instructions. Only the input may be missing, null or NaN. Raises BadRow."""
    if source.messages_field is not None:
        return _exchanges(row.get(source.messages_field), source.messages_field)
    assert source.response_field is not None
    instruction, response = text_of(row, source.field), text_of(row, source.response_field)
    about = row.get(source.input_field) if source.input_field is not None else None
    if not isinstance(about, str) and not is_missing(about):
        raise BadRow(f"the column {source.input_field!r} must hold text or nothing, but is {_kind(about)}")
    return (Exchange(instruction, response, about if isinstance(about, str) else ""),)


def _exchanges(messages: Any, field: str) -> tuple[Exchange, ...]:
    """Return the exchanges of a list of messages: with `role` and `content`, or with `from` and `value`.

    Of these columns, one that is null does not count. System messages at the beginning are put before the first instruction,
    and messages of one role in a row are one. A conversation that uses tools is refused, as its answers need them.
    """
    if isinstance(messages, dict) and messages and all(isinstance(column, list) for column in messages.values()):
        messages = [dict(zip(messages, of)) for of in zip(*messages.values())]  # `datasets` turns it round
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise BadRow(f"the column {field!r} must hold a list of messages, but does not ({_kind(messages)})")
    said: list[tuple[str, str]] = []
    for message in messages:
        role = _role(message)
        if role == "system" and any(other != "system" for other, _ in said):
            raise BadRow("a system message must stand at the beginning, but one follows a message of another role")
        text = _text_of_message(message, role)
        if role == "system" and not text.strip():
            continue  # an empty one says nothing
        if said and said[-1][0] == role:
            text = f"{said.pop()[1]}\n\n{text}"
        said.append((role, text))
    system = f"{said.pop(0)[1]}\n\n" if said and said[0][0] == "system" else ""
    roles = [role for role, _ in said]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        given = ", ".join(roles[:12]) or "none"
        raise BadRow(f"messages must be of user and assistant in turn, but are of {given}")
    texts = [system + said[0][1], *(text for _, text in said[1:])]
    return tuple(Exchange(asked, answered) for asked, answered in zip(texts[::2], texts[1::2]))


def _role(message: dict[str, Any]) -> str:
    """Return the role of a message, by our name for it; raises BadRow for one that uses tools."""
    given = next((message[name] for name in ("role", "from") if not is_missing(message.get(name))), "nobody")
    role = ROLES.get(str(given).strip().lower(), str(given)[:40])
    if role in TOOL_ROLES or message.get("tool_calls") or message.get("function_call"):
        raise BadRow(f"messages must be of user and assistant, but one of {role} uses tools, which are not read")
    return role


def _text_of_message(message: dict[str, Any], role: str) -> str:
    """Return the text of a message, which may be a list of parts, all of them text; raises BadRow if there is none."""
    text = next((message[name] for name in ("content", "value") if not is_missing(message.get(name))), None)
    if isinstance(text, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in text]
        if not all(isinstance(part, str) for part in parts):
            kinds = [str(part.get("type"))[:40] if isinstance(part, dict) else _kind(part) for part in text]
            raise BadRow(f"a message must hold text, but that of {role!r} has parts of {', '.join(kinds[:8])}")
        return "".join(part for part in parts if isinstance(part, str))
    if not isinstance(text, str):
        raise BadRow(f"a message must hold text, but that of {role!r} is {_kind(text)}")
    return text

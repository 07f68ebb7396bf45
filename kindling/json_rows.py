"""Reads files of JSON rows: JSON Lines, a JSON array, or objects in a row; plain, or packed by gzip or zstd.

    for row in read_rows(Path("rows.jsonl.gz")):
        print(row.line, row.content)      # content is the value, or a `Broken` that says why there is none

Everything that reads other people's rows reads them here. A broken row is a row too, with its line, and costs no more than
itself. Damage to the file as a whole raises one of `DAMAGE`, after the rows before it. Only one row is held in memory, and
of an array or a very long line a few megabytes more.

What is read: UTF-8 with or without a byte-order mark; lines that end in LF, CRLF or CR; blank lines; several objects in one
line; objects over many lines, as jq prints them; NaN and Infinity, as Python writes them. An array is a file that begins
with [ and an object. In a file called .json any list is one. With `is_part`, a list of the parts of a row is a row. A byte
that is not UTF-8 becomes a surrogate (`surrogateescape`), so that only its own row is lost.

Limits: a value of more than 64 MB is broken. After a broken value that does not end in its own line, the reading goes on
at the next value that begins as the others do.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kindling.errors import one_line

DAMAGE = (OSError, EOFError, zlib.error, UnicodeError)  # what a damaged, cut or foreign file raises while it is read
SUFFIXES = (".jsonl", ".ndjson", ".json")  # of files of rows; each may be followed by one of PACKED
PACKED = (".gz", ".zst")
LONGEST_LINE = 2**23  # characters; a longer line is read piece by piece
LONGEST_VALUE = 2**26
CHUNK = 2**20
PASSED = 2**16  # characters before a broken value that are let go
KNOWN_KEYS = 8  # first keys of earlier rows by which the row after a broken one is known
HEAD = 1024  # bytes of a text by which UTF-16 and UTF-32 are known
_TEXT_BOMS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_PRINTABLE = bytes(range(32, 127))
_CHAR = rb"[\t\n\r -~]"  # in ASCII
_WIDE = {  # how a text begins in which each character is of four or of two bytes
    rb"(?:%b\0\0\0){2}|(?:\0\0\0%b){2}|(?:(?!\0\0).[^ -~][\0-\x10]\0){8}|(?:\0[\0-\x10](?!\0\0)[^ -~].){8}": "UTF-32",
    rb"(?:%b\0){2}(?:(?:%b\0){2}|(?:%b\0)?\Z)": "UTF-16",
    rb"(?:\0%b){2}(?:(?:\0%b){2}|(?:\0%b)?\Z)": "UTF-16",
}
_OTHER_PACKERS = {b"PK\3\4": "zip", b"\xfd7zXZ\0": "xz", b"BZh91AY&SY": "bzip2", b"7z\xbc\xaf\x27\x1c": "7-zip"}
_ZSTD = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")  # a frame, or a frame to skip
_GAP = re.compile(r"[\s,\ufeff\x1e]*")  # between two values; \x1e begins one in a JSON text sequence (RFC 7464)
_CUT_TOKEN = 16  # an error this near to the end of what was read can come from a token that is cut there
_FIRST_KEY = re.compile(r'\{\s*("(?:[^"\\\r\n]|\\.){0,200}")\s*:')
_LIST_IN_NEXT_LINE = re.compile(r"[^\r\n]*[\r\n]\s*(?=\[\s*\{)")
_BEFORE_LIST = re.compile(r"(?:[\r\n]|\]\s*,?)\s*(?=\[\s*[{\]])")  # where the next of several lists begins
_parse_value = json.JSONDecoder().raw_decode


class Broken(str):
    """Why a row could not be parsed."""


class Row(NamedTuple):
    """One row of a file: its value, or `Broken`."""

    content: Any
    size: int  # bytes in the unpacked file
    line: int  # where it begins, counted from 1


IsPart = Callable[[Any], bool]


def _never(_: Any) -> bool:
    return False


def is_rows(path: Path) -> bool:
    """Return whether a file's name says that it holds JSON rows."""
    name = path.name.lower()
    return name.endswith(SUFFIXES + tuple(s + p for s in SUFFIXES for p in PACKED))


def n_bytes_of(text: str) -> int:
    """Return the number of bytes of a text in its file, where a surrogate stands for a byte that is not UTF-8."""
    try:
        return len(text.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:  # a surrogate from an escape in JSON
        return len(text.encode("utf-8", "surrogatepass"))


def open_text(path: Path, encoding: str = "utf-8") -> io.TextIOBase:
    """Open a text file for reading, also one that is packed by gzip or zstd, which its first bytes tell.

    Line ends stay as they are, and a bad byte becomes a surrogate, so that the rest of the file can be read. Raises one of
    `DAMAGE` for a text in UTF-16 and for other ways of packing.
    """
    with open(path, "rb") as f:
        head = f.read(HEAD)
    for mark, name in _OTHER_PACKERS.items():
        if head.startswith(mark):
            raise UnicodeError(f"the file must be plain or packed by gzip or zstd, but is {name}; convert it")
    how: dict[str, Any] = {"encoding": encoding, "errors": "surrogateescape", "newline": ""}
    if not (_ZSTD.match(head) or head.startswith(b"\x1f\x8b")):
        _require_utf8(head)
        return open(path, **how)
    inner = b""
    with contextlib.suppress(*DAMAGE), _unpacked(path, head) as f:  # whoever reads the file comes to the damage too
        inner = f.read1(HEAD)
    _require_utf8(inner)
    return io.TextIOWrapper(_unpacked(path, head), **how)


def _unpacked(path: Path, head: bytes) -> Any:
    """Open a file that begins with `head` and is packed by gzip or zstd, as bytes."""
    if head.startswith(b"\x1f\x8b"):
        return gzip.open(path)
    from pyarrow import CompressedInputStream, OSFile

    return CompressedInputStream(OSFile(str(path)), "zstd")


def _require_utf8(head: bytes) -> None:
    """Raise UnicodeError if a text with these first bytes is UTF-16 or UTF-32."""
    marked = (name for mark, name in _TEXT_BOMS.items() if head.startswith(mark))
    if name := next(marked, None) or (_wide_encoding(head) if b"\0" in head else None):
        raise UnicodeError(f"the file must be UTF-8, but is {name}; convert it")


def _wide_encoding(head: bytes) -> str | None:
    """Return UTF-16 or UTF-32 for a text without a mark that has a NUL beside each ASCII character; else None.

    A few NULs in a text are none, nor are many in a row, as a crash leaves them, nor names with a NUL after each.
    """
    for begins, name in _WIDE.items():
        if re.match(begins.replace(b"%b", _CHAR), head, re.DOTALL):
            return name
    for low, high in (head[::2], head[1::2]), (head[1::2], head[::2]):  # a text in Cyrillic has few ASCII characters
        printable = len(high) - len(high.translate(None, _PRINTABLE))
        if high.count(0) >= max(len(high) // 16, 4 * low.count(0), 2 * printable, 4):
            return "UTF-16"
    return None


def usable(row: Row) -> dict[str, Any]:
    """Return the object of a row; raises ValueError, which names the line, if it is broken, no object, or not UTF-8.

    For files of which every row is needed, such as the problems of a benchmark.
    """
    where, content = f"line {row.line:,}", row.content
    if isinstance(content, Broken):
        raise ValueError(f"{where} is {content}")
    if not isinstance(content, dict):
        raise ValueError(f"{where} is a {type(content).__name__}, not an object")
    try:
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where} has text that cannot be decoded as UTF-8") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply") from None
    return content


def read_rows(path: Path, is_part: IsPart = _never) -> Iterator[Row]:
    """Yield the rows of a file in their order. Raises one of `DAMAGE` where it cannot be read further.

    `is_part` says of a value whether it is a part of a row, such as a message of a chat: a list that begins with one is a row.
    """
    with open_text(path, "utf-8-sig") as f:
        number, begun = 1, False
        while line := f.readline(LONGEST_LINE):
            if not line.isspace():
                if not begun and _begins_array(line, path, is_part):
                    yield from _Values(f, line, number, is_part).rows()
                    return
                begun = True
                try:
                    content = json.loads(line)
                except (ValueError, RecursionError) as e:
                    if _goes_on(line, e):
                        yield from _Values(f, line, number, is_part).rows()
                        return
                    yield from _odd_line(line, number, e, is_part)
                else:
                    yield Row(content, n_bytes_of(line), number)
            number += 1


def _begins_array(line: str, path: Path, is_part: IsPart) -> bool:
    """Return whether the first line of a file begins an array of rows. A list of anything else is a row, which is no object."""
    line = line.lstrip("\ufeff \t")
    inside = line[1:].lstrip()[:1]
    if is_part is not _never and re.match(r"\[\s*\[\s*\{", line):
        return True  # of rows that are lists
    return line.startswith("[") and (inside in ("", "{", "]") or (".json" in path.suffixes[-2:] and inside != "["))


def _goes_on(line: str, error: Exception) -> bool:
    """Return whether a line that is not JSON is the beginning of a value over several lines, or a piece of a very long line."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    if len(line) >= LONGEST_LINE:
        return True
    text, at = line.strip(), 0
    while error.msg == "Extra data":  # several values in the line: the last of them may go on
        try:
            at = _parse_value(line, _gap_end(line, at))[1]
        except json.JSONDecodeError as e:
            error = e
        except RecursionError:
            return False
    ends_early = error.pos >= len(line.rstrip()) and not error.msg.startswith("Unterminated string")
    return ends_early and (text.startswith("{") or text == "[")


def _gap_end(text: str, at: int) -> int:
    found = _GAP.match(text, at)
    assert found is not None  # an empty gap is one too
    return found.end()


def _odd_line(line: str, number: int, error: Exception, is_part: IsPart) -> Iterator[Row]:
    """Yield the rows of a line that is not one JSON value: several objects in a row, or else the broken line."""
    rows = list(_Values(io.StringIO(), line, number, is_part).rows())
    if any(isinstance(row.content, dict) for row in rows):
        yield from rows
        return
    why = "not UTF-8: a byte cannot be decoded" if re.search("[\udc80-\udcff]", line) else _why(error)
    yield Row(Broken(why), n_bytes_of(line), number)


def _why(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    # without its line and column, which count from where the text in memory begins
    return f"not JSON: {error.msg if isinstance(error, json.JSONDecodeError) else one_line(error)}"


class _Values:
    """Reads values that stand one after the other, and those in arrays, with commas, spaces, lines or nothing between them."""

    def __init__(self, f: io.TextIOBase, text: str, line: int, is_part: IsPart):
        """`text` was read from `f` already; `line` is the number of its first line."""
        self._f, self._text, self._at, self._line, self._is_part = f, text, 0, line, is_part
        self._inside = 0  # an array: the line where it begins
        self._first_keys: list[str] = []  # of the objects so far, the newest last
        self._indent: str | None = None  # of the next value, if it begins a line
        self._begins_line = True
        self._lists = False  # whether the newest list was a row
        self._n_values = 0  # so far
        self._one_a_line = True  # each value so far began a line, but for the first, which may stand behind the bracket

    def rows(self) -> Iterator[Row]:
        """Yield the rows up to the end of the file."""
        while self._skip_gap():
            bracket = self._text[self._at]
            if bracket == ("]" if self._inside else "[") and (self._inside or not self._list_is_row()):
                self._inside = 0 if self._inside else self._line
                self._advance(self._at + 1)
                continue
            line = self._line
            try:
                content, end = _parse_value(self._text, self._at)
            except (ValueError, RecursionError) as e:
                if not (self._may_be_cut(e) and self._read_more()):
                    yield self._broken(e)
                continue
            if end == len(self._text) and isinstance(content, (int, float)) and self._read_more():
                continue  # the rest of a number may follow
            size = n_bytes_of(self._text[self._at : end])
            self._one_a_line = self._one_a_line and (self._indent is not None or not self._n_values)
            self._n_values += 1
            self._advance(end)
            if isinstance(content, dict) and content and (key := next(iter(content))) not in self._first_keys[-1:]:
                self._first_keys = [*(known for known in self._first_keys[1 - KNOWN_KEYS :] if known != key), key]
            yield Row(content, size, line)
        if self._inside:
            yield Row(Broken("not whole: the list of rows does not end, so the file was cut short"), 0, self._inside)

    def _list_is_row(self) -> bool:
        """Return whether the list that begins here is a row, because its first value is a part of one."""
        if self._is_part is _never:
            return False
        first = self._first_in_list()
        if isinstance(first, Broken) and not self._lists:  # then the next list tells
            if len(self._text) - self._at < CHUNK:
                self._read_more()
            found = _LIST_IN_NEXT_LINE.match(self._text, self._at)
            first = self._first_in_list(found.end() - self._at) if found else None
        self._lists = self._is_part(first) or (self._lists and not isinstance(first, (dict, list)))
        return self._lists

    def _first_in_list(self, begins: int = 0) -> Any:
        """Return the first value of a list that begins `begins` characters further on; `Broken` if it is not JSON."""
        while True:
            try:
                return _parse_value(self._text, _gap_end(self._text, self._at + begins + 1))[0]
            except (ValueError, RecursionError) as e:
                if not (self._may_be_cut(e) and self._read_more()):
                    return Broken(_why(e))

    def _skip_gap(self) -> bool:
        """Go to the beginning of the next value; return whether there is one."""
        while True:
            end = _gap_end(self._text, self._at)
            _, newline, indent = self._text[self._at : end].rpartition("\n")
            begins_line, self._begins_line = newline or self._begins_line, False
            if end > self._at or begins_line:  # else this was already done, before more was read
                self._advance(end)
                self._indent = indent if begins_line else None
            if self._at < len(self._text):
                return True
            if not self._read_more():
                return False

    def _advance(self, end: int) -> None:
        passed = self._text[self._at : end]
        self._line += passed.count("\n") + (passed.count("\r") - passed.count("\r\n") if "\r" in passed else 0)
        self._at, self._indent = end, None

    def _read_more(self) -> bool:
        """Read as much again as is held, so that a long value is parsed few times; return whether there was more."""
        held = self._text[self._at :]
        more = self._f.read(max(CHUNK, len(held)))
        self._text, self._at = held + more, 0
        return bool(more)

    def _may_be_cut(self, error: Exception) -> bool:
        """Return whether a value may be whole when more of the file is read."""
        if not isinstance(error, json.JSONDecodeError) or len(self._text) - self._at > LONGEST_VALUE:
            return False
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _CUT_TOKEN

    def _broken(self, error: Exception) -> Row:
        """Pass a broken value, up to the next one that begins as it does; return it as a row."""
        if self._at > PASSED:  # an error counts the lines of all the text before it
            self._text, self._at = self._text[self._at :], 0
        line, indent, size = self._line, self._indent, 0
        next_value = self._beginning()
        while not (found := next_value.search(self._text, self._at + 1)):
            keep = max(self._at + 1, len(self._text) - 1000)  # the beginning of the next value may be cut
            size += n_bytes_of(self._text[self._at : keep])
            self._advance(keep)
            if not self._read_more():
                size += n_bytes_of(self._text[self._at :])
                self._advance(len(self._text))
                self._inside = 0
                break
        else:
            size += n_bytes_of(self._text[self._at : found.end()])
            self._advance(found.end())
            self._indent = indent if "\n" in found[0] else None
        return Row(Broken(_why(error)), size, line)

    def _beginning(self) -> re.Pattern[str]:
        """Return a pattern for the end of a broken value, before the next one."""
        if self._text[self._at] != "{":
            return _BEFORE_LIST if self._lists else re.compile(r"(?=\{)")
        found = _FIRST_KEY.match(self._text, self._at)
        keys = dict.fromkeys([*([found[1]] if found else []), *map(json.dumps, self._first_keys)])
        if not keys:
            return re.compile(r"[\r\n][ \t]*(?=\{)")
        before = r"[\r\n,}\]]" if self._inside else r"[\r\n}]"
        name = rf"\{{\s*(?:{'|'.join(map(re.escape, keys))})\s*:"
        if self._indent is not None and self._inside and self._one_a_line:
            # what begins inside a line is a part of this value, unless all of the array stands in one line
            next_line = re.compile(rf"[\r\n]\s*(?={name})|[\r\n]{re.escape(self._indent)}(?=\{{)")
            if self._n_values or next_line.search(self._text, self._at + 1):
                return next_line
        same_key = rf"{before}\s*(?={name})"
        return re.compile(same_key if self._indent is None else rf"{same_key}|[\r\n]{re.escape(self._indent)}(?=\{{)")

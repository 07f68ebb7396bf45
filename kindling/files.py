"""Writing files so that no file is left half written, and their hashes.

What is written holds strings that came from outside: columns, file names, errors, model output. Half of a surrogate pair in
one, or a byte that was not UTF-8, is written as its escape (`\\udce9`), so that no write fails for it. In JSON the escape
stands for the same string when it is read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

UNENCODABLE = "backslashreplace"  # how a character that UTF-8 cannot hold is written


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """Return the sha256 of a text in UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", UNENCODABLE)).hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Replace a file by `content` as indented JSON, or leave it as it is and raise OSError."""
    write_atomic(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8."""
    path.write_text(text, encoding="utf-8", errors=UNENCODABLE)


@lru_cache(maxsize=256)  # a few labels stand in millions of rows
def printable(text: str, limit: int = 64) -> str:
    """Return a name from outside as a label that can be written anywhere: one line of at most `limit` characters.

    Example: `printable("a\\udce9\\n")` is `a\\\\udce9`.
    """
    if len(text) <= limit and text.isprintable() and " " not in text:  # nearly always
        return text
    text = " ".join(text[: 4 * limit].split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)[:limit]


def sync(path: Path) -> None:
    """Force a file's or directory's content to disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no directories
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError:  # some filesystems cannot sync a directory
        if path.is_file():
            raise
    finally:
        os.close(fd)


def append_line(path: Path, line: str) -> None:
    """Append a whole line to a file, or nothing; raises OSError if it cannot."""
    with open(path, "ab", buffering=0) as f:
        size, content = f.seek(0, 2), line.encode("utf-8", UNENCODABLE) + b"\n"
        try:
            if f.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            f.truncate(size)
            raise


def write_atomic(path: Path, text: str) -> None:
    """Replace a small file by `text`, or leave it as it is and raise OSError."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write_text(partial, text)
        sync(partial)
        partial.replace(path)
    except OSError:  # such as a full disk, where the partial file would waste space
        partial.unlink(missing_ok=True)
        raise


def with_checksum(content: dict[str, Any]) -> dict[str, Any]:
    """Return `content` with its own sha256, which `checksum_matches` checks."""
    said = {key: value for key, value in content.items() if key != "sha256"}
    return {**said, "sha256": sha256_text(json.dumps(said, sort_keys=True, ensure_ascii=True))}


def checksum_matches(content: dict[str, Any]) -> bool:
    """Return whether `content` is unchanged since its checksum was added. Without a sha256, from an old version: True."""
    return "sha256" not in content or with_checksum(content)["sha256"] == content["sha256"]


@contextlib.contextmanager
def locked(path: Path, busy: Exception, unwritable: Callable[[OSError], Exception]) -> Iterator[None]:
    """Hold a lock on the file `path`, which is made, with its folder.

    Raises `busy` if another process holds it, and what `unwritable` returns if it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = open(path, "w", encoding="utf-8")
    except OSError as e:
        raise unwritable(e) from None
    with held:
        try:
            import fcntl

            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows has no fcntl
            pass
        except BlockingIOError:
            raise busy from None
        except OSError as e:  # a filesystem without locks
            print(f"note: {path} cannot be locked ({e}); make sure that no other process uses it", file=sys.stderr)
        yield

"""Writing files so that no file is left half written, and their hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """Return the sha256 of a text in UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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
        size, content = f.seek(0, 2), line.encode("utf-8") + b"\n"
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
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(path)
    except OSError:  # such as a full disk, where the partial file would waste space
        partial.unlink(missing_ok=True)
        raise

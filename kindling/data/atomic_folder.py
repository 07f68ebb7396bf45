"""A data folder appears whole or not at all, and what a killed build has left is cleared away.

with atomic_folder(Path("data/demo-0123456789ab")) as partial:
    (partial / "train.bin").write_bytes(tokens)
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from kindling.data.shards import DataError


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill, and rename it to `folder` at the end: a killed process leaves no half folder.

    If another process was faster, its folder stays. Raises DataError for a disk that is full or not writable.
    """
    partial = folder.with_name(f".building-{folder.name}@{platform.node()}@{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for old in folder.parent.glob(".building-*"):
            if _stale(old):
                shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    except OSError as e:
        raise DataError(
            f"{folder.parent}/ must be writable and have room for the shards, but writing gave: {e}; "
            f"free some space, or run from a folder on another disk"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _stale(folder: Path) -> bool:
    """Return whether the process that was building this folder has ended."""
    _, host, pid = folder.name.rsplit("@", 2) if folder.name.count("@") > 1 else ("", "", "")
    if host != platform.node() or not pid.isdigit():  # processes of another machine cannot be seen
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False

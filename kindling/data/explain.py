"""Explains what happened to a file or row in a build, and finds the document of a token: for --explain and --locate."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from config import Config
from kindling.data.ledger import DOCUMENTS, explain, locate
from kindling.data.shards import SPLITS, DataError
from kindling.data.sources import WHOLE_FILES, local_files, source_roots
from kindling.errors import KindlingError
from kindling.paths import expand_home


def explain_path(cfg: Config, folder: Path, path: str) -> str:
    """Return what the log says about `path`. Raises DataError, which says why, if it is not in the log."""
    keys, why = set(), []
    try:
        given = expand_home(path, "--explain")
    except KindlingError:  # a document may be called ~.py
        given = Path(path)
    for source in cfg.data.sources if given.is_file() else ():
        for prefix, root in source_roots(source).items() if source.kind in WHOLE_FILES else ():
            if not given.resolve().is_relative_to(root.resolve()):
                continue
            key = prefix + given.resolve().relative_to(root.resolve()).as_posix()
            keys.add(key)
            if key in {f.key for f in local_files(source)}:
                why.append("the build ended before it: see data.max_tokens and data.stopping_strategy")
            elif key in {f.key for f in local_files(dataclasses.replace(source, max_bytes=None, max_documents=None))}:
                why.append(f"the max_bytes or max_documents of {source.label} end before it")
            else:
                why.append(f"it matches none of {', '.join(source.file_globs)}, or lies in a hidden folder")
    if found := explain(folder, keys, "" if keys else path):
        return "\n".join(found)
    raise DataError(
        f"--explain must name a document that was read, but {path!r} was not "
        f"({'; '.join(why) or 'no document has a name that ends so'}); "
        f"all names are in {folder / DOCUMENTS}"
    )


def locate_token(folder: Path, place: str) -> str:
    """Return the document of the token at SPLIT:POSITION, as a sentence."""
    split, _, position = place.partition(":")
    if split not in SPLITS or not position.isdecimal():
        raise DataError(
            f"--locate must be SPLIT:POSITION, such as train:123456, but is {place!r}; splits: {', '.join(SPLITS)}"
        )
    line = locate(folder, split, int(position))
    return (
        f"{line['key']} ({line['source']}, {line['language']}): its tokens are {split}:{line['start']} to "
        f"{split}:{line['start'] + line['tokens'] - 1}, the one asked for is number {int(position) - line['start']:,} of them"
    )

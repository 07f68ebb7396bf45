"""What a study reads where the hub's data sets are not used: local files of the same form, each with its name for the table.

    inputs = Inputs(prose=Path("stories.txt"))
    source, said = inputs.python(20_000_000)

Without a flag, code is this machine's Python. Prose is its docstrings, and mathematics is made up; both are written once, into
sources/ of the study's folder, as rows with a column `text`.
"""

from __future__ import annotations

import ast
import json
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from config import SourceConfig
from kindling.data.sources import local_files
from kindling.errors import KindlingError
from kindling.files import write_atomic

FOLDER = "sources"
PARAGRAPHS = 200  # characters of a docstring that counts as prose, at least


class Named(NamedTuple):
    """A source of documents, and what to call it in the table."""

    source: SourceConfig
    said: str


@dataclass(frozen=True)
class Inputs:
    """The files that a user gave; None: the stand-ins of this machine."""

    folder: Path = Path()
    """The study's folder, for what is written."""
    preset: bool = False
    """Use the data of the preset, from the hub."""
    sandbox: bool = True
    """Whether generated code can be run here."""
    code: Path | None = None
    prose: Path | None = None
    mathematics: Path | None = None
    instructions: Path | None = None
    harness_data: Path | None = None
    """A folder with the data of lm-evaluation-harness's tasks."""
    harness: bool = False
    """Whether lm-eval is installed."""
    globs: tuple[str, ...] | None = None
    """Which files of this machine's Python the stand-ins are from. None: all."""

    def code_source(self, max_bytes: int) -> Named:
        """Return code: the user's rows or files, else this machine's Python."""
        if self.code is None:
            source = SourceConfig(kind="local-python", globs=self.globs, max_bytes=max_bytes)
            return Named(source, f"this machine's Python, {max_bytes / 1e6:.0f} MB at most")
        return Named(_of_path(self.code, "content", max_bytes), self.code.name)

    def prose_source(self, max_bytes: int) -> Named:
        """Return prose: the user's, else the docstrings of this machine's Python."""
        if self.prose is not None:
            return Named(_of_path(self.prose, "text", max_bytes, "english"), self.prose.name)
        path = self._named("prose", max_bytes)
        return Named(_rows(path, "english", max_bytes), "the docstrings of this machine's Python")

    def mathematics_source(self, max_bytes: int) -> Named:
        """Return mathematics: the user's, else sums that are made up, worked step by step."""
        if self.mathematics is not None:
            return Named(_of_path(self.mathematics, "text", max_bytes, "english"), self.mathematics.name)
        path = self._named("mathematics", max_bytes)
        return Named(_rows(path, "english", max_bytes), "sums that were made up")

    def instructions_source(self, max_bytes: int) -> Named:
        """Return instructions: the user's rows in Alpaca's columns, else the documented functions of this machine's Python."""
        if self.instructions is not None:
            _require_there(self.instructions)
            path = str(self.instructions.resolve())
            source = SourceConfig(
                kind="jsonl", path=path, language="python", max_bytes=max_bytes,
                field="instruction", input_field="input", response_field="output",
            )  # fmt: skip
            return Named(source, self.instructions.name)
        source = SourceConfig(kind="docstrings", globs=self.globs, language="python", max_bytes=max_bytes)
        return Named(source, "the documented functions of this machine's Python")

    def write(self, source: SourceConfig) -> None:
        """Write the file of a stand-in, unless it is there; a plan only names it."""
        path = Path(source.path or "")
        if path.parent != self.folder.resolve() / FOLDER or path.is_file():
            return
        print(f"writing {path.name}, once; it takes a minute or two ...", flush=True)
        rows, size, unread = [], 0, list[Path]()
        for text in prose_of_docstrings(unread, self.globs) if path.name.startswith("prose") else sums():
            rows.append(json.dumps({"text": text}) + "\n")
            size += len(rows[-1])
            if size >= (source.max_bytes or 0):
                break
        if unread:
            print(f"note: files that cannot be parsed are left out: {len(unread)}, such as {unread[0]}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, "".join(rows))

    def _named(self, name: str, max_bytes: int) -> Path:
        """Return the file of a stand-in of so many bytes."""
        return self.folder.resolve() / FOLDER / f"{name}-{max_bytes // 1_000_000}MB.jsonl"


def _rows(path: Path, language: str, max_bytes: int) -> SourceConfig:
    return SourceConfig(kind="jsonl", path=str(path), field="text", language=language, max_bytes=max_bytes)


def _require_there(path: Path) -> None:
    if not path.exists():
        raise KindlingError(f"a study's data must be a file or folder that exists, but {path} is not; check the path")


def _of_path(path: Path, field: str, max_bytes: int, language: str | None = None) -> SourceConfig:
    """Return a source of what a user named: rows, a text with separators, or a folder of files."""
    _require_there(path)
    given = str(path.resolve())
    if path.is_dir():
        return SourceConfig(
            kind="files", path=given, globs=("**/*.py", "**/*.c", "**/*.h", "**/*.java"), max_bytes=max_bytes
        )
    if ".jsonl" in path.suffixes or ".json" in path.suffixes:
        return SourceConfig(kind="jsonl", path=given, field=field, language=language, max_bytes=max_bytes)
    return SourceConfig(kind="text", path=given, language=language, max_bytes=max_bytes)


def prose_of_docstrings(unread: list[Path], globs: tuple[str, ...] | None = None) -> Iterator[str]:
    """Yield the longer docstrings of this machine's Python, or of the files that match, each once, in their fixed order.

    Files that cannot be read or parsed are added to `unread`.
    """
    seen: set[str] = set()
    for file in local_files(SourceConfig(kind="local-python", globs=globs)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(file.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
            unread.append(file.path)
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node) or ""
                if len(text) >= PARAGRAPHS and text not in seen:
                    seen.add(text)
                    yield text


def sums(seed: int = 0, held_out: bool = False) -> Iterator[str]:
    """Yield worked sums, without end; the same for the same seed. One sum of 20 is only among those that are held out."""
    rng = random.Random(seed)
    while True:
        lines: list[str] = []
        n = rng.randint(3, 8)
        while len(lines) < n:
            a, b, c = (rng.randint(2, 99) for _ in range(3))
            total = a + b
            if ((a + 3 * b + 7 * c) % 20 == 0) != held_out:
                continue
            lines.append(
                f"Add {a} and {b}, then multiply by {c}. {a} + {b} = {total}, and {total} * {c} = {total * c}."
            )
        yield "\n".join(lines)

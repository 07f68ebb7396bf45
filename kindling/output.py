"""What a script prints: a text ends with a newline, and a reader that ends first is no error; imports no heavy library."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO

READER_ENDED = 128 + 13  # the exit code of a program that SIGPIPE ends, as a shell shows it


def wants_color(stream: TextIO) -> bool:
    """Return whether to write in colour: to a terminal, unless NO_COLOR is set (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


class TextPrinter:
    """Prints pieces of a text as they come. `end` adds a newline, unless the text ends with one or is empty."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, piece: str) -> None:
        """Print a piece at once."""
        print(piece, end="", flush=True)
        self._last = piece or self._last

    def end(self) -> None:
        """End the text, on a terminal and in a pipe alike."""
        if self._last and not self._last.endswith("\n"):
            print(flush=True)


@contextlib.contextmanager
def silent_if_reader_ends() -> Iterator[None]:
    """Flush the output at the end. If the program that reads it, such as `head`, has ended: exit, and say nothing."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):  # Python flushes them once more when it ends
            with contextlib.suppress(OSError, ValueError):
                os.dup2(nowhere, stream.fileno())
        raise SystemExit(READER_ENDED) from None

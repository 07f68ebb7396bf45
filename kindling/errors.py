"""Errors that a user can fix. Each is one line: what must hold, what was given, and how to fix it.

Imports no heavy library, so a script can check its command line first.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any


class KindlingError(Exception):
    """An error that the user can fix. Its text is one line: what must hold, what was given, how to fix it."""


def one_line(error: BaseException, limit: int = 200) -> str:
    """Return the class and the text of an error in one line, the text cut to `limit` characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:limit]}"


def says_out_of_memory(error: RuntimeError) -> bool:
    """Return whether the text of an error says that a tensor did not fit into memory: on CUDA, on MPS or on the CPU."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    return any(word in str(error).lower() for word in words)


class ConfigError(KindlingError):
    """A setting that cannot be used."""


class CheckpointError(KindlingError):
    """A run or checkpoint cannot be found, trusted, written or loaded."""


def require(holds: bool, field: str, must: str, given: Any, mend: str) -> None:
    """Raise a ConfigError of one line unless `holds`.

    It is not a ValueError, because pydantic and tyro would put that into a longer text of their own.
    """
    if not holds:
        raise ConfigError(f"{field} must be {must}, but is {given!r}; {mend}")


def require_range(
    section: str, cfg: Any, low: float, *fields: str, high: float = math.inf, open_low: bool = False
) -> None:
    """Raise ConfigError unless each named field is None or a finite number in [low, high]; `open_low`: in (low, high]."""
    for field in fields:
        value = getattr(cfg, field)
        if value is None:
            continue
        above = value > low if open_low else value >= low
        must = f"{'above' if open_low else 'at least'} {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
        require(
            math.isfinite(value) and above and value <= high,
            f"{section}.{field}",
            must,
            value,
            f"set --{section}.{field.replace('_', '-')}",
        )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of an error about an unknown word: the most similar known words, or all of them."""
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(known)}"


AROUND = 3  # characters of the text that a difference shows on either side of what was changed
LONGEST = 24


def difference(text: str, back: str) -> str:
    """Return where `back` first differs from `text`, in ASCII: "'e\\u0301' comes back as '\\xe9'"."""
    shorter = min(len(text), len(back))
    start = next((i for i in range(shorter) if text[i] != back[i]), shorter)
    same = next((i for i in range(shorter - start) if text[-i - 1] != back[-i - 1]), shorter - start)
    begin = max(0, start - AROUND)
    ours, theirs = (part[begin : len(part) - max(0, same - AROUND)] for part in (text, back))
    return f"{_shown(ours)} comes back as {_shown(theirs)}"


def _shown(text: str) -> str:
    return ascii(text[:LONGEST]) + ("..." if len(text) > LONGEST else "")


class TokenizerError(KindlingError):
    """A tokenizer cannot be loaded or trained, or cannot encode a text."""

    rule = "not in the vocabulary"
    """What the ledger calls a document that is dropped for it."""

    @property
    def reason(self) -> str:
        """The text without its way out, for the ledger."""
        return str(self).rpartition(";")[0]

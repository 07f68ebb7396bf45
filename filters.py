"""Filters: pure functions of a document's text that say which rule drops it.

The compile() of the syntax filter runs on strangers' code. What it can raise is caught here; what can kill or hang the
process is the business of `workers.py`, which runs the filters.
"""

from __future__ import annotations

import warnings

from config import DataConfig

COMPILE_BYTES = 256 * 1024  # larger sources are refused unread: compile() can take seconds and gigabytes on them
ALPHANUMERIC = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def reason_to_drop(text: str, language: str, cfg: DataConfig) -> str | None:
    """Return the name of the first filter that refuses the document, or None. Seed 000's filters, in its order."""
    if not cfg.min_chars <= len(text) <= cfg.max_chars:
        return "characters"
    if not cfg.min_lines <= text.count("\n") + (not text.endswith("\n")) <= cfg.max_lines:
        return "lines"
    if alphanumeric_share(text) < cfg.min_alphanumeric:
        return "alphanumeric"
    if cfg.check_syntax and language == "python" and not compiles(text):
        return "syntax"
    return None


def alphanumeric_share(text: str) -> float:
    """Return the share of the characters that are letters or digits, as str.isalnum says; 0 for an empty text."""
    raw = text.encode("utf-8")
    count = len(raw) - len(raw.translate(None, ALPHANUMERIC))
    if not text.isascii():
        count += sum(c.isalnum() for c in text if c > "\x7f")
    return count / max(1, len(text))


def compiles(text: str) -> bool:
    """Return whether this interpreter's compile() accepts `text`; it is not run. Sources over 256 KiB are refused.

    Strangers' code can make compile() raise all of these; what kills the process instead is the worker pool's part.
    """
    if len(text.encode("utf-8")) > COMPILE_BYTES:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compile(text, "<document>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, MemoryError, RecursionError, OverflowError):
            return False
    return True

"""Filters: pure functions of one document that say which rule drops it, and the value that the rule objects to.

The syntax filter calls compile() on unknown code. Its exceptions are caught here. It can also kill or hang the process;
`workers.py`, which runs the filters, survives that. The marks of generators are in `generated.py`, duplicates in
`duplicates.py`, problems of benchmarks in `decontamination.py`.
"""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from config import DataConfig
from kindling.data.generated import generated_file_reason

COMPILE_BYTES = 256 * 1024  # larger sources are refused unread: compile() can take seconds and gigabytes on them
PARSER_CALLS = 984  # what Python's default recursion limit of 1,000 leaves to compile() in a worker of the data build
ALPHANUMERIC = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


class Drop(NamedTuple):
    """Why a document was dropped: the rule's name in the ledger, and the value that it objected to."""

    rule: str
    value: str


def first_failed_filter(text: str, path: str, language: str, cfg: DataConfig) -> Drop | None:
    """Return the first filter that refuses the document, or None. Slow filters come last.

    `path` is the path inside the document's repository or folder, or empty if unknown.
    """
    if "\0" in text:
        return Drop("NUL", f"a NUL at character {text.index(chr(0))}: binary, not text")
    if cfg.drop_tests and (why := evidence_of_test_file(text, path, language)):
        return Drop("test file", why)
    if cfg.drop_generated and (line := generated_file_reason(text, language)):
        return Drop("generated", f"{line!r}")
    if not cfg.min_chars <= len(text) <= cfg.max_chars:
        return Drop("characters", f"{len(text):,}, not {cfg.min_chars:,} to {cfg.max_chars:,}")
    n_lines = text.count("\n") + (not text.endswith("\n"))
    if not cfg.min_lines <= n_lines <= cfg.max_lines:
        return Drop("lines", f"{n_lines:,}, not {cfg.min_lines:,} to {cfg.max_lines:,}")
    if cfg.max_line_chars is not None:
        longest = max(map(len, text.split("\n")))
        if longest > cfg.max_line_chars:
            return Drop("line length", f"{longest:,} characters, above {cfg.max_line_chars:,}")
    if not text.isascii() and (share := non_ascii_share(text)) > cfg.max_non_ascii:
        return Drop("non-ASCII", f"{share:.3f} of the characters, above {cfg.max_non_ascii}")
    if cfg.min_alphanumeric > 0 and (share := alphanumeric_share(text)) < cfg.min_alphanumeric:
        return Drop("alphanumeric", f"{share:.3f} of the characters, below {cfg.min_alphanumeric}")
    if cfg.check_syntax and language == "python" and (error := syntax_error(text)):
        return Drop("syntax", error)
    return None


def alphanumeric_share(text: str) -> float:
    """Return the share of the characters that are letters or digits, as str.isalnum says; 0 for an empty text."""
    raw = text.encode("utf-8")
    count = len(raw) - len(raw.translate(None, ALPHANUMERIC))
    if not text.isascii():
        count += sum(c.isalnum() for c in text if c > "\x7f")
    return count / max(1, len(text))


def non_ascii_share(text: str) -> float:
    """Return the share of the characters above U+007F; 0 for an empty text."""
    return (len(text) - len(text.encode("ascii", "ignore"))) / max(1, len(text))


_TEST_FOLDERS = {"test", "tests", "__tests__"}  # not testing: numpy/testing and the like are libraries
_TEST_NAME = re.compile(
    r"(test_.*|.*_tests?|conftest)\.(py|pyi|c|h)"
    r"|(Test[A-Z0-9]\w*|\w*(Tests?|TestCase|IT))\.java"  # Test and a capital: Testament.java is none
)
_TEST_SUITE = {
    "python": re.compile(r"^class \w+\([^)\n]*\bTestCase\b", re.MULTILINE),
    "java": re.compile(r"^[ \t]*@(Parameterized)?Test\b", re.MULTILINE),
}


def evidence_of_test_file(text: str, path: str, language: str) -> str | None:
    """Return what shows that a document is a test file, or None. The rules are those of the preset `autocomplete`."""
    *folders, name = path.split("/")
    if found := _TEST_FOLDERS.intersection(f.lower() for f in folders):
        return f"a folder called {min(found)}"
    if _TEST_NAME.fullmatch(name):
        return f"the name {name}"
    suite = _TEST_SUITE.get(language)
    if suite is not None and (match := suite.search(text)):
        return f"{match[0].strip()!r}"
    return None


# possessive and atomic: no backtracking over blanks, and a block ends at its first end mark
_C_BLOCKS = re.compile(r"\s*+((?>/\*.*?\*/)[ \t\r]*+(?:\n|\Z)|(?:[ \t]*+//[^\n]*+(?:\n|\Z))++)", re.DOTALL)
_PYTHON_BLOCKS = re.compile(
    r"\s*+((?:[ \t]*+#[^\n]*+(?:\n|\Z))++|(?>[rRuU]?(\"\"\"|''').*?\2)[ \t\r]*+(?:\n|\Z))", re.DOTALL
)
_PYTHON_MARKS = re.compile(r"(?:#![^\n]*\n)?(?:#[^\n]*coding[:=][^\n]*\n)?")  # these lines are kept


def strip_header(text: str, language: str, max_lines: int) -> str:
    """Return `text` without the comment blocks and docstrings at its start that have more than `max_lines` lines.

    A rule of the preset `autocomplete`.
    """
    if language not in ("python", "c", "java"):
        return text
    blocks = _PYTHON_BLOCKS if language == "python" else _C_BLOCKS
    found = _PYTHON_MARKS.match(text) if language == "python" else None
    marks = found[0] if found else ""
    kept, position = [marks], len(marks)
    while match := blocks.match(text, position):
        if match[1].rstrip("\n").count("\n") + 1 <= max_lines:
            kept.append(match[0])
        position = match.end()
        if language == "python" and match[2]:
            break  # the docstring ends the header; a second string would be an expression
    return "".join(kept) + text[position:]


@contextlib.contextmanager
def fixed_parser_limits() -> Iterator[None]:
    """Give Python's parser the same limits whatever this process has done before, and no warnings.

    How deep a source may be nested follows from the recursion limit, less the calls that are under way. A process that has
    compiled a model has another recursion limit, for example. (From Python 3.12 on, the parser has a limit of its own.)
    """
    calls, digits = sys.getrecursionlimit(), sys.get_int_max_str_digits()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.set_int_max_str_digits(sys.int_info.default_max_str_digits)
        sys.setrecursionlimit(_stack_depth() + PARSER_CALLS)
        try:
            yield
        finally:
            sys.setrecursionlimit(calls)
            sys.set_int_max_str_digits(digits)


def _stack_depth() -> int:
    """Return the number of calls that are under way, as the recursion limit counts them: those in C too."""
    try:
        sys.setrecursionlimit(1)  # always too low: changes nothing, and the error says how deep the stack is
    except RecursionError as e:
        found = re.search(r"depth (\d+)", str(e))
        assert found, f"CPython words its error otherwise: {e}"
        return int(found[1])
    raise AssertionError("a recursion limit of 1 was accepted")


def compiled(text: str, flags: int = 0) -> Any:
    """Return compile()'s code object of `text`, or with ast.PyCF_ONLY_AST its syntax tree; the code is not run.

    Raises SyntaxError, ValueError, MemoryError, RecursionError or OverflowError as a function of the text alone.
    """
    arguments = (text, "<document>", "exec", flags, True)  # True: without the __future__ imports of this file
    with fixed_parser_limits():
        return compile(*arguments)  # with *: else the first calls, which are slower, count as one more in C


def syntax_error(text: str) -> str | None:
    """Return why this Python's compile() refuses `text`, or None. The code is not run. Sources over 256 KiB are refused.

    Unknown code can also make compile() kill the process, so call this in a worker process.
    """
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > COMPILE_BYTES:
        return f"{size:,} bytes, and compile() is given at most {COMPILE_BYTES:,}"
    try:
        compiled(text)
    except SyntaxError as e:
        return f"line {e.lineno}: {e.msg}"
    except (ValueError, MemoryError, RecursionError, OverflowError) as e:
        return f"{type(e).__name__} {e}".strip()
    return None

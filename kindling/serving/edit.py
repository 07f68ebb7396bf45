"""What an editor shows at its cursor, from what a model writes there: a few lines that fit between prefix and suffix.

    shown = EditText(Edit(prefix="    print(", suffix=")\\n", max_lines=1))
    shown.add('"a")\\n')         # '"a"': the closing bracket is there already
    shown.finish(complete=True)  # the text that was held back and may be said

Text is held back while a later token may still take it away: white space, a beginning of the suffix, a line of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

PAIRS = {")": "(", "]": "[", "}": "{"}
QUOTES = "\"'`"


@dataclass(frozen=True)
class Edit:
    """Rules for text at an editor's cursor."""

    prefix: str = ""
    """The text before the cursor, or as much of it as holds the cursor's line."""
    suffix: str = ""
    """The text after the cursor: a completion ends before it would repeat the beginning of it."""
    max_lines: int | None = None
    stop_at_dedent: bool = False
    """End before a line that is indented less than the line of the cursor."""
    min_confidence: float = 0.0
    """Answer with no text if the mean probability of its tokens is below this. Above 0, all text is said at the end."""


class _Overlaps:
    """How much of the end of a growing text is the beginning of a suffix. Source: Knuth, Morris and Pratt, 1977."""

    def __init__(self, suffix: str):
        self._suffix = suffix
        self._longest = [0]  # before each place of the text
        self._shorter = [0, 0]  # for each overlap that was found, the next one that the same end of the text has

    def add(self, piece: str) -> None:
        """Read on in the text."""
        for c in piece:
            n = self._longest[-1]
            if n == len(self._shorter) - 1 and 0 < n < len(self._suffix):
                self._shorter.append(self._after(self._shorter[n], self._suffix[n]))
            self._longest.append(self._after(n, c))

    def _after(self, n: int, c: str) -> int:
        """Return the longest overlap after the character `c`, given that before it."""
        while n == len(self._suffix) or self._suffix[n] != c:
            if n == 0:
                return 0
            n = self._shorter[n]
        return n + 1

    def before(self, end: int) -> Iterator[int]:
        """Yield how many of the characters before a place are the beginning of the suffix: the most, then fewer, then 0."""
        n = self._longest[end]
        while n:
            yield n
            n = self._shorter[n]
        yield 0


class EditText:
    """The part of a text that may be shown at a cursor, as the text comes."""

    def __init__(self, edit: Edit):
        self._edit = edit
        self._before = edit.prefix.rpartition("\n")[2]  # the cursor's line, up to the cursor
        self._indent = _indentation(self._before)
        self._rest = edit.suffix.partition("\n")[0].rstrip()  # of the cursor's line
        self._next = _next_line(self._before, edit.suffix)
        self._overlaps = _Overlaps(edit.suffix)
        self._text = ""
        self._line = 0  # where the last line of the text begins; the lines before it have been judged
        self._n_lines = 0  # with anything in them
        self._n_open = 0  # brackets of the text, of whatever kind, that its judged lines leave open
        self._end: int | None = None  # of the text, if a rule has ended it
        self._n_said = 0

    @property
    def ended(self) -> bool:
        """A rule has ended the text."""
        return self._end is not None

    def add(self, piece: str) -> str:
        """Return the text that may be said after this piece."""
        self._text += piece
        self._overlaps.add(piece)
        while not self.ended and (end := self._text.find("\n", self._line)) >= 0:
            self._judge(end, whole=True)
            self._line = end + 1
        if not self.ended:
            self._judge(len(self._text), whole=False)
        return "" if self.ended else self._say(self._safe_end())

    def finish(self, complete: bool) -> str:
        """Return the text that was held back. `complete`: the text has ended by itself, not at a limit."""
        end = self._end
        if end is None:
            end = len(self._text)
            line = self._full(self._text[self._line :]).rstrip()
            if self._next and line.strip() and (line == self._next or (not complete and self._next.startswith(line))):
                end = self._end_before_next()
        end = self._without_suffix(end)
        return self._say(end)

    def _judge(self, end: int, whole: bool) -> None:
        """End the text at or before its last line, which goes up to `end`, if a rule says so."""
        line = self._text[self._line : end]
        if not line.strip():
            return
        full = self._full(line)
        falls_back = self._line > 0 and self._edit.stop_at_dedent and _indentation(line) < self._indent
        if falls_back:
            self._end = self._end_before_line()
        elif whole and self._next and full.rstrip() == self._next:
            self._end = self._end_before_next()
        elif whole:
            self._n_lines += 1
            if self._n_lines == self._edit.max_lines or self._may_end_before_rest(line):
                self._end = len(self._text[:end].rstrip())

    def _may_end_before_rest(self, line: str) -> bool:
        """Return whether the rest of the line that the cursor is inside may follow here: after a later line it would be wrong."""
        for c in line:
            self._n_open = max(0, self._n_open + (c in PAIRS.values()) - (c in PAIRS))
        is_inside = bool(self._rest and self._before.strip())
        return is_inside and (self._n_open == 0 or line.rstrip().endswith(self._rest))

    def _full(self, line: str) -> str:
        """Return the last line of the text as it stands in the file, or "" for the rest of a line that began before."""
        if self._line > 0:
            return line
        return self._before + line if not self._before.strip() else ""

    def _end_before_line(self) -> int:
        return len(self._text[: self._line].rstrip())

    def _end_before_next(self) -> int:
        """Return the end of a text whose last line is the next one: the line that the cursor begins stays a line of its own."""
        if self._line > 0 and self._rest and not self._before.strip():
            return self._line + len(self._before)
        return self._end_before_line()

    def _safe_end(self) -> int:
        """Return up to where the text stays as it is, whatever comes."""
        text = self._text
        ends = [len(text), len(text.rstrip())]
        line = self._full(text[self._line :])
        if line.strip() and self._next and self._next.startswith(line.rstrip()):
            ends.append(self._end_before_line())
        return min(end - next(self._overlaps.before(end)) for end in ends)

    def _without_suffix(self, end: int) -> int:
        """Return `end`, or where the suffix's beginning is repeated before it."""
        n = next(n for n in self._overlaps.before(end) if n == 0 or self._is_repeated(end, n))
        return end if self._is_needed_twice(end, n) else end - n

    def _is_repeated(self, end: int, n: int) -> bool:
        """Return whether the last `n` characters are no mere end of a word: `data` before `a, b` repeats nothing."""
        around = self._text[max(0, end - n - 1) : end - n + 1]
        inside_word = len(around) == 2 and all(c.isalnum() or c == "_" for c in around)
        return not inside_word or (bool(self._rest) and n >= len(self._rest))

    def _is_needed_twice(self, end: int, n: int) -> bool:
        """Return whether the last `n` characters are only brackets and quotes, and all pairs are complete with them."""
        repeated = self._text[end - n : end]
        if repeated.strip("".join(PAIRS) + QUOTES):
            return False
        code = self._before + self._text[:end] + self._rest
        return all(
            code.count(c) % 2 == 0 if c in QUOTES else code.count(c) <= code.count(PAIRS[c]) for c in set(repeated)
        )

    def _say(self, end: int) -> str:
        new = self._text[self._n_said : end] if self._text[:end].strip() else ""
        self._n_said += len(new)
        return new


def _indentation(line: str) -> int:
    """Return the width of the white space at the beginning of a line."""
    line = line.expandtabs(8)
    return len(line) - len(line.lstrip())


def _next_line(before: str, suffix: str) -> str:
    """Return the first line of the file that stands whole after the cursor and is not blank, without white space at its end."""
    rest, *lines = suffix.split("\n")
    if not before.strip():
        lines = [before + rest, *lines]
    return next((line.rstrip() for line in lines if line.strip()), "")

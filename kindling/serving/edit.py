"""What an editor shows at its cursor, from what a model writes there: a few lines that fit between prefix and suffix.

    shown = EditText(Edit(prefix="    print(", suffix=")\\n", max_lines=1))
    shown.add('"a")\\n')         # '"a"': the closing bracket is there already
    shown.finish(complete=True)  # the text that was held back and may be said

Text is held back while a later token may still take it away: white space, a beginning of the suffix, a line of it.
"""

from __future__ import annotations

from kindling.serving.generation import Edit

PAIRS = {")": "(", "]": "[", "}": "{"}


class EditText:
    """The part of a text that may be shown at a cursor, as the text comes."""

    def __init__(self, edit: Edit):
        self._edit = edit
        self._before = edit.prefix.rpartition("\n")[2]  # the cursor's line, up to the cursor
        self._indent = _indentation(self._before)
        self._next = _next_line(self._before, edit.suffix)
        self._text = ""
        self._line = 0  # where the last line of the text begins; the lines before it have been judged
        self._n_lines = 0  # with anything in them
        self._end: int | None = None  # of the text, if a rule has ended it
        self._n_said = 0

    @property
    def ended(self) -> bool:
        """A rule has ended the text."""
        return self._end is not None

    def add(self, piece: str) -> str:
        """Return the text that may be said after this piece."""
        self._text += piece
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
                end = self._end_before_line()
        end = self._without_suffix(end)
        return self._say(end)

    def _judge(self, end: int, whole: bool) -> None:
        """End the text at or before its last line, which goes up to `end`, if a rule says so."""
        line = self._text[self._line : end]
        if not line.strip():
            return
        full = self._full(line)
        falls_back = self._line > 0 and self._edit.stop_at_dedent and _indentation(line) < self._indent
        if falls_back or (whole and self._next and full.rstrip() == self._next):
            self._end = self._end_before_line()
        elif whole:
            self._n_lines += 1
            if self._n_lines == self._edit.max_lines:
                self._end = len(self._text[:end].rstrip())

    def _full(self, line: str) -> str:
        """Return the last line of the text as it stands in the file, or "" for the rest of a line that began before."""
        if self._line > 0:
            return line
        return self._before + line if not self._before.strip() else ""

    def _end_before_line(self) -> int:
        return len(self._text[: self._line].rstrip())

    def _safe_end(self) -> int:
        """Return up to where the text stays as it is, whatever comes."""
        text = self._text
        ends = [len(text), len(text.rstrip())]
        line = self._full(text[self._line :])
        if line.strip() and self._next and self._next.startswith(line.rstrip()):
            ends.append(self._end_before_line())
        return min(end - self._overlap(end) for end in ends)

    def _overlap(self, end: int) -> int:
        """Return how many of the characters before `end` are the beginning of the suffix."""
        suffix = self._edit.suffix
        longest = min(len(suffix), end)
        return next((n for n in range(longest, 0, -1) if self._text.startswith(suffix[:n], end - n)), 0)

    def _without_suffix(self, end: int) -> int:
        """Return `end`, or where the suffix's beginning is repeated before it. A bracket that is needed twice stays."""
        n = self._overlap(end)
        repeated = self._text[end - n : end]
        if n and not repeated.strip("".join(PAIRS)):
            line = (self._before + self._text[:end]).rpartition("\n")[2] + self._edit.suffix.partition("\n")[0]
            if all(line.count(close) <= line.count(PAIRS[close]) for close in repeated):
                return end
        return end - n

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

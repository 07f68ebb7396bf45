"""Tables for a terminal of 100 columns, for Markdown and for HTML, from the same `Section`s.

    section = Section("Syntax", ["prompts", "samples", "compiles"], [["humaneval", "164", "61.0% [51.2, 70.0]"]])
    print(as_text(["runs/demo"], [section]))

In a cell such as "1.23 [1.10, 1.36]", value and interval are aligned separately. In a terminal, long names are cut in the
middle, and columns that do not fit follow below. Markdown and HTML have everything in full.
"""

from __future__ import annotations

import html
import re
import textwrap
from dataclasses import dataclass, field

WIDTH = 100  # columns of the terminal
NARROWEST = 16  # columns that a name is cut to, at least
INDENT = "  "
BOLD, RED, PLAIN = "\x1b[1m", "\x1b[1;31m", "\x1b[0m"


@dataclass
class Section:
    """A heading, a table (none if there are no rows), notes and warnings. Warnings are red.

    The first `names` columns hold names, the others figures.
    """

    heading: str
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    names: int = 1

    def require_whole(self) -> None:
        """Raise ValueError if a row has more or fewer cells than there are columns."""
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"a row of {self.heading!r} must have {len(self.columns)} cells, but has {len(row)}: {row}"
                )


def as_text(head: list[str], sections: list[Section], color: bool = False) -> str:
    """Return the lines of `head` and the sections as text for a terminal, with ANSI colours if `color`."""
    bold, red, plain = (BOLD, RED, PLAIN) if color else ("", "", "")
    out = [line for text in head for line in _wrap(text)]
    for section in sections:
        section.require_whole()
        out += ["", f"{bold}{_printable(section.heading)}{plain}", *_text_table(section)]
        out += [f"{red}{line}{plain}" for text in section.warnings for line in _wrap(text, INDENT)]
        out += [line for text in section.notes for line in _wrap(text, INDENT)]
    return "\n".join(out)


def as_markdown(title: str, head: list[str], sections: list[Section]) -> str:
    """Return a Markdown document with one heading `title`, the lines of `head`, and the sections as GitHub's tables."""
    out = [f"# {_escaped(title)}", "", *(f"- {_escaped(line)}" for line in head)]
    for section in sections:
        section.require_whole()
        out += ["", f"## {_escaped(section.heading)}", ""]
        if section.rows:
            lines = ["---"] * section.names + ["---:"] * (len(section.columns) - section.names)
            rows = [[*map(_escaped, section.columns)], lines, *([*map(_escaped, row)] for row in section.rows)]
            out += [f"| {' | '.join(row)} |" for row in rows] + [""] * bool(section.warnings or section.notes)
        out += [f"- **{_escaped(text)}**" for text in section.warnings]
        out += [f"- {_escaped(text)}" for text in section.notes]
    return "\n".join(out) + "\n"


def as_html(sections: list[Section]) -> str:
    """Return the sections as HTML elements with headings of level 2; their texts are escaped."""
    out = []
    for section in sections:
        section.require_whole()
        out += ["<section>", f"<h2>{as_html_text(section.heading)}</h2>"]
        if section.rows:
            out += ['<div class="wide"><table>']
            if any(section.columns):
                out.append(f"<thead>{_html_row(section.columns, section.names, 'th')}</thead>")
            rows = (_html_row(row, section.names, "td", section.columns) for row in section.rows)
            out += ["<tbody>", *rows, "</tbody></table></div>"]
        notes = [f'<li class="warning">{as_html_text(text)}</li>' for text in section.warnings]
        notes += [f"<li>{as_html_text(text)}</li>" for text in section.notes]
        out += ["<ul>", *notes, "</ul>"] if notes else []
        out.append("</section>")
    return "\n".join(out) + "\n"


def short_number(value: float) -> str:
    """Return a large number with three digits at most: 4.2M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _html_row(cells: list[str], names: int, tag: str, columns: list[str] | None = None) -> str:
    """Return a row; with `columns`, each cell has the name of its column, for screens that are too narrow for a table."""
    kinds = ["name"] * names + ["figure"] * (len(cells) - names)
    labels = [f' data-label="{as_html_text(name)}"' if name else "" for name in columns or [""] * len(cells)]
    inner = (f'<{tag} class="{kind}"{of}>{as_html_text(cell)}</{tag}>' for kind, of, cell in zip(kinds, labels, cells))
    return f"<tr>{''.join(inner)}</tr>"


def as_html_text(text: str) -> str:
    """Return `text` escaped for HTML, with control characters as visible escapes."""
    return html.escape(_printable(text))


def _text_table(section: Section) -> list[str]:
    """Return the lines of a section's table, in several blocks of columns if they do not fit the width."""
    if not section.rows:
        return []
    columns = [[_printable(cell) for cell in column] for column in zip(section.columns, *section.rows, strict=True)]
    names, figures = columns[: section.names], [_aligned(column) for column in columns[section.names :]]
    widths = [max(map(len, column)) for column in names]
    needed = sum(len(column[0]) + len(INDENT) for column in figures)
    while sum(widths) + len(INDENT) * len(widths) + needed > WIDTH and max(widths) > NARROWEST:
        widths[widths.index(max(widths))] -= 1
    names = [[_shortened(cell, width).ljust(width) for cell in column] for column, width in zip(names, widths)]
    room = WIDTH - sum(widths) - len(INDENT) * len(widths)
    blocks: list[list[list[str]]] = [[]]
    for column in figures:
        if blocks[-1] and sum(len(c[0]) + len(INDENT) for c in [*blocks[-1], column]) > room:
            blocks.append([])
        blocks[-1].append(column)
    lines = [(INDENT + INDENT.join(row)).rstrip() for block in blocks for row in zip(*names, *block)]
    return lines if any(section.columns) else lines[1:]


def _aligned(column: list[str]) -> list[str]:
    """Return a heading and its cells padded to one width: figures right-aligned, intervals left-aligned."""
    parts = [cell.partition(" [") for cell in column[1:]]
    left = max(len(value) for value, _, _ in parts)
    right = max(len(bracket + interval) for _, bracket, interval in parts)
    width = max(left + right, len(column[0]))
    cells = [(value + (bracket + interval).ljust(right)).rjust(width) for value, bracket, interval in parts]
    return [column[0].rjust(width), *cells]


def _shortened(text: str, width: int) -> str:
    """Return `text` cut to `width` columns, in the middle, because names often differ at their end."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return text[: width - 1 - tail] + "…" + text[len(text) - tail :]


def _wrap(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(_printable(text), WIDTH, initial_indent=indent, subsequent_indent=indent + INDENT)


def _printable(text: str) -> str:
    """Return `text` with control characters as escapes, because a terminal would act on them."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _escaped(text: str) -> str:
    """Return `text` escaped for Markdown; an underscore before a letter or digit needs no escape."""
    return re.sub(r"[\\`*<>|#~&]|\](?=\()|_(?![A-Za-z0-9])", r"\\\g<0>", _printable(text))

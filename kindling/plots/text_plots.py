"""Plots of a model on a text: attention as heatmaps, and the text with each token's loss.

    figure = token_losses([Unit("def", 3.1), Unit(" f", 6.0)], 8.3, "runs/demo, step 1100", "its first 2 tokens")

The rules of figures.py hold here too. Colour maps are white for low and dark for high values, so prints look the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure

from kindling.plots.figures import style, title_lines, visible

MAP = "Blues"
LABEL = 14  # characters of a token's label, at most
COLUMNS = 92  # of text
TAB = 4
LONGEST = 160  # rows of text that are drawn
LISTED = 12  # tokens in each list beside the text: the hardest and the easiest
MONO = "DejaVu Sans Mono"
ADVANCE = 0.602  # width of each character, in em
SMALLEST = 5.5  # points: a token's row in a heatmap with labels
FEWEST_LABELLED = 12  # tokens; a heatmap with fewer shows too little
NOTE_CHARS = 1.25  # characters of a note for one of a title, in the same width
SCALE = PowerNorm(0.5, 0, 1)  # of attention weights


class Unit(NamedTuple):
    """A token's text, or a character that several tokens spell, and its loss in nats; NaN: not predicted."""

    text: str
    loss: float


def label(text: str) -> str:
    """Return a token as a label: spaces and newlines are visible, and a long token is cut at its end."""
    shown = "".join({" ": "·", "\n": "⏎", "\t": "⇥"}.get(c) or visible(c) for c in text)
    return shown if len(shown) <= LABEL else shown[: LABEL - 1] + "…"


def attention_layer(weights: np.ndarray, tokens: list[str], title: str, what: str) -> Figure:
    """Draw each head's attention weights (n_head, T, T): a row for each query token, a column for each key token.

    `what` names the text.
    """
    n_head, T, _ = weights.shape
    names = [label(token) for token in tokens]
    columns, cell, size = (1, 7.2, 8.5) if n_head == 1 else (2, 4.8, 7.0)
    labels, note = _inches(names, size), attention_note(T, what)
    with style():
        figure, axes = _grid(-(-n_head // columns), columns, cell, (labels, 0.25, labels + 0.1), title, note)
        for number, ax in enumerate(axes):
            if number >= n_head:
                ax.remove()
                continue
            _heatmap(ax, weights[number])
            ax.set_title(f"head {number}")
            _label_tokens(ax, names, size, rows=number % columns == 0)
        return figure


def attention_overview(weights: np.ndarray, tokens: list[str], title: str, what: str) -> Figure:
    """Draw the attention weights (n_layer, n_head, T, T) of all heads as small heatmaps, a row for each layer.

    If the heatmaps are large enough for labels, only as many of the first tokens are drawn as labels fit. `what` names the text.
    """
    n_layer, n_head, T, _ = weights.shape
    cell = min(10.0 / n_head - 0.1, max(24.0 / n_layer, 0.9), 3.6)
    fit = int(cell * 72 / SMALLEST)
    names = [label(token) for token in tokens[:fit]] if fit >= min(T, FEWEST_LABELLED) else []
    T = len(names) or T
    size = min(7.0, cell * 72 / T)
    labels = _inches(names, size)
    with style():
        margins = (0.75 + labels, 0.0, 0.08)
        figure, axes = _grid(n_layer, n_head, cell, margins, title, attention_note(T, what), labels)
        for ax, (layer, head) in zip(axes, np.ndindex(n_layer, n_head)):
            _heatmap(ax, weights[layer, head, :T, :T])
            if layer == 0:
                ax.set_title(f"head {head}" if cell > 0.8 else str(head), fontsize=9, loc="center")
            if head == 0:
                x = -(labels + 0.05) / cell
                ax.text(x, 0.5, f"layer {layer}", fontsize=9, ha="right", va="center", transform=ax.transAxes)
            _label_tokens(ax, names, size, rows=head == 0, columns=layer == n_layer - 1)
        return figure


def attention_note(shown: int, what: str) -> str:
    """Return what a picture of the attention among the first tokens of a text shows."""
    return (
        f"The first {shown} tokens of {what}. In each row, a token looks at itself and the tokens before it, in the columns. "
        f"Grey: tokens that come later."
    )


def _inches(names: list[str], size: float) -> float:
    """Return the width of the longest of some labels, with a little space; 0 without labels."""
    return max(map(len, names)) * ADVANCE * size / 72 + 0.1 if names else 0.0


def _label_tokens(ax: Axes, names: list[str], size: float, rows: bool, columns: bool = True) -> None:
    """Write tokens below a heatmap's columns and to the left of its rows. As ticks they would take three times as long."""
    T = len(names)
    font: dict[str, Any] = {"fontsize": size, "family": MONO, "clip_on": False}
    for i, name in enumerate(names):
        if columns:
            ax.text(i, T - 0.5 + T / 100, name, rotation=90, ha="center", va="top", **font)
        if rows:
            ax.text(-0.5 - T / 100, i, name, ha="right", va="center", **font)


def _grid(
    rows: int,
    columns: int,
    cell: float,
    margins: tuple[float, float, float],
    title: str,
    note: str,
    bottom: float = 0.0,
) -> tuple[Figure, list[Axes]]:
    """Return a figure with a colour bar and a grid of square axes, listed row by row, each `cell` inches wide.

    `margins`, in inches: to the left of the grid, above each axes and below each axes; `bottom`: below them all. Places are
    computed here, because matplotlib's layout would draw all labels first, which takes as long as the plot.
    """
    left, above, below = margins
    wide = max(left + 0.2 + columns * (cell + 0.1) + 1.1, 9.2)
    lines, more = title_lines(title, "", wide), title_lines("", note, wide * NOTE_CHARS)
    top = 0.4 + 0.2 * len(lines) + 0.17 * len(more)
    high = max(top + rows * (cell + above + below) + 0.15 + bottom, top + 4.5)
    figure = Figure(figsize=(wide, high))
    FigureCanvasAgg(figure)
    _heading(figure, lines, more)
    axes = []
    for row, column in np.ndindex(rows, columns):
        x, y = left + 0.15 + column * (cell + 0.1), top + above + row * (cell + above + below)
        axes.append(figure.add_axes((x / wide, 1 - (y + cell) / high, cell / wide, cell / high)))
    x = left + 0.15 + columns * (cell + 0.1) + 0.1
    bar = figure.colorbar(
        ScalarMappable(SCALE, matplotlib.colormaps[MAP]),
        cax=figure.add_axes((x / wide, 1 - (top + above + 4.0) / high, 0.16 / wide, 4.0 / high)),
    )
    bar.set_label("attention weight, square-root scale", fontsize=9)
    bar.set_ticks([0, 0.05, 0.2, 0.5, 1])
    return figure, axes


def _heading(figure: Figure, lines: list[str], more: list[str]) -> None:
    """Write a title of some lines at the top left, and below it, smaller, what the picture shows."""
    wide, high = figure.get_size_inches()
    figure.text(0.15 / wide, 1 - 0.15 / high, "\n".join(lines), fontsize=12, va="top")
    y = 1 - (0.2 + 0.2 * len(lines)) / high
    figure.text(0.15 / wide, y, "\n".join(more), fontsize=9.5, va="top", color="#444444")


def _heatmap(ax: Axes, weights: np.ndarray) -> None:
    """Draw attention weights (T, T); above the diagonal, which causal attention hides, is grey."""
    ax.set_facecolor("#dddddd")
    seen = np.where(np.tri(len(weights), dtype=bool), weights, np.nan)
    ax.imshow(seen, cmap=MAP, norm=SCALE, interpolation="nearest", aspect="equal")
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.set_xticks([])
    ax.set_yticks([])


# -- losses -----------------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """The part of a unit in one row: its first column, its characters, and the unit's number."""

    column: int
    text: str
    unit: int


class Row(NamedTuple):
    """A row of the picture; `line` is the line of the text, from 1, or None where a long line continues."""

    line: int | None
    pieces: list[Piece]


def rows_of(units: list[Unit], columns: int = COLUMNS) -> list[Row]:
    """Lay out a text in rows of at most `columns` characters; a newline is ⏎ at the end of a row, tabs reach the tab stop."""
    rows, column, line = [Row(1, [])], 0, 1
    for number, unit in enumerate(units):
        for c in unit.text:
            shown = {"\n": "⏎", "\t": "⇥".ljust(TAB - column % TAB)}.get(c) or visible(c)
            if column + len(shown) > columns:
                rows.append(Row(None, []))
                column = 0
            pieces = rows[-1].pieces
            if pieces and pieces[-1].unit == number:
                pieces[-1] = pieces[-1]._replace(text=pieces[-1].text + shown)
            else:
                pieces.append(Piece(column, shown, number))
            column += len(shown)
            if c == "\n":
                line, column = line + 1, 0
                rows.append(Row(line, []))
    return rows if rows[-1].pieces or len(rows) == 1 else rows[:-1]


def token_losses(units: list[Unit], guess: float, title: str, what: str, first_line: int = 1) -> Figure:
    """Draw a text with each token's background shaded by its loss in nats, up to `guess`, the loss of a uniform guess.

    Beside it are lists of the hardest and the easiest tokens. `what` says which text it is, `first_line` where it begins.
    """
    rows = rows_of(units)
    left_out = len(rows) - LONGEST
    rows = rows[:LONGEST]
    size = 9.5
    width, height = ADVANCE * size / 72, 1.5 * size / 72  # of a character's cell, in inches
    list_rows = 2 * LISTED + 5
    left, below, side = 0.55, 0.85, 2.0
    text_width, text_height = COLUMNS * width, max(len(rows), list_rows) * height
    wide = left + text_width + 0.25 + side
    note = f"; {left_out:,} more rows are not drawn" if left_out > 0 else ""
    lines, more = title_lines(f"Loss of each token: {title}", "", wide), title_lines("", what + note, wide * NOTE_CHARS)
    top = 0.35 + 0.2 * len(lines) + 0.17 * len(more)
    whole = (wide, top + text_height + below)
    with style():
        figure = Figure(figsize=whole)
        FigureCanvasAgg(figure)
        _heading(figure, lines, more)
        box_text = (left / whole[0], below / whole[1], text_width / whole[0], text_height / whole[1])
        ax = figure.add_axes(box_text, xlim=(0, COLUMNS), ylim=(text_height / height, 0))
        ax.axis("off")
        mapping = ScalarMappable(Normalize(0, guess), matplotlib.colormaps[MAP])
        numbered = [row if row.line is None else row._replace(line=row.line + first_line - 1) for row in rows]
        _draw_rows(ax, numbered, units, mapping, size)
        box = (left / whole[0], 0.45 / whole[1], text_width / whole[0], 0.13 / whole[1])
        bar = figure.colorbar(mapping, cax=figure.add_axes(box), orientation="horizontal", extend="max")
        bar.set_label(f"loss in nats; a uniform guess has {guess:.2f}; no background: not predicted", fontsize=9)
        box = ((left + text_width + 0.25) / whole[0], box_text[1], side / whole[0], box_text[3])
        ax = figure.add_axes(box, xlim=(0, side / width), ylim=(text_height / height, 0))
        ax.axis("off")
        for y, line in enumerate(_listed(units)):
            ax.text(0, y + 0.72, line, family=MONO, fontsize=size, va="baseline")
        return figure


def _draw_rows(ax: Axes, rows: list[Row], units: list[Unit], mapping: ScalarMappable, size: float) -> None:
    boxes, colors = [], []
    font: dict[str, Any] = {"family": MONO, "fontsize": size, "va": "baseline"}
    for y, row in enumerate(rows):
        if row.line is not None:
            ax.text(-1, y + 0.72, str(row.line), ha="right", color="#777777", **font)
        for piece in row.pieces:
            loss, end = units[piece.unit].loss, piece.column + len(piece.text)
            color = "black"
            if math.isfinite(loss):
                boxes.append([(piece.column, y), (end, y), (end, y + 1), (piece.column, y + 1)])
                colors.append(mapping.to_rgba(np.asarray(loss)))  # (4,): red, green, blue, alpha
                color = text_color(colors[-1])
            if piece.text.strip():
                ax.text(piece.column, y + 0.72, piece.text, color=color, **font)
    ax.add_collection(PolyCollection(boxes, facecolors=colors, edgecolors="white", linewidths=0.8))


def text_color(background: Sequence[float] | np.ndarray) -> str:
    """Return black or white, whichever has more contrast on an RGB colour (WCAG 2.2, relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in background[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "white" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "black"


def _listed(units: list[Unit]) -> list[str]:
    """Return the lines that list the tokens with the greatest and the smallest losses, and the mean."""
    known = sorted((u for u in units if math.isfinite(u.loss)), key=lambda u: -u.loss)
    n = min(LISTED, len(known) // 2)
    lines = []
    for name, found in (("hardest", known[:n]), ("easiest", known[::-1][:n])):
        lines += [
            f"{name:<{LABEL + 1}}{'nats':>7}",
            *(f"{label(u.text):<{LABEL + 1}}{u.loss:>7.3f}" for u in found),
            "",
        ]
    if known:
        lines.append(f"{'mean of ' + format(len(known), ','):<{LABEL + 1}}{np.mean([u.loss for u in known]):>7.3f}")
    return lines

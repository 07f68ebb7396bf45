"""The picture of a training in stages: what each stage brought and took, by measure.

kindling/studies/measures.py computes the numbers. The rules of figures.py hold here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from kindling.plots.figures import new_figure, style, visible
from kindling.plots.text_plots import MAP, text_color

LEAST = 0.05  # the ends of the colours are at this change, at least
MOST = 0.25  # so that one large change does not pale the others
FIRST = "#dddddd"  # the first stage, which has none before it
SAYS = (
    "In each cell: the value after the stage, and below it the change to the stage before. *: its 95% interval excludes 0. "
    "The colour is stronger the more was gained; that of pass@k and accuracies is the difference itself."
)


@dataclass
class MeasureRow:
    """A measure over the stages: its name, and for each stage the value, the change and how much of a gain it is.

    `gains` are relative, or of shares the difference itself; nan where there is none, as in the first stage.
    """

    name: str
    values: list[str]
    changes: list[str]
    gains: list[float]


def stage_figure(rows: list[MeasureRow], stages: Sequence[tuple[str, ...]], title: str) -> Figure:
    """Draw a cell for each measure (rows) and stage (columns). A stage's name is lines."""
    with style():
        figure = new_figure(3.2 + 2.0 * len(stages), 1.9 + 0.52 * len(rows), title, SAYS)
        ax = figure.subplots()
        gains = np.array([row.gains for row in rows], dtype=float)
        known = np.abs(gains[np.isfinite(gains)])
        end = min(MOST, max(LEAST, known.max(initial=0.0)))
        norm = Normalize(-end, end)
        mapping = ScalarMappable(norm, matplotlib.colormaps[MAP])
        ax.set_facecolor(FIRST)
        ax.imshow(np.ma.masked_invalid(gains), cmap=MAP, norm=norm, aspect="auto", interpolation="nearest")
        _write(ax, rows, mapping)
        ax.set_xticks(range(len(stages)), ["\n".join(map(visible, stage)) for stage in stages])
        ax.set_yticks(range(len(rows)), [visible(row.name) for row in rows])
        ax.xaxis.tick_top()
        ax.tick_params(length=0)
        ax.grid(False)
        ax.spines[:].set_visible(False)
        for edge in range(1, max(len(rows), len(stages))):  # white lines between the cells
            ax.axhline(edge - 0.5, color="white", linewidth=2)
            ax.axvline(edge - 0.5, color="white", linewidth=2)
        ax.set_xlim(-0.5, len(stages) - 0.5)
        ax.set_ylim(len(rows) - 0.5, -0.5)
        bar = figure.colorbar(
            mapping, ax=ax, shrink=0.8, aspect=30, extend="both" if known.max(initial=0) > end else "neither"
        )
        bar.set_label("gained, as a share of the value before; below 0: lost", fontsize=9)
        return figure


def _write(ax: Axes, rows: list[MeasureRow], mapping: ScalarMappable) -> None:
    """Write value and change into each cell."""
    for y, row in enumerate(rows):
        for x, (value, change, gain) in enumerate(zip(row.values, row.changes, row.gains)):
            color = text_color(mapping.to_rgba(np.asarray(gain))) if np.isfinite(gain) else "black"
            middle = 0.2 if change else 0.0
            ax.text(x, y - middle, visible(value), ha="center", va="center", color=color, fontsize=10)
            ax.text(x, y + 0.22, visible(change), ha="center", va="center", color=color, fontsize=8.5)

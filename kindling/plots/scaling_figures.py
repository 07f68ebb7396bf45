"""The picture of a scaling law: the runs with the fitted lines, and the loss over size at equal compute (IsoFLOP curves).

kindling/studies/scaling_results.py computes the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from kindling.plots.figures import line_style, new_figure, style


@dataclass
class SizeRuns:
    """The runs of one size, arrays (runs,), and the fitted law for it at more numbers of tokens, (points,)."""

    name: str
    tokens: np.ndarray
    losses: np.ndarray
    line_tokens: np.ndarray
    line_losses: np.ndarray


@dataclass
class HeldOut:
    """The run that was predicted before it was trained. `loss` is nan until it is there."""

    name: str
    tokens: float
    predicted: float
    low: float
    high: float
    loss: float = float("nan")


@dataclass
class IsoFlop:
    """The fitted loss over parameters (points,) at one budget, its lowest point, and what the runs say (sizes,)."""

    name: str
    parameters: np.ndarray
    losses: np.ndarray
    best: tuple[float, float]
    run_parameters: np.ndarray
    run_losses: np.ndarray


def scaling_figure(sizes: list[SizeRuns], held_out: HeldOut | None, budgets: list[IsoFlop], title: str) -> Figure:
    """Draw the losses of all runs over tokens on the left, and the loss over size for each budget on the right."""
    with style():
        note = "Lines are the fitted law. Filled marks are runs; on the right, they lie between two runs of a size."
        figure = new_figure(11.6, 5.6, title, note)
        left, right = figure.subplots(1, 2)
        for number, size in enumerate(sizes):
            look = line_style(number)
            marker = look.pop("marker")
            left.plot(size.line_tokens, size.line_losses, linewidth=1.4, **look)
            left.plot(size.tokens, size.losses, marker=marker, color=look["color"], linestyle="none", label=size.name)
        if held_out is not None:
            _draw_held_out(left, held_out)
        for number, budget in enumerate(budgets):
            look = line_style(number)
            marker = look.pop("marker")
            right.plot(budget.parameters, budget.losses, linewidth=1.4, label=budget.name, **look)
            right.plot(budget.run_parameters, budget.run_losses, marker=marker, color=look["color"], linestyle="none")
        lowest = np.array([budget.best for budget in budgets]).reshape(-1, 2)
        right.plot(*lowest.T, "*-", color="#666666", markersize=11, markerfacecolor="white", label="lowest of each")
        left.set_title("Runs, by size")
        left.set_xlabel("training tokens")
        right.set_title("At equal compute (IsoFLOP)")
        right.set_xlabel("parameters of blocks and head")
        for ax in (left, right):
            _log_axes(ax)
            ax.legend(frameon=False, handlelength=3)
        return figure


def _draw_held_out(ax: Axes, run: HeldOut) -> None:
    error = [[run.predicted - run.low], [run.high - run.predicted]]
    look: dict[str, Any] = {"color": "#000000", "linestyle": "none", "markerfacecolor": "white", "capsize": 5}
    ax.errorbar(
        [run.tokens], [run.predicted], yerr=error, marker="s", markersize=8, label=f"{run.name}, predicted", **look
    )
    if np.isfinite(run.loss):
        ax.plot([run.tokens], [run.loss], "X", color="#CC79A7", markersize=8, zorder=5, label=f"{run.name}, measured")


def _log_axes(ax: Axes) -> None:
    """Use logarithmic axes with plain numbers, because formulas are off."""
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylabel("validation bits per byte")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.yaxis.set_major_locator(MaxNLocator(7))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_formatter(NullFormatter())

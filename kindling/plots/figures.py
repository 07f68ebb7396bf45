"""Plots of runs and models: from numbers to a figure.

    figure = training_curves(curves, "runs/demo, step 1100")
    Path("training_curves.png").write_bytes(png(figure))

inspection.py computes the numbers; text_plots.py has the plots of a text. Every line has a dash and a marker besides its
colour (Okabe and Ito 2008), and colour maps are monotone in lightness, so every plot can be read in black and white.
Characters that are not in the font, wide characters and control characters are shown as Python escapes.
"""

from __future__ import annotations

import io
import textwrap
import unicodedata
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

DPI = 130
COLORS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":", (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (1, 1)), (0, (8, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WHY_A_GAP = (
    "The two losses are of different texts, and training loss is of those that the model learns from. A gap between them\n"
    "is not overfitting; a validation loss that rises is."
)
NAME = 40  # characters of a run's name above its own axes, at most
FEW = 40  # a line with at most this many points has a marker at each one


@dataclass
class Curves:
    """A run's metrics: arrays (N,) by logged step and (M,) by validation; NaN for what is unknown or not finite."""

    steps: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    lr: np.ndarray
    grad_norm: np.ndarray
    skipped: np.ndarray  # the number of steps skipped so far
    val_steps: np.ndarray
    val_tokens: np.ndarray
    val_loss: np.ndarray
    val_perplexity: np.ndarray
    val_bits_per_byte: np.ndarray
    val_read: int | None = None  # tokens of the split that each validation read; None: not recorded, so all of them


class Histogram(NamedTuple):
    """The distribution of a matrix's weights: densities (N,) between edges (N + 1,), the outer ones its extreme weights."""

    layer: int | None
    density: np.ndarray
    edges: np.ndarray
    std: float


class Spectrum(NamedTuple):
    """A matrix's largest singular value and its stable rank, at most `full`; NaN for a matrix of zeros."""

    layer: int | None
    norm: float
    stable_rank: float
    full: int


def png(figure: Figure) -> bytes:
    """Return the figure as a PNG file."""
    out = io.BytesIO()
    with style():
        figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    return out.getvalue()


def style() -> AbstractContextManager[Any]:
    """Return the style for all plots, as a context. Formulas are off, because names may contain dollar signs."""
    sizes: dict[Any, Any] = {"font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left", "legend.fontsize": 9}
    look: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    return matplotlib.rc_context({"text.parse_math": False, "lines.markersize": 4.5, **sizes, **look})


def new_figure(width: float, height: float, title: str, note: str = "") -> Figure:
    """Return an empty figure of this size in inches, with a title and a note below it, both wrapped."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("\n".join(title_lines(title, note, width)), fontsize=12, x=0.01, ha="left")
    return figure


def title_lines(title: str, note: str, width: float) -> list[str]:
    """Return a title and a note as lines that fit a figure of this width in inches."""
    return [line for text in (title, note) for line in textwrap.wrap(visible(text), int(10.5 * width))]


def line_style(number: int) -> dict[str, Any]:
    """Return colour, dash and marker of a line; no two of the first 49 lines have the same dash and marker."""
    n = len(COLORS)
    shift = number // n
    return {"color": COLORS[number % n], "linestyle": DASHES[number % n], "marker": MARKERS[(number + shift) % n]}


@cache
def _has_glyph(character: str) -> bool:
    return get_font(findfont(FontProperties(family="DejaVu Sans Mono"))).get_char_index(ord(character)) != 0


def visible(text: str) -> str:
    """Return `text` with escapes for all characters that do not take exactly one column of one line."""
    return "".join(c if (c.isascii() and c.isprintable()) or _plain(c) else ascii(c)[1:-1] for c in text)


def _plain(c: str) -> bool:
    wide = unicodedata.east_asian_width(c) in "WF" or unicodedata.combining(c) or unicodedata.category(c)[0] == "M"
    turned = unicodedata.bidirectional(c) in ("R", "AL")  # right-to-left text
    return c.isprintable() and not wide and not turned and _has_glyph(c)


class Compared(NamedTuple):
    """A run among others. Figures compare where their keys are equal: for training, for validation, for the texts held out."""

    name: str
    curves: Curves
    training: Any = None
    validation: Any = None
    held_out: Any = None


# -- training ---------------------------------------------------------------------------------------------------------


def training_curves(curves: Curves, title: str) -> Figure:
    """Draw loss, validation perplexity, learning rate and gradient norm against steps, and tokens above."""
    with style():
        figure = new_figure(10.8, 7.6, f"Training of {title}")
        ((loss, perplexity), (rate, norm)) = figure.subplots(2, 2, sharex=True)
        _line(loss, curves.steps, curves.loss, 0, "training")
        _line(loss, curves.val_steps, curves.val_loss, 1, "validation")
        _line(perplexity, curves.val_steps, curves.val_perplexity, 1, "validation")
        _line(rate, curves.steps, curves.lr, 0, markers=False)
        _line(norm, curves.steps, curves.grad_norm, 0)
        _skipped(norm, curves)
        names = (
            (loss, "Loss", "nats a token"),
            (perplexity, "Validation perplexity", "perplexity"),
            (rate, "Learning rate", "rate"),
            (norm, "Gradient norm, before clipping", "norm"),
        )
        for ax, name, unit in names:
            ax.set_title(name)
            ax.set_ylabel(unit)
        for ax in (rate, norm):
            ax.set_xlabel("step")
            ax.set_ylim(bottom=0)
        loss.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _log_if_wide(perplexity, curves.val_perplexity)
        _legend(loss)
        if np.isfinite(curves.loss).any() and np.isfinite(curves.val_loss).any():
            figure.supxlabel(WHY_A_GAP, x=0.01, ha="left", fontsize=9.5, color="#444444")
        known = np.flatnonzero((curves.steps > 0) & np.isfinite(curves.tokens))
        if len(known):
            each = curves.tokens[known[-1]] / curves.steps[known[-1]]
            for ax in (loss, perplexity):
                above = ax.secondary_xaxis("top", functions=(lambda x: x * each, lambda x: x / each))
                above.xaxis.set_major_formatter(EngFormatter(sep=""))
                above.set_xlabel("training tokens")
        return figure


def _line(ax: Axes, x: np.ndarray, y: np.ndarray, number: int, name: str | None = None, markers: bool = True) -> None:
    """Draw a line with gaps where y is NaN; isolated points are drawn as points, also without `markers`."""
    if not np.isfinite(y).any():
        if name is None or not ax.lines:
            ax.text(0.5, 0.5, "nothing recorded", transform=ax.transAxes, ha="center", color="#666666")
        return
    look = line_style(number)
    if np.isfinite(y).sum() == 1:
        look["linestyle"] = "none"  # also in the legend
    every = max(1, len(x) // FEW)
    shown = ~np.isfinite(np.append(y[1:], np.nan)) & ~np.isfinite(np.insert(y[:-1], 0, np.nan))
    regular = {*range(0, len(x), every), len(x) - 1} if markers else set()
    marked = sorted({*regular, *np.flatnonzero(shown).tolist()})
    label = None if name is None else _label(name)
    ax.plot(x, y, linewidth=1.6, markevery=marked, label=label, **look)
    if ax.texts:  # the note of another line without points
        ax.texts[0].remove()


def _label(name: str) -> str:
    return f" {name}" if name.startswith("_") else name  # matplotlib hides _a from the legend


def _skipped(ax: Axes, curves: Curves) -> None:
    """Mark the logged steps before which steps were skipped."""
    counts = np.nan_to_num(curves.skipped)
    where = curves.steps[np.diff(counts, prepend=0) > 0]
    if len(where):
        name = f"{counts.max():.0f} skipped so far"
        ax.plot(where, np.zeros(len(where)), "X", color="#D55E00", markersize=8, clip_on=False, zorder=5, label=name)
        _legend(ax)


def _log_if_wide(ax: Axes, values: np.ndarray) -> None:
    """Use a logarithmic scale, with plain numbers, where the values span more than a factor of 5."""
    values = values[np.isfinite(values) & (values > 0)]
    if len(values) and values.max() > 5 * values.min():
        _log_scale(ax, (1, 2, 5))


def _log_scale(ax: Axes, subs: tuple[int, ...]) -> None:
    """Use a logarithmic scale with plain numbers, because formulas are off."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=subs))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _legend(ax: Axes, **place: Any) -> None:
    if ax.get_legend_handles_labels()[1]:
        ax.legend(frameon=False, handlelength=3.5, **place)


def compare_curves(runs: list[Compared], notes: list[str], fewest: int = 0) -> Figure:
    """Draw losses and bits per byte of several runs against training tokens, with `notes` on what does not compare.

    Runs are on one axis only if their figures compare. A measure of which every run has fewer than `fewest` points is left out,
    unless all are.
    """
    every = (
        ("training", "Training loss", "nats a token", "tokens", "loss"),
        ("validation", "Validation loss", "nats a token", "val_tokens", "val_loss"),
        ("held_out", "Validation bits per byte", "bits a byte", "val_tokens", "val_bits_per_byte"),
    )
    measures = [of for of in every if any(len(getattr(run.curves, of[3])) >= fewest for run in runs)] or every
    keys_of = ([getattr(run, measure) for run in runs] for measure, *_ in measures)
    groups = [[key for n, key in enumerate(keys) if key not in keys[:n]] for keys in keys_of]
    rows = _rows([len(found) for found in groups])
    with style():
        height = 0.8 + 3.6 * len(rows) + 0.25 * len(runs) + 0.2 * len(notes)
        what = f"{len(runs)} runs" if len(runs) > 1 else f"the run {runs[0].name}"
        figure = new_figure(10.8, height, f"Training of {what}", " ".join(notes))
        axes = figure.subplot_mosaic(rows)  # type: ignore[arg-type]
        shown: dict[str, Any] = {}
        for m, ((measure, title, unit, x, y), found) in enumerate(zip(measures, groups)):
            for g, key in enumerate(found):
                ax = axes[f"{m}.{g}"]
                drawn = [(number, run) for number, run in enumerate(runs) if getattr(run, measure) == key]
                for number, run in drawn:
                    _line(ax, getattr(run.curves, x), getattr(run.curves, y), number, visible(run.name))
                of = visible(drawn[0][1].name)[-NAME:] if len(drawn) == 1 else f"{len(drawn)} of {len(runs)} runs"
                ax.set_title(title if len(found) == 1 else f"{title} of {of}")
                ax.set_xlim(left=-0.03 * ax.get_xlim()[1])
                ax.set_ylabel(unit)
                ax.set_xlabel("training tokens")
                ax.xaxis.set_major_formatter(EngFormatter(sep=""))
                for handle, name in zip(*ax.get_legend_handles_labels()):
                    shown.setdefault(name, handle)
        names = [name for run in runs if (name := _label(visible(run.name))) in shown]
        handles = [shown[name] for name in names]
        figure.legend(handles, names, loc="outside lower left", frameon=False, handlelength=4, ncols=1)
        return figure


def _rows(counts: list[int]) -> list[list[str]]:
    """Return the panels `m.g` of measures with so many groups each, two in a row; a panel that is alone has a whole row."""
    if counts == [1, 1, 1]:
        return [["0.0", "0.0"], ["1.0", "2.0"]]
    rows = []
    for m, count in enumerate(counts):
        names = [f"{m}.{g}" for g in range(count)]
        rows += [[names[i], names[min(i + 1, count - 1)]] for i in range(0, count, 2)]
    return rows


# -- weights ----------------------------------------------------------------------------------------------------------


def weight_histograms(kinds: dict[str, list[Histogram]], title: str) -> Figure:
    """Draw the distribution of the weights of each kind of matrix, with a line for each layer: the deeper, the darker."""
    columns = 2
    rows = -(-len(kinds) // columns)
    with style():
        figure = new_figure(10.8, 0.6 + 2.9 * rows, f"Weights of {title}")
        grid = figure.subplots(rows, columns, squeeze=False)
        for ax in grid.flat[len(kinds) :]:
            ax.axis("off")
        for ax, (kind, found) in zip(grid.flat, kinds.items()):
            for number, histogram in enumerate(found):
                _histogram(ax, histogram, number, len(found))
            _log_scale(ax, (1,))
            ax.set_title(kind)
            ax.set_ylabel("density (log scale)")
            ax.set_xlabel("weight")
            _legend(ax, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return figure


def _histogram(ax: Axes, histogram: Histogram, number: int, count: int) -> None:
    """Draw one matrix of `count`: a line of steps with a marker at its smallest and one at its largest weight.

    Of many layers, only the first, the middle and the last have markers and a legend. The others are thin lines.
    """
    layer = "" if histogram.layer is None else f"layer {histogram.layer}: "
    few = count <= 6 or number in (0, count // 2, count - 1)
    look: dict[str, Any] = {
        "color": _depth(number, count),
        "linestyle": DASHES[number % 4] if count <= 6 else "-",
        "linewidth": 1.2 if few else 0.4,
        "marker": MARKERS[number % len(MARKERS)] if few else "",
        "zorder": 3 if few else 2,
    }
    density = np.where(histogram.density > 0, histogram.density, np.nan)
    known = np.flatnonzero(np.isfinite(density))
    ends = [known[0], known[-1] + 1] if len(known) else []
    ax.plot(
        *(histogram.edges, np.append(density, density[-1:])),
        drawstyle="steps-post",
        markevery=[int(end) for end in ends],
        label=f"{layer}std {histogram.std:.3g}" if few else None,
        **look,
    )


def _depth(number: int, count: int) -> tuple[float, float, float, float]:
    """Return the colour of a layer, from light to dark; without yellow, which is hard to see on white."""
    return matplotlib.colormaps["viridis"](0.72 * (count - 1 - number) / max(1, count - 1))


def spectral_norms(kinds: dict[str, list[Spectrum]], n_layer: int, title: str) -> Figure:
    """Draw the largest singular value and the stable rank of each matrix: a point for what is there once, else a line.

    The embeddings and the head have axes of their own, because their norms grow with the vocabulary.
    """
    single = {kind: found for kind, found in kinds.items() if found[0].layer is None}
    blocks = {kind: found for kind, found in kinds.items() if kind not in single}
    measures = (
        ("Largest singular value (spectral norm)", "norm", lambda s: s.norm),
        ("Stable rank (Frobenius norm² / spectral norm²)", "share of the full rank", lambda s: s.stable_rank / s.full),
    )
    with style():
        figure = new_figure(10.8, 8.6, f"Singular values of {title}")
        grid = figure.subplots(2, 2, sharex="col", width_ratios=[0.9 + 0.35 * len(single), 5])
        for (left, right), (name, unit, value) in zip(grid, measures):
            left.set_title(name)
            for ax, shown in ((left, single), (right, blocks)):
                ax.set_ylabel(unit)
                for number, (kind, found) in enumerate(kinds.items()):
                    if kind in shown:
                        x = [list(single).index(kind) if s.layer is None else s.layer for s in found]
                        label = f"{kind} (full rank {found[0].full:,})" if ax is right else None
                        _line(ax, np.array(x, dtype=float), np.array([value(s) for s in found]), number, label)
                _log_if_wide(ax, np.array([value(s) for found in shown.values() for s in found]))
        left, right = grid[1]
        names = [kind.replace(", ", ",\n").replace(" embedding", "\nembedding") for kind in single]
        left.set_xticks(range(len(single)), names, fontsize=8)
        left.set_xlim(-0.5, len(single) - 0.5)
        right.set_xticks(range(0, n_layer, -(-n_layer // 24)))
        right.set_xlabel("layer")
        _legend(grid[0, 1], loc="center left", bbox_to_anchor=(1.0, 0.5))
        return figure

"""Drawings: that they can be made of anything, and that what they show can be read."""

import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kindling.plots.figures import (
    Curves,
    Histogram,
    Spectrum,
    compare_curves,
    line_style,
    png,
    spectral_norms,
    training_curves,
    visible,
    weight_histograms,
)
from kindling.plots.text_plots import (
    COLUMNS,
    LONGEST,
    Unit,
    attention_layer,
    attention_overview,
    label,
    rows_of,
    text_color,
    token_losses,
)


def curves(n: int, m: int, value: float = 3.0) -> Curves:
    steps, val = np.arange(1.0, n + 1), np.arange(float(m))
    line = np.full(n, value)
    return Curves(steps, steps * 100, line, line, line, np.zeros(n), val, val * 100, *[np.full(m, value)] * 3)


def width(data: bytes) -> int:
    return Image.open(io.BytesIO(data)).width


@pytest.mark.parametrize(("n", "m"), [(0, 1), (500, 2)])
def test_any_number_of_points_is_drawn_in_a_width_that_fits_a_screen(n, m):
    assert 1100 <= width(png(training_curves(curves(n, m), "runs/$a$ b$"))) <= 1600


def test_a_run_of_nothing_but_gaps_is_drawn():
    png(compare_curves([("a", curves(3, 2, math.nan)), ("b", curves(0, 0))], ["note"]))


@pytest.mark.parametrize("names", [("_a", "_b"), ("_", "__"), ("a", "_b"), ("$x_", "a$b$"), ("\udce9", "caf\udce9")])
def test_every_run_of_a_comparison_is_in_its_legend(names):
    figure = compare_curves([(name, curves(5, 3)) for name in names], [])
    shown = [text.get_text().strip() for text in figure.legends[0].get_texts()]
    assert shown == [visible(name) for name in names]
    png(figure)


def test_a_value_alone_between_gaps_is_marked():
    c = curves(200, 0)
    c.loss[100:103] = [math.nan, 7.0, math.nan]
    ax = training_curves(c, "run").axes[0]
    assert 101 in ax.lines[0].get_markevery()


def test_skipped_steps_are_marked_where_they_were_and_counted():
    c = curves(4, 0)
    c.skipped[:] = [0, 2, 2, 5]
    ax = training_curves(c, "run").axes[3]
    assert ax.lines[-1].get_xdata().tolist() == [2, 4]
    assert "5 skipped" in ax.get_legend().texts[0].get_text()


def test_lines_differ_without_their_colours():
    styles = [(str(s["linestyle"]), s["marker"]) for s in map(line_style, range(49))]
    assert len(set(styles)) == 49


def test_matrices_of_zeros_and_many_layers_are_drawn():
    edges = np.linspace(-1, 1, 5)
    many = [Histogram(i, np.array([0, 1, 1, 0.0]), edges, 0.5) for i in range(8)]
    png(weight_histograms({"up": many, "head": [Histogram(None, np.array([0, 0, 2, 0.0]), edges, 0.0)]}, "run"))
    spectra = [Spectrum(i, math.nan, math.nan, 8) for i in range(8)]
    png(spectral_norms({"proj": spectra, "head": [Spectrum(None, 3.0, 2.0, 8)]}, 8, "run"))


@pytest.mark.parametrize(("layers", "heads", "tokens"), [(1, 1, 1), (2, 16, 48)])
def test_heads_of_any_number_are_drawn_in_a_width_that_fits_a_screen(layers, heads, tokens):
    weights = np.tril(np.ones((layers, heads, tokens, tokens)))
    assert 1100 <= width(png(attention_overview(weights, "run", "text"))) <= 1600
    figure = attention_layer(weights[0][:2], ["\n  $x$"] * tokens, "run", "text")
    assert 1100 <= width(png(figure)) <= 1600


def test_tokens_of_a_heatmap_are_shown_visibly_and_short():
    assert label(" x\n\t") == "·x⏎⇥"
    assert label("a" * 30) == "a" * 13 + "…"
    assert label("\x1b中\u0301\u202e") == r"\x1b\u4e2d\u0…"


@settings(max_examples=200)
@given(st.text())
def test_what_is_shown_is_one_line_of_one_column_a_character(text):
    shown = visible(text)
    assert shown.isprintable() and "\n" not in shown
    assert visible(shown) == shown


units = st.lists(st.builds(Unit, st.text(max_size=200), st.just(1.0)), max_size=20)


@settings(max_examples=100)
@given(units)
def test_a_laid_out_text_loses_nothing_and_overlaps_nowhere(found):
    rows = rows_of(found)
    for row in rows:
        column = 0
        for piece in row.pieces:
            assert piece.column == column
            column += len(piece.text)
        assert column <= COLUMNS
    for number, unit in enumerate(found):
        shown = "".join(p.text for row in rows for p in row.pieces if p.unit == number)
        wanted = "".join("⏎" if c == "\n" else "⇥" if c == "\t" else visible(c) for c in unit.text)
        assert shown.replace(" ", "") == wanted.replace(" ", "")
    assert [row.line for row in rows if row.line] == list(range(1, sum(bool(row.line) for row in rows) + 1))


def test_a_tab_reaches_to_the_next_stop():
    assert [p.text for p in rows_of([Unit("ab", 1.0), Unit("\t", 1.0), Unit("\tx", 1.0)])[0].pieces] == [
        "ab",
        "⇥ ",
        "⇥   x",
    ]


def test_a_text_of_more_rows_than_are_drawn_says_how_many_are_not():
    figure = token_losses([Unit("\n", 1.0)] * (LONGEST + 5), 8.0, "run", "text")
    assert "5 more rows are not drawn" in figure.texts[1].get_text()


@pytest.mark.parametrize("loss", [math.nan, 1e9])
def test_any_loss_is_drawn(loss):
    assert 1100 <= width(png(token_losses([Unit("x", loss)] * 3, 8.0, "run", "text"))) <= 1600


@given(st.tuples(*[st.floats(0, 1)] * 3))
def test_text_on_any_background_has_the_contrast_that_wcag_asks_for(rgb):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    luminance = float(np.dot([0.2126, 0.7152, 0.0722], linear))
    contrast = 1.05 / (luminance + 0.05) if text_color(rgb) == "white" else (luminance + 0.05) / 0.05
    assert contrast >= 4.5

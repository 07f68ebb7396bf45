"""Drawings: that they can be made of anything, and that what they show can be read."""

import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kindling.plots.figures import (
    WHY_A_GAP,
    Compared,
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
    png(compare_curves([Compared("a", curves(3, 2, math.nan)), Compared("b", curves(0, 0))], ["note"]))


@pytest.mark.parametrize("names", [("_a", "_b"), ("_", "__"), ("a", "_b"), ("$x_", "a$b$"), ("\udce9", "caf\udce9")])
def test_every_run_of_a_comparison_is_in_its_legend(names):
    figure = compare_curves([Compared(name, curves(5, 3)) for name in names], [])
    shown = [text.get_text().strip() for text in figure.legends[0].get_texts()]
    assert shown == [visible(name) for name in names]
    png(figure)


def test_a_value_alone_between_gaps_is_marked():
    c = curves(200, 0)
    c.loss[100:103] = [math.nan, 7.0, math.nan]
    ax = training_curves(c, "run").axes[0]
    assert 101 in ax.lines[0].get_markevery()


def test_the_learning_rate_is_a_line_without_markers_and_one_value_is_a_point():
    line = training_curves(curves(200, 0), "run").axes[2].lines[0]
    assert line.get_markevery() == [] and line.get_linestyle() == "-"
    alone = training_curves(curves(1, 1), "run").axes
    for ax in alone[:4]:
        for line in ax.lines:
            assert line.get_markevery() == [0] and line.get_linestyle() == "None"
    assert all(handle.get_linestyle() == "None" for handle in alone[0].get_legend().legend_handles)


@pytest.mark.parametrize(("n", "m", "said"), [(5, 2, True), (5, 0, False), (0, 2, False)])
def test_why_the_losses_differ_is_said_where_both_are_drawn(n, m, said):
    assert (training_curves(curves(n, m), "run").get_supxlabel() == WHY_A_GAP) is said


def panels(figure) -> dict[str, list[float]]:
    """Return the heights of the lines of each panel, by its title."""
    return {ax.get_title(loc="left"): [line.get_ydata()[0] for line in ax.lines] for ax in figure.axes}


def test_only_what_compares_is_drawn_on_one_axis():
    same = [Compared(name, curves(5, 3, value), "t", "v", "h") for name, value in (("a", 1.0), ("b", 2.0))]
    both = [1.0, 2.0]
    titles = ["Training loss", "Validation loss", "Validation bits per byte"]
    assert panels(compare_curves(same, [])) == dict.fromkeys(titles, both)
    other_tokenizer = Compared("c", curves(5, 3, 3.0), "t of c", "v of c", "h")
    found = panels(compare_curves([*same, other_tokenizer], []))
    assert found == {
        "Training loss of 2 of 3 runs": both,
        "Training loss of c": [3.0],
        "Validation loss of 2 of 3 runs": both,
        "Validation loss of c": [3.0],
        "Validation bits per byte": [1.0, 2.0, 3.0],
    }


def test_a_measure_of_which_runs_have_a_beginning_and_an_end_alone_can_be_left_out():
    ends, points = Compared("a", curves(5, 2, 1.0)), Compared("b", curves(5, 3, 2.0))
    assert panels(compare_curves([ends, ends], [], fewest=3)) == {"Training loss": [1.0, 1.0]}
    assert len(panels(compare_curves([ends, points], [], fewest=3))) == 3
    assert len(panels(compare_curves([ends], []))) == len(panels(compare_curves([ends], [], fewest=9))) == 3


def test_a_run_whose_training_was_not_recorded_is_in_the_legend_of_a_comparison():
    figure = compare_curves([Compared("a", curves(0, 3)), Compared("b", curves(5, 3))], [])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_skipped_steps_are_marked_where_they_were_and_counted():
    c = curves(4, 0)
    c.skipped[:] = [0, 2, 2, 5]
    ax = training_curves(c, "run").axes[3]
    assert ax.lines[-1].get_xdata().tolist() == [2, 4]
    assert "5 skipped" in ax.get_legend().texts[0].get_text()


def test_lines_differ_without_their_colours():
    styles = [(str(s["linestyle"]), s["marker"]) for s in map(line_style, range(49))]
    assert len(set(styles)) == 49


def test_each_layers_tails_end_in_its_own_markers_at_its_extreme_weights():
    found = [Histogram(i, np.ones(2), np.array([-1.0 - i, 0.0, 2.0 + i]), 0.5) for i in range(3)]
    lines = weight_histograms({"up": found}, "run").axes[0].lines
    assert [line.get_xdata()[line.get_markevery()].tolist() for line in lines] == [[-1, 2], [-2, 3], [-3, 4]]
    assert len({line.get_marker() for line in lines}) == len({line.get_linestyle() for line in lines}) == 3


def test_of_many_layers_three_stand_out():
    found = [Histogram(i, np.ones(2), np.array([-1.0, 0.0, 1.0]), 0.5) for i in range(24)]
    ax = weight_histograms({"up": found}, "run").axes[0]
    assert [n for n, line in enumerate(ax.lines) if line.get_marker() and line.get_linewidth() > 1] == [0, 12, 23]
    assert [text.get_text()[:8] for text in ax.get_legend().texts] == ["layer 0:", "layer 12", "layer 23"]


def test_embeddings_and_head_are_points_on_axes_of_their_own():
    kinds = {"token embedding": [Spectrum(None, 100.0, 4.0, 8)], "qkv": [Spectrum(i, 1.0, 2.0, 8) for i in range(3)]}
    kinds["head"] = [Spectrum(None, 50.0, 1.0, 8)]
    single, blocks, below, _ = spectral_norms(kinds, 3, "run").axes
    assert [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in single.lines] == [
        ([0], [100]),
        ([1], [50]),
    ]
    assert {line.get_linestyle() for line in single.lines} == {"None"}
    assert [line.get_ydata().tolist() for line in blocks.lines] == [[1, 1, 1]]
    assert blocks.lines[0].get_linestyle() != "None"
    assert [text.get_text() for text in below.get_xticklabels()] == ["token\nembedding", "head"]


def test_matrices_of_zeros_and_many_layers_are_drawn():
    edges = np.linspace(-1, 1, 5)
    many = [Histogram(i, np.array([0, 1, 1, 0.0]), edges, 0.5) for i in range(8)]
    png(weight_histograms({"up": many, "head": [Histogram(None, np.array([0, 0, 2, 0.0]), edges, 0.0)]}, "run"))
    spectra = [Spectrum(i, math.nan, math.nan, 8) for i in range(8)]
    png(spectral_norms({"proj": spectra, "head": [Spectrum(None, 3.0, 2.0, 8)]}, 8, "run"))


@pytest.mark.parametrize(("layers", "heads", "tokens"), [(1, 1, 1), (2, 16, 48)])
def test_heads_of_any_number_are_drawn_in_a_width_that_fits_a_screen(layers, heads, tokens):
    weights = np.tril(np.ones((layers, heads, tokens, tokens)))
    assert 1100 <= width(png(attention_overview(weights, ["x"] * tokens, "run", "text"))) <= 1600
    figure = attention_layer(weights[0][:2], ["\n  $x$"] * tokens, "run", "text")
    assert 1100 <= width(png(figure)) <= 1600


@pytest.mark.parametrize(("heads", "shown"), [(1, 40), (4, 31), (16, 0)])
def test_heatmaps_of_all_heads_have_as_many_tokens_as_labels_fit_or_all_of_them_without_labels(heads, shown):
    tokens = [f"t{i}" for i in range(40)]
    figure = attention_overview(np.tril(np.ones((2, heads, 40, 40))), tokens, "run", "document 7")
    first, last = figure.axes[0], figure.axes[2 * heads - 1]
    labels = [text.get_text() for text in first.texts if text.get_text() in tokens]
    assert labels == tokens[:shown]  # at the left of the first column
    assert [text.get_text() for text in last.texts if text.get_rotation()] == tokens[:shown]  # below the last row
    assert first.images[0].get_array().shape == (shown or 40,) * 2
    assert f"The first {shown or 40} tokens of document 7." in figure.texts[1].get_text().replace("\n", " ")


def test_lines_of_a_text_have_the_numbers_that_they_have_in_their_file():
    figure = token_losses([Unit("a\nb", 1.0)], 8.0, "run", "text", first_line=14)
    assert [text.get_text() for text in figure.axes[0].texts if text.get_text().isdecimal()] == ["14", "15"]


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

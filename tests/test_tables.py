import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kindling.tables import WIDTH, Section, as_html, as_markdown, as_text

CELLS = [
    ["demo", "0.872 [0.843, 0.901]", "1,116,156"],
    ["from bigcode/the-stack", "12.1 [11.0, 13.2]", "7"],
    ["go", "-", "66"],
]


def test_values_stand_under_each_other_and_so_do_their_intervals():
    lines = as_text([], [Section("Bits", ["source", "bits per byte", "bytes"], CELLS)]).splitlines()
    assert lines == [
        "",
        "Bits",
        "  source                         bits per byte      bytes",
        "  demo                    0.872 [0.843, 0.901]  1,116,156",
        "  from bigcode/the-stack   12.1 [11.0, 13.2]            7",
        "  go                          -                        66",
    ]


def test_a_long_name_is_cut_in_its_middle_so_that_the_table_fits():
    name = "runs/" + "long-" * 30 + "seed-1"
    columns = ["run", *(f"column {i}" for i in range(6))]
    text = as_text([], [Section("Wide", columns, [[name, *["1.0 [0.9, 1]"] * 6]])])
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "…" in text and "ed-1 " in text and "runs/" in text
    assert name in as_markdown("t", [], [Section("Wide", columns, [[name, *["1"] * 6]])])


def test_columns_that_do_not_fit_follow_below_beside_the_names_again():
    columns = ["", *(f"figure {i}" for i in range(12))]
    lines = as_text([], [Section("Wide", columns, [["demo", *["0.1234 [0.1, 0.2]"] * 12]])]).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert sum(line.startswith("  demo ") for line in lines) == 3
    assert re.findall(r"figure \d+", "\n".join(lines)) == columns[1:]


def test_a_long_note_is_wrapped():
    notes = ["word " * 60, "/" + "x" * 300]
    lines = as_text(["word " * 60], [Section("Notes", notes=notes, warnings=["word " * 60])]).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert "\n".join(lines).count("word") == 180


def test_only_asked_for_is_there_colour_and_it_costs_no_width():
    section = Section("Verdicts", ["", "n"], [["a", "1"]], ["note"], ["NOT SANDBOXED"])
    plain, colored = as_text(["head"], [section]), as_text(["head"], [section], color=True)
    assert "\x1b" not in plain
    assert "\x1b[1;31m  NOT SANDBOXED\x1b[0m" in colored
    assert re.sub(r"\x1b\[[\d;]*m", "", colored) == plain


def test_control_characters_of_a_name_do_not_reach_the_terminal():
    text = as_text(["a\x1b[2Jb"], [Section("x\x07", ["", "n"], [["file\n\x1b[31m\udcff.txt", "1"]], ["\x9b note"])])
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]", text)
    assert r"file\n\x1b[31m\udcff.txt" in text


def assert_valid_tables(markdown: str) -> None:
    """Assert that all rows of a table have as many cells, with a line of dashes under the first, and blank lines around."""
    lines = markdown.split("\n")
    for i, line in enumerate(lines):
        if line.startswith("| ---") or line.startswith("| ---:"):
            n = len(re.findall(r"(?<!\\)\|", line))
            assert lines[i - 2] == "" and lines[i - 1].startswith("|")
            rows = [i - 1]
            while lines[rows[-1] + 1].startswith("|"):
                rows.append(rows[-1] + 1)
            assert lines[rows[-1] + 1] == ""
            assert {len(re.findall(r"(?<!\\)\|", lines[row])) for row in rows} == {n}


def test_markdown_has_one_heading_and_valid_tables():
    sections = [
        Section("Bits", ["source", "bits", "bytes"], CELLS, ["a note"], ["a warning"]),
        Section("None", notes=["no"]),
    ]
    markdown = as_markdown("Evaluation of runs/demo", ["on the CPU"], [*sections, sections[0]])
    assert_valid_tables(markdown)
    assert [line for line in markdown.splitlines() if line.startswith("#")] == [
        "# Evaluation of runs/demo", "## Bits", "## None", "## Bits"
    ]  # fmt: skip
    assert "| --- | ---: | ---: |" in markdown and "- **a warning**" in markdown


@given(st.text("ab1_*[](){}<>|\\`#~&;!-+=:^$.\n\x1b é", max_size=30))
@example("[x](y) ![x](y)")
@example("_x_ __init__ a_b")
def test_markdown_shows_every_name_as_it_is(name):
    parser = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"linkify": False})
    name = f"a{name}b"
    markdown = as_markdown(name, [name], [Section("S", ["", "n"], [[name, "1"], [name, "2 *"]], [name], [name])])
    shown = [
        "".join(child.content for child in token.children if child.type in ("text", "text_special"))
        for token in parser.parse(markdown)
        if token.type == "inline"
    ]
    printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
    assert [text for text in shown if text not in ("S", "", "n", "1", "2 *")] == [printable] * 6


def test_html_has_a_row_for_each_row_and_nothing_in_it_is_markup():
    section = Section("<b>", ["name", "n"], [["<i>&", "1"]], ["a note"], ["careful"])
    text = as_html([section])
    assert text.count("<tr>") == 2 and "<b>" not in text and "<i>" not in text
    for words in (
        "&lt;i&gt;&amp;",
        '<li class="warning">careful</li>',
        "<li>a note</li>",
        '<td class="figure" data-label="n">1</td>',
    ):
        assert words in text


def test_html_of_no_rows_has_no_table():
    assert "<table" not in as_html([Section("Nothing")])


@pytest.mark.parametrize("row", [["demo"], ["demo", "1", "runs/demo"]])
@pytest.mark.parametrize("write", [lambda s: as_text([], s), lambda s: as_markdown("t", [], s), as_html])
def test_a_row_that_is_not_as_long_as_the_head_is_refused(row, write):
    with pytest.raises(ValueError, match=f"must have 2 cells, but has {len(row)}"):
        write([Section("S", ["run", "loss"], [["base", "1"], row])])

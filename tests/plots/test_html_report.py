"""The page: well-formed, self-contained, and safe whatever is put into it."""

import base64
import re
from html.parser import HTMLParser

from hypothesis import given, settings
from hypothesis import strategies as st

from kindling.plots.html_report import POLICY, STYLE, Picture, Sample, Samples, page
from kindling.tables import Section

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Collects elements and text, and asserts that every element is closed in its turn."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def made(text: str) -> str:
    sections = [Section(text, [text, "n"], [[text, "1"]], [text], [text])]
    picture, sample = Picture(PNG, text, text), Sample(text, text, text, text)
    return page(text, [(text, text)], sections, [picture], [Samples(text, text, [sample])], text)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.sampled_from("<>&\"'/=! abc-\x00\x1b\u2028\n"), min_size=1))
def test_nothing_that_is_put_in_becomes_markup(text):
    plain, found = Reader(made("x")), Reader(made(text))
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in plain.tags]
    assert [sorted(attrs) for _, attrs in found.tags] == [sorted(attrs) for _, attrs in plain.tags]


def test_text_is_shown_as_it_is():
    assert "a <b> & \\x1b" in "".join(Reader(made("a <b> & \x1b")).texts)


def test_pictures_are_inside_with_size_and_words():
    (image,) = [attrs for tag, attrs in Reader(made("hill")).tags if tag == "img"]
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == PNG
    assert (image["width"], image["height"], image["alt"]) == ("1", "1", "hill")


def test_the_browser_is_told_to_load_nothing_and_there_is_nothing_to_load():
    text = made("x")
    assert f'content="{POLICY}"' in text and POLICY.startswith("default-src 'none'")
    assert not re.search(r"https?://|url\(|@import|<script|<link", text)


def rules(style: str, query: str) -> str:
    """Return the rules of a style sheet for a media query."""
    start = style.index(f"@media {query} {{") + len(query) + 9
    depth = 1
    for end, c in enumerate(style[start:], start):
        depth += (c == "{") - (c == "}")
        if not depth:
            return style[start:end]
    raise AssertionError


def test_on_a_narrow_screen_a_row_is_a_block_whose_cells_have_the_names_of_their_columns():
    narrow = rules(STYLE, "screen and (max-width: 40rem)")
    assert ".wide td { display: block; }" in narrow and "content: attr(data-label)" in narrow
    assert "white-space: normal; overflow-wrap: anywhere" in narrow  # figures are else not broken
    sections = [Section("s", ["", "loss"], [["all", "1.0"]])]
    tags = Reader(page("t", [("weights", "0" * 64)], sections, [], [], "")).tags
    cells = [attrs for tag, attrs in tags if tag == "td" and "class" in attrs]
    assert cells == [{"class": "name"}, {"class": "figure", "data-label": "loss"}]
    assert ".facts td { overflow-wrap: anywhere; }" in STYLE  # such as a sha256
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in tags


def test_in_the_dark_pictures_are_dark_too_but_not_in_print():
    assert "figure img { filter: invert(.9)" in rules(STYLE, "screen and (prefers-color-scheme: dark)")
    assert "filter" not in rules(STYLE, "print")
    dark = rules(STYLE, "(prefers-color-scheme: dark)")
    assert "--page: #16181b" in dark and "--text: #e6e6e6" in dark


def test_there_are_dark_colours_and_a_print_style():
    assert "prefers-color-scheme: dark" in made("x") and "@media print" in made("x")

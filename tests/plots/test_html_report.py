"""The page: well-formed, self-contained, and safe whatever is put into it."""

import base64
import re
from html.parser import HTMLParser

from hypothesis import given, settings
from hypothesis import strategies as st

from kindling.plots.html_report import POLICY, Picture, Sample, page
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
    return page(text, [(text, text)], sections, [picture], [sample], text, text)


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


def test_there_are_dark_colours_and_a_print_style():
    assert "prefers-color-scheme: dark" in made("x") and "@media print" in made("x")

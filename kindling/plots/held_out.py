"""Chooses a held-out text to draw: a typical one, past its licence header.

    text = typical_text(model, run.heldout("val"), tokenizer, runtime)
    text.what          # which document it is, and why

Documents are drawn from all over the split, always the same ones. The text whose loss is the median of theirs is taken: the
first document of a split may be a licence that the model knows by heart, or a table of numbers.
"""

from __future__ import annotations

import re

import numpy as np

from kindling.data.examples import Examples
from kindling.data.shards import TokenDataset
from kindling.device import Runtime
from kindling.plots.inspection import InspectionError, Text, given_text, losses_of
from kindling.tokenization.tokenizer import Tokenizer
from model import LanguageModel

LINES = 30  # of a held-out document
SHORT = 100  # tokens; shorter texts are taken only if there is no other
PROBED = 200  # documents of a split that are read at most
COMPARED = 15  # texts, of whose losses the median is taken
HEADER_CHARS = 8000  # in which a licence header is looked for

_LICENCE = re.compile(r"copyright|licen[cs]e|SPDX-", re.IGNORECASE)
_COMMENT = re.compile(  # lines of comments under each other, one comment in brackets, or a docstring
    r"""\s*(?:(?:[ \t]*(?:\#|//|--|;|%)[^\n]*(?:\n|$))+
         |(?:/\*.*?\*/|<!--.*?-->|[rRuU]?\"{3}.*?\"{3}|[rRuU]?'{3}.*?'{3})[ \t]*(?:\n|$))""",
    re.VERBOSE | re.DOTALL,
)


def typical_text(model: LanguageModel, dataset: TokenDataset, tokenizer: Tokenizer, runtime: Runtime) -> Text:
    """Return the text of a split whose mean loss is the median of COMPARED texts.

    Raises InspectionError if no document of the split can be drawn.
    """
    found = candidates(dataset, tokenizer, model.cfg.block_size)
    means = [float(np.nanmean(losses_of(model, text, runtime))) for text in found]
    order = sorted(range(len(found)), key=means.__getitem__)
    chosen = order[(len(order) - 1) // 2]
    text = found[chosen]
    if len(found) > 1:
        text.what += f"; a typical one: its loss of {means[chosen]:.2f} is the median of {len(found)}"
    return text


def candidates(dataset: TokenDataset, tokenizer: Tokenizer, block_size: int) -> list[Text]:
    """Return up to COMPARED beginnings of documents, or of conversations, from all over a split.

    Documents that do not encode to their tokens again are skipped. Raises InspectionError if none is left.
    """
    starts = np.cumsum(dataset.lengths) - dataset.lengths
    numbers = np.random.default_rng(0).permutation(len(starts))[:PROBED].tolist()
    found: list[Text] = []
    short: list[Text] = []
    for number in numbers:
        ids = dataset.read(int(starts[number]), int(dataset.lengths[number])).tolist()
        text = _text_of(dataset, number, ids[:-1], tokenizer, block_size)
        if text is not None and any(text.predicted[1:]):
            (found if len(text.ids) > min(SHORT, block_size) else short).append(text)
        if len(found) == COMPARED:
            break
    if not found and not short:
        raise InspectionError(
            f"the {dataset.split} split must hold a text that its tokens decode to, but {len(numbers):,} of its documents "
            f"do not; give one with --text"
        )
    return found or short[:COMPARED]


def _text_of(dataset: TokenDataset, number: int, ids: list[int], tokenizer: Tokenizer, block_size: int) -> Text | None:
    """Return the text of a document's `ids` to draw, or None if it would not encode to the same tokens."""
    name = f"document {number:,} of the {dataset.split} split"
    if isinstance(dataset, Examples):
        predicted = dataset.example(number).supervised[: len(ids)].tolist()
        if "\ufffd" in tokenizer.decode(ids) or not ids:
            return None
        name = name.replace("document", "conversation")
        shown = slice(block_size + 1)
        what = f"{name}, of which the responses are predicted"
        return Text(ids[shown], predicted[shown], what, started=False, name=name)
    ids = [i for i in ids if i != tokenizer.bos_id]
    text = tokenizer.decode(ids)
    # only the beginning is encoded again, as a document may have megabytes
    if "\ufffd" in text or tokenizer.encode(text[:2000])[:50] != ids[:50]:
        return None
    start = past_header(text)
    shown_text = "".join(text[start:].splitlines(keepends=True)[:LINES])
    if not shown_text.strip():
        return None
    first_line = text.count("\n", 0, start) + 1
    if first_line > 1:
        name += f", from line {first_line}"
    found = given_text(tokenizer, shown_text, block_size, name, crop=True)
    found.what = f"{len(found.ids) - 1:,} of {len(ids):,} tokens of {name}"
    found.first_line = first_line
    return found


def past_header(text: str) -> int:
    """Return where a text goes on after the comments at its top that speak of a licence or of copyright; else 0."""
    end = position = 0
    while (comment := _COMMENT.match(text, position, HEADER_CHARS)) is not None:
        position = comment.end()
        if _LICENCE.search(comment[0]):
            end = position
    return end + len(text[end:]) - len(text[end:].lstrip("\n")) if end else 0

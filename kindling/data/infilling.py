"""Cuts a document to pieces for fill-in-the-middle.

    pieces = cut_document(ids, tokenizer, Shares(rate=0.5, spm=0.5, lines=0), context=256, digest=digest)

A piece fits in a row of the model whole. `rate` of the pieces are cut at two places: prefix, middle and suffix are encoded
each on its own, and the middle comes last, with an end-of-text token. So a model learns to stop where the suffix begins, and a
prompt has the tokens that it would have in training, wherever the cursor is. The other pieces stay as they are.

Source: Bavarian et al. 2022, "Efficient training of language models to fill in the middle", with its cuts at the level of the
context: a suffix that is further away than a model can see teaches nothing. The places are any two characters, as there, or for
the share `lines` the borders of what a person writes at a cursor: the rest of a line, or a statement with its block (the idea is
that of AST-FIM, Gong et al. 2025). Indentation shows a block, so this is the same in Python, C and Java, and needs no parser,
which would refuse a piece of a file.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np

from kindling.errors import TokenizerError
from kindling.tokenization.infilling import arrange, require_fim
from kindling.tokenization.tokenizer import Tokenizer

KINDS = ("left to right", "PSM", "SPM", "PSM, lines", "SPM, lines")
LEFT_TO_RIGHT, PSM, SPM, PSM_LINES, SPM_LINES = range(5)
LENGTH, KIND = range(2)  # columns of the table of pieces
N_CONTROL = 4  # of a piece: three control tokens, and end-of-text
_NEAR = 8  # tokens on either side that show whether a character is cut; one has at most four bytes


class Shares(NamedTuple):
    """How many pieces become fill-in-the-middle, and of these, how many have the suffix first and how many are cut at lines."""

    rate: float
    spm: float
    lines: float


class Pieces(NamedTuple):
    """The pieces of a document, one after the other: ids (N,) uint32, and length and kind of each, (P, 2) int64."""

    ids: np.ndarray
    table: np.ndarray


def cut_document(ids: list[int], tokenizer: Tokenizer, shares: Shares, context: int, digest: bytes) -> Pieces:
    """Return the pieces of a document: `ids` as in training, with its end-of-text token.

    `digest` is the hash of the content and seeds all choices, so they depend on nothing else. A piece from left to right has at
    most `context` tokens. One of fill-in-the-middle is read without a token before it, so it has at most one more.
    """
    cut = _Cut(ids, tokenizer, context, random.Random(int.from_bytes(digest, "big")))
    out: list[int] = []
    table: list[tuple[int, int]] = []
    while cut.at < len(ids):
        kind, piece = cut.infilling(shares) if cut.wants_infilling(shares.rate) else (LEFT_TO_RIGHT, [])
        if not piece:
            kind, piece = LEFT_TO_RIGHT, cut.left_to_right()
        out += piece
        table.append((len(piece), kind))
    return Pieces(np.array(out, dtype=np.uint32), np.array(table, dtype=np.int64).reshape(-1, 2))


class _Cut:
    """The cutting of one document; `at` is where the next piece begins."""

    def __init__(self, ids: list[int], tokenizer: Tokenizer, context: int, rng: random.Random):
        self.ids, self.tokenizer, self.context, self.rng = ids, tokenizer, context, rng
        self.fim = require_fim(tokenizer, "set --data.fim-rate 0, or train one with --tokenizer.kind bpe")
        self.at, self.end = 0, len(ids) - 1  # without end-of-text

    def wants_infilling(self, rate: float) -> bool:
        """Return whether the next piece is to be filled in. End-of-text alone has nothing to fill in."""
        return self.at != self.end and self.rng.random() < rate

    def left_to_right(self) -> list[int]:
        """Return the next tokens as they are."""
        stop = self._boundary(self.at, min(len(self.ids), self.at + self.context))
        if stop == self.at:
            raise TokenizerError(f"a text must divide between two of its tokens, but does not near token {self.at}")
        piece, self.at = self.ids[self.at : stop], stop
        return piece

    def infilling(self, shares: Shares) -> tuple[int, list[int]]:
        """Return as many of the next tokens as fit, cut at two places, and their kind; no tokens if not even one fits."""
        spm = self.rng.random() < shares.spm
        start = self.at + (self.ids[self.at] == self.tokenizer.bos_id)  # a prompt to be filled in has none either
        room = self.context + 1 - N_CONTROL
        stop = self._boundary(start, min(self.end, start + room))
        low, high = sorted((self.rng.random(), self.rng.random()))
        at_lines = LineCut.draw(self.rng) if shares.lines and self.rng.random() < shares.lines else None
        while stop > start:
            text = self._text(start, stop)
            found = None if at_lines is None else at_lines.places(text)
            a, b = found or (int(low * (len(text) + 1)), int(high * (len(text) + 1)))
            prefix, middle, suffix = (self.tokenizer.encode(part) for part in (text[:a], text[a:b], text[b:]))
            over = len(prefix) + len(middle) + len(suffix) - room  # words that are cut take more tokens
            if over <= 0:
                self.at = stop + (stop == self.end)
                kind = (SPM if spm else PSM) if found is None else SPM_LINES if spm else PSM_LINES
                return kind, [*arrange(self.fim, prefix, suffix, middle, spm), self.ids[-1]]
            stop = self._boundary(start, max(start, stop - over))
        return LEFT_TO_RIGHT, []

    def _text(self, start: int, stop: int) -> str:
        return self.tokenizer.decode_batch([self.ids[start:stop]])[0]

    def _boundary(self, start: int, stop: int) -> int:
        """Return the last place up to `stop` that cuts no character, or `start` if there is none."""
        while start < stop < self.end:
            near = max(start, stop - _NEAR), min(self.end, stop + _NEAR)
            if self._text(near[0], stop) + self._text(stop, near[1]) == self._text(*near):
                break
            stop -= 1
        return stop


class LineCut(NamedTuple):
    """Four random numbers from 0 to 1, which say of any text where a line or a block of it is cut out."""

    line: float
    start: float
    within: float
    end: float

    @classmethod
    def draw(cls, rng: random.Random) -> LineCut:
        """Return a cut at random."""
        return cls(rng.random(), rng.random(), rng.random(), rng.random())

    def places(self, text: str) -> tuple[int, int] | None:
        """Return where the middle begins and ends; None for a text without a whole line.

        It is about one of the lines with text. It begins, each in a third of the cases, at the start of the line, after its
        indentation, or anywhere in it. It ends at the end of the line, or in half of the cases at the end of its block.
        """
        lines = text.split("\n")[:-1]  # the last one may go on in the next piece
        with_text = [number for number, line in enumerate(lines) if line.strip()]
        if not with_text:
            return None
        number = with_text[int(self.line * len(with_text))]
        line = lines[number]
        offset = (0, _indentation(line), int(self.within * len(line)))[int(3 * self.start)]
        last = number if self.end < 0.5 else end_of_block(lines, number)
        begins = sum(len(line) + 1 for line in lines[:number])
        return begins + offset, begins + sum(len(line) + 1 for line in lines[number : last + 1]) - 1


def end_of_block(lines: list[str], first: int) -> int:
    """Return the last line of the block that the line `first` opens: deeper lines, and a bracket that closes it."""
    last, depth = first, _indentation(lines[first])
    for number in range(first + 1, len(lines)):
        line = lines[number]
        if not line.strip():
            continue
        if _indentation(line) <= depth:
            closes = _indentation(line) == depth and line.lstrip()[0] in ")]}" and last > first
            return number if closes else last
        last = number
    return last


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip())

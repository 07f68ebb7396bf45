"""Cuts a document to pieces for fill-in-the-middle, and encodes prompts to be filled in.

    pieces = cut_document(ids, tokenizer, rate=0.5, spm_share=0.5, context=256, digest=digest)
    ids = encode_infill(tokenizer, "def add(a, b):\\n    ", "\\n", spm=False)      # the model writes what is between them

A piece fits in a row of the model whole. `rate` of the pieces are cut at two characters: prefix, middle and suffix are encoded
each on its own, and the middle comes last, with an end-of-text token. So a model learns to stop where the suffix begins, and a
prompt has the tokens that it would have in training, wherever the cursor is. The other pieces stay as they are.

Source: Bavarian et al. 2022, "Efficient training of language models to fill in the middle", with its cuts at the level of the
context: a suffix that is further away than a model can see teaches nothing.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np

from kindling.tokenization.infilling import FIM_TOKENS, FimIds, arrange
from kindling.tokenization.tokenizer import Tokenizer, TokenizerError

KINDS = ("left to right", "PSM", "SPM")
LEFT_TO_RIGHT, PSM, SPM = range(3)
LENGTH, KIND = range(2)  # columns of the table of pieces
N_CONTROL = 4  # of a piece: three control tokens, and end-of-text
_NEAR = 8  # tokens on either side that show whether a character is cut; one has at most four bytes


class Pieces(NamedTuple):
    """The pieces of a document, one after the other: ids (N,) uint32, and length and kind of each, (P, 2) int64."""

    ids: np.ndarray
    table: np.ndarray


def require_fim(tokenizer: Tokenizer, way_out: str) -> FimIds:
    """Return the control tokens; raises TokenizerError, which ends with `way_out`, for a vocabulary without them."""
    if tokenizer.fim is None:
        raise TokenizerError(
            f"a tokenizer must have the special tokens {' '.join(FIM_TOKENS)} to fill in the middle, but this one lacks them; "
            f"{way_out}"
        )
    return tokenizer.fim


def encode_infill(tokenizer: Tokenizer, prefix: str, suffix: str, spm: bool = False) -> list[int]:
    """Return the prompt after which a model writes what stands between `prefix` and `suffix`, and then end-of-text.

    It has no begin-of-text token, as in training. Raises TokenizerError for a vocabulary without the control tokens.
    """
    fim = require_fim(tokenizer, "complete without a suffix, or train a tokenizer with --tokenizer.kind bpe")
    return arrange(fim, tokenizer.encode(prefix), tokenizer.encode(suffix), [], spm)


def cut_document(
    ids: list[int], tokenizer: Tokenizer, rate: float, spm_share: float, context: int, digest: bytes
) -> Pieces:
    """Return the pieces of a document: `ids` as in training, with its end-of-text token.

    `digest` is the hash of the content and seeds all choices, so they depend on nothing else. A piece from left to right has at
    most `context` tokens. One of fill-in-the-middle is read without a token before it, so it has at most one more.
    """
    cut = _Cut(ids, tokenizer, context, random.Random(int.from_bytes(digest, "big")))
    out: list[int] = []
    table: list[tuple[int, int]] = []
    while cut.at < len(ids):
        kind = cut.choose(rate, spm_share)
        piece = [] if kind == LEFT_TO_RIGHT else cut.infilling(kind == SPM)
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

    def choose(self, rate: float, spm_share: float) -> int:
        """Return the kind of the next piece. End-of-text alone has nothing to fill in."""
        if self.at == self.end or self.rng.random() >= rate:
            return LEFT_TO_RIGHT
        return PSM if self.rng.random() >= spm_share else SPM

    def left_to_right(self) -> list[int]:
        """Return the next tokens as they are."""
        stop = self._boundary(self.at, min(len(self.ids), self.at + self.context))
        if stop == self.at:
            raise TokenizerError(f"a text must divide between two of its tokens, but does not near token {self.at}")
        piece, self.at = self.ids[self.at : stop], stop
        return piece

    def infilling(self, spm: bool) -> list[int]:
        """Return as many of the next tokens as fit, cut at two characters; nothing if not even one token does."""
        start = self.at + (self.ids[self.at] == self.tokenizer.bos_id)  # a prompt to be filled in has none either
        room = self.context + 1 - N_CONTROL
        stop = self._boundary(start, min(self.end, start + room))
        low, high = sorted((self.rng.random(), self.rng.random()))
        while stop > start:
            text = self._text(start, stop)
            a, b = int(low * (len(text) + 1)), int(high * (len(text) + 1))
            prefix, middle, suffix = (self.tokenizer.encode(part) for part in (text[:a], text[a:b], text[b:]))
            over = len(prefix) + len(middle) + len(suffix) - room  # words that are cut take more tokens
            if over <= 0:
                self.at = stop + (stop == self.end)
                return [*arrange(self.fim, prefix, suffix, middle, spm), self.ids[-1]]
            stop = self._boundary(start, max(start, stop - over))
        return []

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

"""Token healing: continues a prompt that ends inside a word or an indentation. Also, how long a prompt may be.

    kept, healing = split_for_healing(ids, spellings)
    # generate after `kept`, choosing each token from healing.allowed(new): the new text begins with healing.text

A tokenizer joins "ret" and "urn", or a newline and the indentation after it. So in training a model has rarely seen text
continue at the place of an editor's cursor. Therefore the prompt's last tokens are taken back, and the next tokens must first
spell the text that was taken back. Source: guidance's token healing, here over several tokens and in steps.

Limit: tokens that are only part of a character are never taken back; a prompt that ends in one is continued unchanged.
Imports no torch, as autocomplete.py uses it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Sequence
from functools import cached_property

import numpy as np

N_BACK = 3  # tokens; one token repairs half as many cuts inside words, and going back to a whole word repairs no more than three


def longest_prompt(block_size: int, max_new_tokens: int) -> int:
    """Return how many tokens a prompt may have so that the new tokens fit in the context after it, at least half the context."""
    return block_size - min(max_new_tokens, block_size // 2)


def newest_text(text: str, n_chars: int) -> str:
    """Return at most the last `n_chars` of a text, from the start of a line in their first half, where a tokenizer would split.

    Without a line that starts there, it begins in the middle of one.
    """
    end = text[-n_chars:]
    return end if len(end) == len(text) else end[end.find("\n", 0, len(end) // 2) + 1 :]


class Spellings(list[str]):
    """The text of each token id, and the tokens by their text."""

    @cached_property
    def _order(self) -> tuple[list[str], list[int]]:
        """The texts in their order, but for empty ones, and their ids."""
        ids = sorted((i for i, text in enumerate(self) if text), key=self.__getitem__)
        return [self[i] for i in ids], ids

    def of(self, text: str) -> list[int]:
        """Return the tokens with this text."""
        texts, ids = self._order
        return ids[bisect_left(texts, text) : bisect_right(texts, text)]

    def beginning(self, text: str) -> list[int]:
        """Return the tokens whose text begins with this one."""
        texts, ids = self._order
        start = bisect_left(texts, text)
        # in the order of their texts they stand together
        end = bisect_left(range(len(texts)), True, lo=start, key=lambda i: not texts[i].startswith(text))
        return ids[start:end]


class Healing:
    """What the next tokens must spell: first `text`, then anything."""

    def __init__(self, text: str, spellings: Sequence[str], taken_back: Sequence[int] = ()):
        """`spellings` has the text of each token id, and is empty for tokens that are never allowed."""
        self.text = text
        self.taken_back = list(taken_back)
        """The tokens that spelt the text in the prompt, if there was one. Most of them are mostly drawn again."""
        self._spellings = spellings if isinstance(spellings, Spellings) else Spellings(spellings)
        # whether the text from each character on can be spelled: " →" may be a token while "→" is not
        self._goes_on = [False] * len(text) + [True]
        for i in reversed(range(len(text))):
            inside = (self._goes_on[j] and self._spellings.of(text[i:j]) for j in range(i + 1, len(text) + 1))
            self._goes_on[i] = any(inside) or bool(self._spellings.beginning(text[i:]))

    def allowed(self, out: Sequence[int]) -> np.ndarray | None:
        """Return which tokens may follow the new tokens `out`, (V,) bool with at least one True, or None for all."""
        at = sum(len(self._spellings[token]) for token in out)
        if at >= len(self.text):
            return None
        left = self.text[at:]
        mask = np.zeros(len(self._spellings), bool)
        mask[self._spellings.beginning(left)] = True
        for n in range(1, len(left)):
            if self._goes_on[at + n]:
                mask[self._spellings.of(left[:n])] = True
        return mask


def split_for_healing(ids: Sequence[int], spellings: Sequence[str]) -> tuple[list[int], Healing]:
    """Return the tokens of the prompt that are kept, at least one, and the text that must come next, which may be empty."""
    n = 0
    while n < min(N_BACK, len(ids) - 1) and spellings[ids[-n - 1]]:
        n += 1
    kept, back = list(ids[: len(ids) - n]), ids[len(ids) - n :]
    return kept, Healing("".join(spellings[token] for token in back), spellings, back)


def token_texts(
    decode_batch: Callable[[list[list[int]]], list[str]],
    before: int,
    n_tokens: int,
    vocab_size: int,
    control: Collection[str],
) -> Spellings:
    """Return the text that each of `vocab_size` ids has inside a text.

    It is empty for `control` tokens, for parts of characters, and for ids beyond the tokenizer's `n_tokens`. `before` is any
    token of text; the others are decoded after it, because SentencePiece drops the space of a text's first token.
    """
    first, *texts = decode_batch([[before], *([before, token] for token in range(n_tokens))])
    spellings = [text[len(first) :] for text in texts]
    spellings = ["" if "\ufffd" in text or text in control else text for text in spellings]
    return Spellings(spellings + [""] * (vocab_size - n_tokens))

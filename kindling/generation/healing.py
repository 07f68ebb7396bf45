"""Token healing: a prompt that ends in the middle of a word or of an indentation is continued as if it did not.

    kept, healing = take_back(ids, spellings)
    # generate after `kept`, each time from the tokens that healing.allowed(new) leaves: the text begins with healing.text

A tokenizer joins "ret" and "urn", or a line's end and the indentation behind it, so a model has hardly seen text go on where
an editor's cursor stands. The prompt's last tokens are taken back, and of the next ones only those are allowed whose text
agrees with what was taken. Source: guidance's token healing, here over several tokens and in steps.

Limit: tokens that are part of a character are never taken back, so a prompt that ends in one is continued as it is.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence

import numpy as np

N_BACK = 3  # tokens; one mends half as many of the cuts inside words, and back to a whole word no more


def longest_prompt(block_size: int, max_new_tokens: int) -> int:
    """Return how many tokens a prompt may have so that the new ones have room behind it, but at least half the context."""
    return block_size - min(max_new_tokens, block_size // 2)


class Healing:
    """What the next tokens must spell: `text`, and after it anything."""

    def __init__(self, text: str, spellings: Sequence[str]):
        """`spellings` has the text of each token id, empty for those that are never allowed."""
        self.text = text
        self._spellings = spellings
        known = sorted(set(spellings))

        def beyond(rest: str) -> bool:
            """Whether a token begins with this."""
            at = bisect_left(known, rest)
            return at < len(known) and known[at].startswith(rest)

        # from which characters on the rest can be spelt: " →" may be a token, and "→" none
        self._goes_on = [False] * len(text) + [True]
        short = {s for s in known if s and len(s) <= len(text)}
        for i in reversed(range(len(text))):
            inside = (text[i:j] in short and self._goes_on[j] for j in range(i + 1, len(text) + 1))
            self._goes_on[i] = any(inside) or beyond(text[i:])

    def allowed(self, out: Sequence[int]) -> np.ndarray | None:
        """Return which tokens may follow the new tokens `out`, (V,) bool, at least one, or None for all."""
        at = sum(len(self._spellings[token]) for token in out)
        if at >= len(self.text):
            return None
        left = self.text[at:]
        return np.array(
            [
                bool(s) and (s.startswith(left) or (left.startswith(s) and self._goes_on[at + len(s)]))
                for s in self._spellings
            ]
        )


def take_back(ids: Sequence[int], spellings: Sequence[str]) -> tuple[list[int], Healing]:
    """Return what is left of the prompt `ids`, at least one token, and what must come next, if only an empty text."""
    n = 0
    while n < min(N_BACK, len(ids) - 1) and spellings[ids[-n - 1]]:
        n += 1
    kept, back = list(ids[: len(ids) - n]), ids[len(ids) - n :]
    return kept, Healing("".join(spellings[token] for token in back), spellings)


def token_texts(
    decode_batch: Callable[[list[list[int]]], list[str]],
    before: int,
    n_tokens: int,
    vocab_size: int,
    control: Collection[str],
) -> list[str]:
    """Return the text of each of `vocab_size` ids inside a text: empty for the `control` tokens, for parts of characters, and
    beyond the tokenizer's `n_tokens`.

    `before` is any token of text to decode the others behind: SentencePiece drops the space of a text's first.
    """
    first, *texts = decode_batch([[before], *([before, token] for token in range(n_tokens))])
    spellings = [text[len(first) :] for text in texts]
    spellings = ["" if "\ufffd" in text or text in control else text for text in spellings]
    return spellings + [""] * (vocab_size - n_tokens)

"""Token healing: a prompt that ends in the middle of a word or of an indentation is continued as if it did not.

    kept, healing = heal(tokenizer, ids, vocab_size)
    stream(model, kept, sampling, eos_id, healing.allowed)      # its text begins with healing.text

A tokenizer joins "ret" and "urn", or a line's end and the indentation behind it, so a model has hardly seen text go on where
an editor's cursor stands. The prompt's last tokens are taken back, and of the next ones only those are allowed whose text
agrees with what was taken. Source: guidance's token healing, here over several tokens and in steps.

Limit: tokens that are part of a character are never taken back, so a prompt that ends in one is continued as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tokenizer import Tokenizer

N_BACK = 3  # tokens; one mends half as many of the cuts inside words, and back to a whole word no more


class Healing:
    """What the next tokens must spell: `text`, and after it anything."""

    def __init__(self, text: str, spellings: Sequence[str]):
        """`spellings` has the text of each token id, empty for those that are never allowed."""
        self.text = text
        self._spellings = spellings

    def allowed(self, out: Sequence[int]) -> torch.Tensor | None:
        """Return which tokens may follow the new tokens `out`, (V,) bool, or None for all."""
        left = self.text
        for token in out:
            if not left:
                break
            left = left[len(self._spellings[token]) :]
        if not left:
            return None
        return torch.tensor([bool(s) and (s.startswith(left) or left.startswith(s)) for s in self._spellings])


def heal(tokenizer: Tokenizer, ids: Sequence[int], vocab_size: int) -> tuple[list[int], Healing]:
    """Return what is left of the prompt `ids`, at least one token, and what must come next, if only an empty text."""
    spellings = token_texts(tokenizer, vocab_size)
    n = 0
    while n < min(N_BACK, len(ids) - 1) and spellings[ids[-n - 1]]:
        n += 1
    kept, back = list(ids[: len(ids) - n]), ids[len(ids) - n :]
    return kept, Healing("".join(spellings[token] for token in back), spellings)


def token_texts(tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """Return the text of each token inside a text; empty for control tokens and for parts of characters."""
    (*_, before) = tokenizer.encode("x")  # SentencePiece drops the space of a text's first token
    start = len(tokenizer.decode([before]))
    texts = tokenizer.decode_batch([[before, token] for token in range(tokenizer.vocab_size)])
    spellings = [
        "" if "\ufffd" in text or text[start:] in tokenizer.cfg.special_tokens else text[start:] for text in texts
    ]
    return spellings + [""] * (vocab_size - len(spellings))

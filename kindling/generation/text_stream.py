"""Makes text of tokens as they come: whole characters, up to a stop string. Imports no torch, as autocomplete.py uses it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

EndIds = int | Collection[int]
"""The id of the token that ends a text, or the ids of several."""


def all_ends(ids: EndIds) -> frozenset[int]:
    """Return the ids of the tokens that end a text as a set."""
    return frozenset([ids] if isinstance(ids, int) else ids)


class Decoder(Protocol):
    """A tokenizer, as far as it is needed here."""

    def decode(self, ids: Sequence[int], /) -> str:
        """Return the text of token ids. An incomplete character becomes U+FFFD."""


class TextStream:
    """Turns a stream of token ids into text of whole characters, up to the first of the strings `stop`.

    A character whose bytes are spread over several tokens is held back until the last of them, and so is text that may be the
    beginning of a stop string. Joined, the pieces are the decoded text, without that of the tokens `after` which they come and
    without the `skip` characters that follow. SentencePiece may drop the space of a text's first token, so each token is
    decoded with all tokens before it. This costs little beside the model's pass.
    """

    def __init__(self, tokenizer: Decoder, stop: Sequence[str] = (), after: Sequence[int] = (), skip: int = 0):
        self._tokenizer, self._stop = tokenizer, stop
        self._ids = list(after)
        self.n_decoded = len(tokenizer.decode(after))
        """Whole characters of all tokens so far, those of `after` included."""
        self._said = self.n_decoded + skip  # characters that were returned, or are never returned
        self.found: str | None = None
        """The stop string that was found; no more text is returned then."""

    @property
    def stopped(self) -> bool:
        """A stop string was found."""
        return self.found is not None

    def add(self, token: int) -> str:
        """Return the text that this token completes, which may be empty."""
        self._ids.append(token)
        # U+FFFD at the end is most likely a character whose last bytes have not come yet
        text = self._tokenizer.decode(self._ids).rstrip("\ufffd")
        self.n_decoded = len(text)
        return self._beyond(text, more=True)

    def add_all(self, ids: Sequence[int]) -> str:
        """Return the text of all remaining tokens at once."""
        if self._stop:  # token by token, so that a stop string is found in the same place as in a stream
            said = "".join(self.add(token) for token in ids if not self.stopped)
            return said + self.finish()
        self._ids += ids
        return self.finish()

    def finish(self, cut: bool = False) -> str:
        """Return the text that was held back. Call it when no more tokens come.

        `cut`: a limit ended the text, so a character whose last bytes are missing is left out. Otherwise it becomes U+FFFD.
        """
        text = self._tokenizer.decode(self._ids)
        return self._beyond(text.rstrip("\ufffd") if cut else text, more=False)

    def _beyond(self, text: str, more: bool) -> str:
        if self.stopped:
            return ""
        # no stop string begins in text that was returned: it would have been held back
        found = [(at, s) for s in self._stop if (at := text.find(s, self._said)) >= 0]
        if found:
            at, self.found = min(found)
            text = text[:at]
        elif more:
            text = text[: len(text) - self._n_held(text)]
        new = text[self._said :]
        self._said += len(new)
        return new

    def _n_held(self, text: str) -> int:
        """Return how many characters at the end may be the beginning of a stop string."""
        longest = min(max(map(len, self._stop), default=1) - 1, max(0, len(text) - self._said))
        lengths = range(longest, 0, -1)
        return next((n for n in lengths if any(s.startswith(text[-n:]) for s in self._stop)), 0)

"""The tokenizer of an export, through the `tokenizers` library alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from kindling.errors import difference
from kindling.generation.healing import token_texts
from kindling.int8.model import TOKENIZER, CompletionError, Model


class ExportTokenizer:
    """Text to token ids, and back. A special token that is written in a text is text."""

    def __init__(self, folder: Path, model: Model):
        """Read the tokenizer of the export in `folder`, whose model this is. Raises CompletionError if it is damaged."""
        from tokenizers import Tokenizer

        try:
            self.backend = Tokenizer.from_file(str(folder / TOKENIZER))
        except Exception as e:  # the library raises plain Exception
            raise CompletionError(
                f"{folder / TOKENIZER} must be the run's tokenizer, but cannot be read ({e}); export the run again"
            ) from None
        self.backend.encode_special_tokens = True
        self.eos_id: int = model.meta["eos_id"]
        self.end_ids: list[int] = model.meta.get("end_ids", [self.eos_id])  # older exports do not have the key
        self.special_ids = {t.content: i for i, t in self.backend.get_added_tokens_decoder().items() if t.special}
        self.bos_id: int | None = model.meta["bos_id"]
        self._vocab_size = model.m["vocab_size"]
        # an earlier version does not say it
        self._lossy: bool = model.meta.get("lossy", self.backend.normalizer is not None)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without control tokens. Raises CompletionError for text that it cannot encode."""
        try:
            # unlike `encode`, a batch lets other threads run meanwhile: a long text may take seconds
            ids = self.backend.encode_batch([text], add_special_tokens=False)[0].ids
        except (UnicodeEncodeError, TypeError):  # of half of a surrogate pair
            raise CompletionError("the text must be valid Unicode, but has a lone surrogate; remove it") from None
        if not self._lossy and (back := self.decode(ids)) != text:
            raise CompletionError(f"the text must come back from the tokenizer as it was, but {difference(text, back)}")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, control tokens included. An incomplete character becomes U+FFFD."""
        return self.backend.decode_batch([list(ids)], skip_special_tokens=False)[0]

    @cached_property
    def spellings(self) -> list[str]:
        """The text of each token, as generation/healing.py needs it."""
        (*_, before) = self.encode("x")
        tokens = self.backend.get_vocab(with_added_tokens=True).values()
        control = {token.content for token in self.backend.get_added_tokens_decoder().values()}
        return token_texts(
            lambda batch: self.backend.decode_batch(batch, skip_special_tokens=False),
            before,
            max(tokens) + 1,
            self._vocab_size,
            control,
        )

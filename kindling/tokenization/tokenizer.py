"""One interface for all tokenizers: trained on the run's own data, or pretrained.

    tokenizer = load_json(Path("runs/demo/tokenizer.json"), TokenizerConfig())
    tokenizer.decode(tokenizer.encode("x = 'naïve'\\n")) == "x = 'naïve'\\n"
    python -m kindling.tokenization.compare FILES       # compares tokenizers on your files: a table and a plot

A trained tokenizer is byte-level BPE in the format of the `tokenizers` library, or SentencePiece, which spells unknown
characters as bytes. A text survives encoding and decoding, or is refused. Control tokens that are written in a document
stay text; real ones are added only by id. handwritten_bpe.py encodes byte-level BPE, to the same ids as the library, and faster.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import TokenizerConfig
from kindling.errors import TokenizerError, difference, one_line
from kindling.files import sha256_text
from kindling.tokenization.added_space import WAYS_OUT
from kindling.tokenization.handwritten_bpe import ByteLevelBPE
from kindling.tokenization.infilling import find_fim_ids

if TYPE_CHECKING:
    import tokenizers


class RewrittenError(TokenizerError):
    """A tokenizer would change a text; `change` is an example."""

    rule = "changed by the tokenizer"

    def __init__(self, text: str, back: str):
        self.change = difference(text, back)
        super().__init__(f"a text must come back from the tokenizer whole, but {self.change}; drop it, {WAYS_OUT}")


class Tokenizer:
    """A `tokenizers.Tokenizer` that treats every text as text, and knows the ids of its control tokens."""

    def __init__(self, backend: tokenizers.Tokenizer, cfg: TokenizerConfig):
        self.cfg = cfg
        self._backend = backend
        self._backend.encode_special_tokens = True  # "<|endoftext|>" in a document is 13 characters
        self._backend.no_truncation()
        self._backend.no_padding()
        self._normalizer = backend.normalizer
        self._find_control_ids()

    @cached_property
    def may_rewrite(self) -> bool:
        """Whether a text that would come back changed is encoded all the same. If not, it is refused."""
        return self.cfg.lossy or self.cfg.normalizer != "none"

    def _find_control_ids(self) -> None:
        cfg = self.cfg
        self.eos_id = self._id_of(cfg.eos_token, "eos_token")
        self.bos_id = None if cfg.bos_token is None else self._id_of(cfg.bos_token, "bos_token")
        self.pad_id = None if cfg.pad_token is None else self._id_of(cfg.pad_token, "pad_token")
        self.end_ids = (self.eos_id, *(self._id_of(token, "end_tokens") for token in cfg.end_tokens))  # end generation
        self.special_ids = {token: i for token, i in self._control_tokens().items() if token in self.special_tokens}
        self.fim = find_fim_ids(self._control_tokens(), self.special_tokens)  # None: it cannot fill in the middle

    def _id_of(self, token: str, field: str) -> int:
        if (token_id := self._token_to_id(token)) is None:
            known = sorted(self._control_tokens())[:8]
            raise TokenizerError(
                f"tokenizer.{field} must be a token of the vocabulary, but {token!r} is not in it; "
                f"its control tokens are {', '.join(known) or 'none'}"
            )
        return token_id

    def _token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def _control_tokens(self) -> dict[str, int]:
        return {token.content: i for i, token in self._backend.get_added_tokens_decoder().items()}

    def find_control_token_text(self, text: str) -> str | None:
        """Return a special token that is written in `text`, or None. It is encoded like any text."""
        return next((token for token in self.special_tokens if token in text), None)

    @cached_property
    def special_tokens(self) -> list[str]:
        """The special tokens. Other added tokens, such as runs of spaces in some vocabularies, count as text."""
        added = self._backend.get_added_tokens_decoder().values()
        return sorted(token.content for token in added if token.special and token.content)

    @cached_property
    def added_tokens(self) -> list[str]:
        """All added tokens, special or not."""
        return sorted(filter(None, self._control_tokens()))

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id, control tokens included. Some ids may be unused."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def _commands(self) -> frozenset[int]:
        """The ids that no text may have: some vocabularies spell a special token as a word too. Unknown text is what it is."""
        model = json.loads(self._backend.to_str())["model"]
        unknown = {model.get("unk_id"), self._backend.token_to_id(model.get("unk_token") or "")}
        ids = {self._backend.token_to_id(token) for token in self.special_tokens}
        return frozenset(i for i in ids - (unknown if self.may_rewrite else set()) if i is not None)

    @cached_property
    def _bpe(self) -> ByteLevelBPE | None:
        """The same tokenizer in handwritten_bpe.py, which is faster, without its normaliser; None if it is of another kind."""
        content = json.loads(self._backend.to_str()) | {"normalizer": None}
        try:
            return ByteLevelBPE.from_dict(content)
        except ValueError:
            return None

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without control tokens. Raises TokenizerError for text it cannot encode."""
        require_unicode(text)
        if self._bpe is None:
            ids = self.encode_by_library(text)
            self._require_same(text, ids)
            if not self._commands.isdisjoint(ids):
                what = self.piece(next(i for i in ids if i in self._commands))
                raise TokenizerError(f"a text must stay text, but {what!r} becomes a control token; drop the document")
            return ids
        if self._normalizer is not None:
            self._require_same(text)
            text = self._normalizer.normalize_str(text)
        try:
            return self._bpe.encode(text)
        except ValueError:
            raise TokenizerError(
                "a text must use only characters that the tokenizer can spell, but one of its bytes is in no token; "
                "drop the document, or train a tokenizer with --tokenizer.kind bpe"
            ) from None

    def encode_by_library(self, text: str) -> list[int]:
        """Return the same ids from the tokenizer's own library, without checks, for comparisons."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def rewritten(self, text: str, ids: Sequence[int]) -> str | None:
        """Return what `ids`, those of `text`, stand for if it is another text; else None."""
        if self._bpe is not None and self._normalizer is None:
            return None
        back = self.decode(ids) if self._bpe is None else self._normalizer.normalize_str(text)
        return None if back == text else back

    def _require_same(self, text: str, ids: Sequence[int] = ()) -> None:
        """Raise RewrittenError if a text would come back changed, unless that is allowed."""
        if not self.may_rewrite and (back := self.rewritten(text, ids)) is not None:
            raise RewrittenError(text, back)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids, control tokens included. An incomplete character becomes U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def decode_batch(self, batch: Sequence[list[int]]) -> list[str]:
        """Return the text of each list of token ids, like `decode`, but faster."""
        if self._bpe is None:
            return self._backend.decode_batch(batch, skip_special_tokens=False)
        texts = map(self._bpe.decode, batch)
        # handwritten_bpe.py keeps half of a surrogate pair, which is not valid text: decode such a text with the library
        return [t if t.isascii() or not _SURROGATE.search(t) else self.decode(ids) for t, ids in zip(texts, batch)]

    def piece(self, token: int) -> str:
        """Return a token as the tokenizer's file writes it; "" for an id without a token."""
        return self._backend.id_to_token(token) or ""

    def to_json(self) -> str:
        """Return the tokenizer in the format of `tokenizer.json`."""
        return self._backend.to_str()

    @cached_property
    def sha256(self) -> str:
        """The hash that identifies the tokenizer in shards and checkpoints."""
        return sha256_text(self.to_json())


_SURROGATE = re.compile("[\ud800-\udfff]")


def require_unicode(text: str) -> None:
    """Raise TokenizerError if `text` contains half of a surrogate pair, which UTF-8 cannot encode."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise TokenizerError(
            f"a text must be valid Unicode, but has a lone surrogate at character {e.start}; remove it"
        ) from None


def import_sentencepiece() -> Any:
    """Return the package. Raises TokenizerError if it is not installed: nothing else needs it."""
    try:
        import sentencepiece
    except ImportError:
        raise TokenizerError(
            "a tokenizer of kind sentencepiece must have the package sentencepiece, but it is not installed; "
            "pip install -r requirements.txt, or use --tokenizer.kind bpe"
        ) from None
    return sentencepiece


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, BPE or unigram. Unknown characters become bytes; inside, a space is U+2581."""

    def __init__(self, model: bytes, cfg: TokenizerConfig):
        self.cfg, self._bpe = cfg, None
        self._model, self._processor = model, import_sentencepiece().SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.vocab_size()
        self._control = {
            i: self._processor.id_to_piece(i)
            for i in range(self.vocab_size)
            if self._processor.is_control(i) or self._processor.is_unknown(i)
        }
        self.special_tokens = sorted(self._control.values())
        self._find_control_ids()

    def _token_to_id(self, token: str) -> int | None:
        return self._control_tokens().get(token)

    def _control_tokens(self) -> dict[str, int]:
        return {token: i for i, token in self._control.items()}

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without control tokens. Raises TokenizerError for text it would change."""
        require_unicode(text)
        ids = self.encode_by_library(text)
        self._require_same(text, ids)
        return ids

    def encode_by_library(self, text: str) -> list[int]:
        """Return the same ids without checks, for comparisons."""
        return self._processor.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids, control tokens included. An incomplete character becomes U+FFFD."""
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        return "".join(
            "".join(self._control[i] for i in run) if control else self._processor.decode(list(run))
            for control, run in groupby(known, key=self._control.__contains__)
        )

    def decode_batch(self, batch: Sequence[list[int]]) -> list[str]:
        """Return the text of each list of token ids, like `decode`."""
        return [self.decode(ids) for ids in batch]

    def piece(self, token: int) -> str:
        """Return a token as the tokenizer's file writes it; "" for an id without a token."""
        return self._processor.id_to_piece(token) if token < self.vocab_size else ""

    def to_json(self) -> str:
        """Return the model as JSON, for `from_json`."""
        return json.dumps({"type": "sentencepiece", "model": base64.b64encode(self._model).decode("ascii")})


def load_json(path: Path, cfg: TokenizerConfig) -> Tokenizer:
    """Load a file written with `to_json`, or any `tokenizer.json`; raises TokenizerError if that fails."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        problem = f"{path} must be a readable tokenizer.json, but is not ({e}); check --tokenizer.path"
        raise TokenizerError(problem) from None
    return from_json(text, cfg, str(path))


def from_json(text: str, cfg: TokenizerConfig, where: str = "the tokenizer") -> Tokenizer:
    """Return the tokenizer whose `to_json` is `text`; raises TokenizerError, with the name `where`, if there is none."""
    try:
        content = json.loads(text)
        if isinstance(content, dict) and content.get("type") == "sentencepiece":
            return SentencePieceTokenizer(base64.b64decode(content["model"], validate=True), cfg)
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(text)
    except TokenizerError:
        raise
    except Exception as e:  # the libraries raise plain Exception and RuntimeError
        raise TokenizerError(
            f"{where} must be a tokenizer.json of the `tokenizers` library or Kindling's SentencePiece, but is not "
            f"({one_line(e)}); check the file"
        ) from None
    return Tokenizer(backend, cfg)

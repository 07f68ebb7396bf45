"""One interface over the tokenizers: trained here on the run's own data, or pretrained.

    tokenizer = train(texts, TokenizerConfig(), vocab_size=4096)
    tokenizer.decode(tokenizer.encode("x = 'naïve'\\n")) == "x = 'naïve'\\n"

    python -m kindling.tokenization.compare FILES       # a table and a plot: what each tokenizer makes of your files

What is trained here is byte-level BPE in the format of the `tokenizers` library, or SentencePiece with bytes to fall back
on. A string survives the round trip or is refused, and control tokens that are spelt out in a document stay text: they
are only ever added by id. Byte-level BPE is encoded by bpe.py, to the same ids as the library's and faster.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import TokenizerConfig
from kindling.errors import KindlingError, one_line
from kindling.files import sha256_text
from kindling.tokenization.bpe import SYMBOLS, ByteLevelBPE

if TYPE_CHECKING:
    import tokenizers


class TokenizerError(KindlingError):
    """A tokenizer that cannot be had, or a text that it cannot hold."""


class Tokenizer:
    """A `tokenizers.Tokenizer` that treats all text as text, with the ids of its control tokens."""

    def __init__(self, backend: tokenizers.Tokenizer, cfg: TokenizerConfig):
        self.cfg = cfg
        self._backend = backend
        self._backend.encode_special_tokens = True  # "<|endoftext|>" in a document is 13 characters, not the end of it
        self._backend.no_truncation()
        self._backend.no_padding()
        self._normalizer = backend.normalizer
        self._find_control_ids()

    def _find_control_ids(self) -> None:
        cfg = self.cfg
        self.eos_id = self._id_of(cfg.eos_token, "eos_token")
        self.bos_id = None if cfg.bos_token is None else self._id_of(cfg.bos_token, "bos_token")
        self.pad_id = None if cfg.pad_token is None else self._id_of(cfg.pad_token, "pad_token")

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

    def spelt_control_token(self, text: str) -> str | None:
        """Return a special token that `text` spells out, which is encoded as any text is, or None."""
        return next((token for token in self._spellings if token in text), None)

    @cached_property
    def _spellings(self) -> list[str]:
        """The special tokens; other added ones, such as runs of spaces in some vocabularies, are text."""
        added = self._backend.get_added_tokens_decoder().values()
        return sorted(token.content for token in added if token.special and token.content)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id, control tokens included; a vocabulary may leave ids out."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def _missing_bytes(self) -> bytes:
        """Bytes that no token spells, which some published vocabularies have; encoding would lose them silently."""
        return bytes(b for b, symbol in enumerate(SYMBOLS) if self._backend.token_to_id(symbol) is None)

    @cached_property
    def _bpe(self) -> ByteLevelBPE | None:
        """The same tokenizer without its normaliser by bpe.py, which is faster; None if it is of another kind."""
        content = json.loads(self._backend.to_str()) | {"normalizer": None}
        try:
            return ByteLevelBPE.from_dict(content)
        except ValueError:
            return None

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without control tokens. Raises TokenizerError for text it cannot hold."""
        _require_unicode(text)
        if self._bpe is None:
            if self._missing_bytes and len(raw := text.encode("utf-8")) > len(raw.translate(None, self._missing_bytes)):
                raise TokenizerError(UNSPELLABLE)
            return self.encode_by_library(text)
        if self._normalizer is not None:
            text = self._normalizer.normalize_str(text)
        try:
            return self._bpe.encode(text)
        except ValueError:
            raise TokenizerError(UNSPELLABLE) from None

    def encode_by_library(self, text: str) -> list[int]:
        """Return the same ids from the library that the tokenizer is of, unchecked, for comparisons."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without control tokens."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; control tokens are spelt out, and an incomplete character becomes U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def decode_batch(self, batch: Sequence[list[int]]) -> list[str]:
        """Return the text of each list of token ids, as `decode` does and faster."""
        if self._bpe is None:
            return self._backend.decode_batch(batch, skip_special_tokens=False)
        texts = map(self._bpe.decode, batch)
        # what spells half of a surrogate pair is kept by bpe.py and no text here
        return [t if t.isascii() or not _SURROGATE.search(t) else self.decode(ids) for t, ids in zip(texts, batch)]

    def to_json(self) -> str:
        """Return the tokenizer in the format of `tokenizer.json`."""
        return self._backend.to_str()

    @cached_property
    def sha256(self) -> str:
        """Identifies the tokenizer in shards and checkpoints."""
        return sha256_text(self.to_json())


_SURROGATE = re.compile("[\ud800-\udfff]")
UNSPELLABLE = (
    "a text must use only characters that the tokenizer can spell, but one of its bytes is in no token; "
    "drop the document, or train a tokenizer with --tokenizer.kind bpe"
)


def _require_unicode(text: str) -> None:
    """Raise TokenizerError if `text` holds half of a surrogate pair, which no file in UTF-8 can."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise TokenizerError(
            f"a text must be valid Unicode, but has a lone surrogate at character {e.start}; remove it"
        ) from None


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, BPE or unigram, that spells unknown characters as bytes. Its spaces are U+2581 inside."""

    def __init__(self, model: bytes, cfg: TokenizerConfig):
        from sentencepiece import SentencePieceProcessor

        self.cfg = cfg
        self._model, self._processor = model, SentencePieceProcessor(model_proto=model)
        self._control = {
            i: self._processor.id_to_piece(i)
            for i in range(self._processor.vocab_size())
            if self._processor.is_control(i) or self._processor.is_unknown(i)
        }
        self._find_control_ids()

    def _token_to_id(self, token: str) -> int | None:
        return self._control_tokens().get(token)

    @cached_property
    def _spellings(self) -> list[str]:
        """The control tokens."""
        return sorted(self._control.values())

    def _control_tokens(self) -> dict[str, int]:
        return {token: i for i, token in self._control.items()}

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id, control tokens included."""
        return self._processor.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without control tokens. Raises TokenizerError for text it would change."""
        _require_unicode(text)
        ids = self.encode_by_library(text)
        if self.decode(ids) != text:
            raise TokenizerError(
                "a text must survive SentencePiece, but this one comes back changed (U+2581 stands for a space in it); "
                "drop the document, or train a tokenizer with --tokenizer.kind bpe"
            )
        return ids

    def encode_by_library(self, text: str) -> list[int]:
        """Return the same ids unchecked, for comparisons."""
        return self._processor.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; control tokens are spelt out, and an incomplete character becomes U+FFFD."""
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        return "".join(
            "".join(self._control[i] for i in run) if control else self._processor.decode(list(run))
            for control, run in groupby(known, key=self._control.__contains__)
        )

    def decode_batch(self, batch: Sequence[list[int]]) -> list[str]:
        """Return the text of each list of token ids, as `decode` does."""
        return [self.decode(ids) for ids in batch]

    def to_json(self) -> str:
        """Return the model as JSON, all that `from_json` needs."""
        return json.dumps({"type": "sentencepiece", "model": base64.b64encode(self._model).decode("ascii")})


def train(texts: Iterable[str], cfg: TokenizerConfig, vocab_size: int) -> Tokenizer:
    """Train a tokenizer of `cfg.kind` with at most `vocab_size` tokens, control tokens included.

    Raises TokenizerError, before any text is read, if the 256 bytes and the control tokens do not fit.
    """
    if cfg.kind == "bpe":
        return train_bpe(texts, cfg, vocab_size)
    if cfg.kind == "handwritten":
        return train_handwritten(texts, cfg, vocab_size)
    if cfg.kind == "sentencepiece":
        return train_sentencepiece(texts, cfg, vocab_size)
    raise TokenizerError(f"tokenizer.kind must be one that is trained, but is {cfg.kind!r}; set --tokenizer.kind bpe")


def require_room(cfg: TokenizerConfig, vocab_size: int) -> None:
    """Raise TokenizerError if a tokenizer of `vocab_size` tokens has no room for the 256 bytes and the control tokens."""
    # SentencePiece always has an unknown token
    n_control = len(cfg.special_tokens) + (cfg.kind == "sentencepiece" and cfg.unk_token is None)
    if vocab_size < 256 + n_control:
        raise TokenizerError(
            f"model.vocab_size must be at least {256 + n_control} (256 bytes and the control tokens), but is {vocab_size}; "
            f"set --model.vocab-size"
        )


def train_handwritten(texts: Iterable[str], cfg: TokenizerConfig, vocab_size: int) -> Tokenizer:
    """Train the same tokenizer as `train_bpe` with bpe.py."""
    from tokenizers import Tokenizer as Backend

    require_room(cfg, vocab_size)
    try:
        bpe = ByteLevelBPE.train(texts, vocab_size, cfg.special_tokens)
    except ValueError as e:
        raise TokenizerError(f"tokenizer: {e}") from None
    return Tokenizer(Backend.from_str(bpe.to_json()), cfg)


def train_sentencepiece(texts: Iterable[str], cfg: TokenizerConfig, vocab_size: int) -> Tokenizer:
    """Train SentencePiece: control tokens first, then all 256 bytes, then pieces. It always has an unknown token."""
    from sentencepiece import SentencePieceTrainer

    names = {"pad": cfg.pad_token, "unk": cfg.unk_token or "<unk>", "bos": cfg.bos_token, "eos": cfg.eos_token}
    present = [name for name, token in names.items() if token is not None]
    require_room(cfg, vocab_size)
    for text in (texts := list(texts)):
        _require_unicode(text)
    control: dict[str, Any] = {f"{name}_id": present.index(name) if name in present else -1 for name in names}
    control |= {f"{name}_piece": names[name] for name in present}
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            # it leaves out whole texts that hold one of these two, which are its own marks
            sentence_iterator=(text.replace("\u2585", " ").replace("\0", " ") for text in texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=cfg.sentencepiece_model,
            hard_vocab_limit=False,  # a small corpus gives a smaller vocabulary
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indentation
            max_sentence_length=2**30,  # its largest; longer texts would be left out
            minloglevel=2,
            **control,
        )
    except RuntimeError as e:
        raise TokenizerError(
            f"model.vocab_size must be one that SentencePiece can fill from the text, but with {vocab_size} and "
            f"{len(texts)} documents it says: {one_line(e)}; set --model.vocab-size, or read more text"
        ) from None
    return SentencePieceTokenizer(model.getvalue(), cfg)


def train_bpe(texts: Iterable[str], cfg: TokenizerConfig, vocab_size: int) -> Tokenizer:
    """Train byte-level BPE of at most `vocab_size` tokens: control tokens first, then all 256 bytes, then merges."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    require_room(cfg, vocab_size)
    backend = Backend(models.BPE())
    if cfg.normalizer == "nfkc":
        backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=cfg.special_tokens,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # without it, bytes not seen in training would be lost
    return Tokenizer(backend, cfg)


def load_json(path: Path, cfg: TokenizerConfig) -> Tokenizer:
    """Load what `to_json` gave, or any `tokenizer.json`; raises TokenizerError if it is missing or neither."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise TokenizerError(
            f"{path} must be a readable tokenizer.json, but is not ({e}); check --tokenizer.path"
        ) from None
    return from_json(text, cfg, str(path))


def from_json(text: str, cfg: TokenizerConfig, where: str = "the tokenizer") -> Tokenizer:
    """Build the tokenizer of any kind from its `to_json`; raises TokenizerError, which names `where`, if it is none."""
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


def load_pretrained(cfg: TokenizerConfig) -> Tokenizer:
    """Load the tokenizer that `cfg.path` names: a tokenizer.json, a folder that holds one, or a hub name."""
    assert cfg.path is not None
    path = Path(cfg.path).expanduser()
    if path.is_dir():
        return load_json(path / "tokenizer.json", cfg)
    if path.is_file() or path.suffix == ".json" or path.is_absolute():
        return load_json(path, cfg)
    from huggingface_hub import hf_hub_download

    try:
        return load_json(Path(hf_hub_download(cfg.path, "tokenizer.json")), cfg)
    except TokenizerError:
        raise
    except Exception as e:  # connection, authorisation and naming errors share no base class
        raise TokenizerError(
            f"tokenizer.path must be a file, a folder or a name on the hub that can be reached, but {cfg.path!r} gave "
            f"{one_line(e)}; check the network and the name (a gated one needs "
            f"its terms accepted on its page, and `hf auth login`), or set --tokenizer.path to a local tokenizer.json"
        ) from None

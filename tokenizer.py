"""One interface over the tokenizers: trained here on the run's own data, or pretrained.

    tokenizer = train_bpe(texts, TokenizerConfig(), vocab_size=4096)
    tokenizer.decode(tokenizer.encode("x = 'naïve'\\n")) == "x = 'naïve'\\n"

Everything is byte-level BPE in the format of the `tokenizers` library, so any string survives the round trip, and
control tokens that are spelt out in a document stay text: they are only ever added by id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from config import KindlingError, TokenizerConfig

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
        self.eos_id = self._id_of(cfg.eos_token, "eos_token")
        self.bos_id = None if cfg.bos_token is None else self._id_of(cfg.bos_token, "bos_token")
        self.pad_id = None if cfg.pad_token is None else self._id_of(cfg.pad_token, "pad_token")

    def _id_of(self, token: str, field: str) -> int:
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            known = sorted(t.content for t in self._backend.get_added_tokens_decoder().values())[:8]
            raise TokenizerError(
                f"tokenizer.{field} must be a token of the vocabulary, but {token!r} is not in it; "
                f"its control tokens are {', '.join(known) or 'none'}"
            )
        return token_id

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id, control tokens included; a vocabulary may leave ids out."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def _missing_bytes(self) -> bytes:
        """Bytes that no token spells, which some published vocabularies have; encoding would lose them silently."""
        from tokenizers import pre_tokenizers

        alphabet = dict(zip((b"%c" % b for b in range(256)), map(byte_symbol, range(256))))
        if not set(alphabet.values()) <= set(pre_tokenizers.ByteLevel.alphabet()):
            raise AssertionError("our byte symbols are not the library's")
        return b"".join(b for b, symbol in alphabet.items() if self._backend.token_to_id(symbol) is None)

    def _check(self, text: str) -> None:
        try:
            raw = text.encode("utf-8")
        except UnicodeEncodeError as e:
            raise TokenizerError(
                f"a text must be valid Unicode, but has a lone surrogate at character {e.start}; remove it"
            ) from None
        if self._missing_bytes and len(raw.translate(None, self._missing_bytes)) < len(raw):
            raise TokenizerError(
                "a text must use only characters that the tokenizer can spell, but one of its bytes "
                "is in no token; drop the document, or train a tokenizer with --tokenizer.kind bpe"
            )

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without control tokens. Raises TokenizerError for text it cannot hold."""
        self._check(text)
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without control tokens; faster than one by one."""
        for text in texts:
            self._check(text)
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; control tokens are spelt out, and an incomplete character becomes U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def to_json(self) -> str:
        """Return the tokenizer in the format of `tokenizer.json`."""
        return self._backend.to_str()

    @cached_property
    def sha256(self) -> str:
        """Identifies the tokenizer in shards and checkpoints."""
        return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()


def byte_symbol(byte: int) -> str:
    """Return the printable character that stands for a byte in byte-level BPE (GPT-2's bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in printable].index(byte))


def train_bpe(texts: Iterable[str], cfg: TokenizerConfig, vocab_size: int) -> Tokenizer:
    """Train byte-level BPE of at most `vocab_size` tokens: control tokens first, then all 256 bytes, then merges."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    smallest = 256 + len(cfg.special_tokens)
    if vocab_size < smallest:
        raise TokenizerError(
            f"model.vocab_size must be at least {smallest} (256 bytes and the control tokens), but is {vocab_size}; "
            f"set --model.vocab-size"
        )
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
    """Load a `tokenizer.json`; raises TokenizerError if it is missing or not one."""
    from tokenizers import Tokenizer as Backend

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise TokenizerError(
            f"{path} must be a readable tokenizer.json, but is not ({e}); check --tokenizer.path"
        ) from None
    try:
        backend = Backend.from_str(text)
    except Exception as e:  # the library raises plain Exception
        raise TokenizerError(
            f"{path} must be a tokenizer.json of the `tokenizers` library, but is not ({e}); check the file"
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
            f"{type(e).__name__}: {' '.join(str(e).split())[:200]}; check the network and the name (a gated one needs "
            f"`hf auth login`), or set --tokenizer.path to a local tokenizer.json"
        ) from None

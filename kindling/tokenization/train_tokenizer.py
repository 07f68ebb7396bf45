"""Trains tokenizers of every kind on texts: byte-level BPE by the `tokenizers` library or by hand, and SentencePiece.

    tokenizer = train(texts, TokenizerConfig(), vocab_size=4096)

Every vocabulary has its control tokens first, with those of fill-in-the-middle.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

from config import TokenizerConfig
from kindling.errors import TokenizerError, one_line
from kindling.tokenization.handwritten_bpe import ByteLevelBPE
from kindling.tokenization.infilling import control_tokens
from kindling.tokenization.tokenizer import SentencePieceTokenizer, Tokenizer, import_sentencepiece, require_unicode


def train(texts: Iterable[str], cfg: TokenizerConfig, vocab_size: int) -> Tokenizer:
    """Train a tokenizer of `cfg.kind` with at most `vocab_size` tokens, control tokens included.

    Raises TokenizerError if the 256 bytes and the control tokens do not fit; no text is read then.
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
    n_control = len(control_tokens(cfg.special_tokens)) + (cfg.kind == "sentencepiece" and cfg.unk_token is None)
    if vocab_size < 256 + n_control:
        raise TokenizerError(
            f"model.vocab_size must be at least {256 + n_control} (256 bytes and the control tokens), but is {vocab_size}; "
            f"set --model.vocab-size"
        )


def train_handwritten(texts: Iterable[str], cfg: TokenizerConfig, vocab_size: int) -> Tokenizer:
    """Train the same tokenizer as `train_bpe`, with handwritten_bpe.py."""
    from tokenizers import Tokenizer as Backend

    require_room(cfg, vocab_size)
    try:
        bpe = ByteLevelBPE.train(texts, vocab_size, control_tokens(cfg.special_tokens))
    except ValueError as e:
        raise TokenizerError(f"tokenizer: {e}") from None
    return Tokenizer(Backend.from_str(bpe.to_json()), cfg)


def train_sentencepiece(texts: Iterable[str], cfg: TokenizerConfig, vocab_size: int) -> Tokenizer:
    """Train SentencePiece. The ids are control tokens first, then all 256 bytes, then pieces."""
    names = {"pad": cfg.pad_token, "unk": cfg.unk_token or "<unk>", "bos": cfg.bos_token, "eos": cfg.eos_token}
    present = [name for name, token in names.items() if token is not None]
    require_room(cfg, vocab_size)
    for text in (texts := list(texts)):
        require_unicode(text)
    control: dict[str, Any] = {f"{name}_id": present.index(name) if name in present else -1 for name in names}
    control |= {f"{name}_piece": names[name] for name in present}
    control["control_symbols"] = [t for t in control_tokens(()) if t not in names.values()]
    model = io.BytesIO()
    try:
        import_sentencepiece().SentencePieceTrainer.train(
            # SentencePiece uses these two characters itself and would skip every text that contains one
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
            max_sentence_length=2**30,  # the largest possible; longer texts would be skipped
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
    """Train byte-level BPE. The ids are control tokens first, then all 256 bytes, then merges."""
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
            special_tokens=control_tokens(cfg.special_tokens),
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # or bytes that did not occur would be lost
        ),
    )
    return Tokenizer(backend, cfg)

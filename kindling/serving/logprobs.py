"""Writes tokens with their log-probabilities, for the protocols that show them.

A token may be a part of a character. Its text is U+FFFD then, but its bytes are its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from kindling.serving.engine import Vocabulary
from kindling.serving.generation import Token
from kindling.tokenization.handwritten_bpe import BYTES


def text_of(vocabulary: Vocabulary, token: int) -> str:
    """Return the text that a token has inside a text, where SentencePiece keeps the space that it begins with."""
    return vocabulary.spellings[token] or vocabulary.decode([token])


def bytes_of(vocabulary: Vocabulary, token: int) -> bytes:
    """Return the bytes of a token, also of one that is a part of a character."""
    text = text_of(vocabulary, token)
    if "\ufffd" not in text:
        return text.encode("utf-8")
    piece = vocabulary.piece(token)
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):  # SentencePiece's
        return bytes.fromhex(byte[1])
    if all(symbol in BYTES for symbol in piece):  # byte-level BPE's
        return bytes(BYTES[symbol] for symbol in piece)
    return text.encode("utf-8")


def text_or_bytes(vocabulary: Vocabulary, token: int) -> str | list[int]:
    """Return the text of a token, or its bytes if they are no text, as llama.cpp's /tokenize has it."""
    raw = bytes_of(vocabulary, token)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return list(raw)


def listed(vocabulary: Vocabulary, tokens: Sequence[Token]) -> list[dict[str, Any]]:
    """Return tokens and their rivals in the form of OpenAI's chat and of llama.cpp."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        raw = list(bytes_of(vocabulary, token))
        return {"id": token, "token": text_of(vocabulary, token), "bytes": raw, "logprob": logprob}

    return [{**one(t.id, t.logprob), "top_logprobs": [one(i, logprob) for i, logprob in t.likely]} for t in tokens]


def in_columns(vocabulary: Vocabulary, tokens: Sequence[Token]) -> dict[str, Any]:
    """Return tokens and their rivals in the form of OpenAI's /v1/completions, which tells rivals apart by their text."""

    def name(token: int) -> str:
        text = text_or_bytes(vocabulary, token)
        return text if isinstance(text, str) else "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)  # as OpenAI

    def rivals(token: Token) -> dict[str, float]:
        found: dict[str, float] = {}
        for i, logprob in token.likely:
            found.setdefault(name(i), logprob)  # of two tokens with one text, the more likely one
        return found

    return {
        "tokens": [name(token.id) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [rivals(token) for token in tokens],
        "text_offset": [max(0, token.begins) for token in tokens],
    }

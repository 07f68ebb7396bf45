"""Keeps a tokenizer from adding a space to a text.

    without_added_space(tokenizer.to_json())       # the same vocabulary; no space before a text, none taken away

Kindling encodes parts of a text on their own: a question and its answer, what is before and after a cursor. So parts must join to
the text, and a space before each part would be in the middle of it. It cannot be taken away again when ids are decoded: many
tokenizers add it only to a text that has none, so "x" and " x" have the same ids. Limit: the first word of a text then has the
tokens that it has after a bracket. A model that others trained with the space saw another token there.
"""

from __future__ import annotations

import json
from typing import Any

WAYS_OUT = "train a tokenizer with --tokenizer.kind bpe, or set --tokenizer.lossy True to take what comes back"


def without_added_space(tokenizer_json: str) -> str:
    """Return a tokenizer that adds no space before a text and takes none away, in the form of the library's `to_str`."""
    content = json.loads(tokenizer_json)
    kept = {part: _kept(content[part], part == "decoder") for part in ("normalizer", "pre_tokenizer", "decoder")}
    return tokenizer_json if kept.items() <= content.items() else json.dumps(content | kept, ensure_ascii=False)


def _kept(part: dict[str, Any] | None, decodes: bool) -> dict[str, Any] | None:
    """Return a normaliser, pre-tokenizer or decoder without what concerns the space before a text; None if nothing is left."""
    if part is None:
        return None
    for parts in ("normalizers", "pretokenizers", "decoders"):
        if parts in part:
            left = [kept for inner in part[parts] if (kept := _kept(inner, decodes)) is not None]
            return part | {parts: left} if left else None
    if part["type"] == "Prepend" or (decodes and part["type"] == "Strip" and part["content"] in (" ", "\u2581")):
        return None
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never"}
    if part["type"] == "ByteLevel" and not decodes:  # a decoder has the setting too, and ignores it
        return part | {"add_prefix_space": False}
    return part

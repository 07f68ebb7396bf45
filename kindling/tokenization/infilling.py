"""The control tokens of fill-in-the-middle, and the prompts that are made with them.

    ids = encode_infill(tokenizer, "def add(a, b):\\n    ", "\\n")      # the model writes what is between them
    ids = arrange(tokenizer.fim, prefix_ids, suffix_ids, middle_ids, spm=False)

The spellings are StarCoder's, which llama.cpp and editors know. Every vocabulary that Kindling trains reserves them. Written in
a text they are text. Source: Bavarian et al. 2022, "Efficient training of language models to fill in the middle".
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple, Protocol

from kindling.errors import TokenizerError

PREFIX_SHARE = 0.7  # of the room for prefix and suffix, if both are longer
CHARACTERS = 80  # of text, for each token of the room, are encoded: far more than fit
FIM_TOKENS = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>")


class FimIds(NamedTuple):
    """The ids of the control tokens of fill-in-the-middle, in the order of `FIM_TOKENS`."""

    prefix: int
    middle: int
    suffix: int
    pad: int


class FimEncoder(Protocol):
    """What infilling needs of a tokenizer."""

    fim: FimIds | None

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""


def find_fim_ids(known: Mapping[str, int], special: Collection[str]) -> FimIds | None:
    """Return the ids of the control tokens, or None if one of them is not among the `special` tokens of a vocabulary."""
    return FimIds(*(known[token] for token in FIM_TOKENS)) if set(FIM_TOKENS) <= set(special) else None


def control_tokens(special: Iterable[str]) -> list[str]:
    """Return the control tokens of a vocabulary that is trained: its `special` ones, then those of fill-in-the-middle."""
    return list(dict.fromkeys((*special, *FIM_TOKENS)))


def arrange(fim: FimIds, prefix: list[int], suffix: list[int], middle: list[int], spm: bool) -> list[int]:
    """Return the parts in the order in which a model reads them, the middle last, without end-of-text.

    With `spm` the suffix comes first, in the joint form of the paper and of StarCoder: prefix and middle follow each other as in
    a text that is only continued, and a prompt with an empty suffix differs from it by three tokens at its start.
    """
    if spm:
        return [fim.prefix, fim.suffix, *suffix, fim.middle, *prefix, *middle]
    return [fim.prefix, *prefix, fim.suffix, *suffix, fim.middle, *middle]


def prompt_at_cursor(
    fim: FimIds, encode: Callable[[str], list[int]], prefix: str, suffix: str, most: int, spm: bool, step: int = 1
) -> tuple[list[int], bool]:
    """Return a prompt of at most `most` tokens with as much of prefix and suffix as fits, and whether text was left out.

    Parts are cut in steps of `step` tokens: while somebody types, the same tokens stay for a while, and keys and values that
    were computed for them can be used again.
    """
    room = most - 3
    head = prefix[left_out(len(prefix), room * CHARACTERS, step * CHARACTERS) :]
    before, after = encode(head), encode(suffix[: room * CHARACTERS])
    n_prefix = max(int(PREFIX_SHARE * room), room - len(after))
    kept = before[left_out(len(before), n_prefix, step) :]
    n_suffix = room - min(n_prefix, -(-len(before) // step) * step)
    is_cut = (
        len(head) < len(prefix) or len(kept) < len(before) or len(suffix) > room * CHARACTERS or len(after) > n_suffix
    )
    return arrange(fim, kept, after[:n_suffix], [], spm), is_cut


def left_out(length: int, most: int, step: int) -> int:
    """Return how many of `length` are left out so that at most `most` stay: a multiple of `step`."""
    return -(-max(0, length - most) // step) * step


def require_fim(tokenizer: FimEncoder, way_out: str) -> FimIds:
    """Return the control tokens; raises TokenizerError, which ends with `way_out`, for a vocabulary without them."""
    if tokenizer.fim is None:
        raise TokenizerError(
            f"a tokenizer must have the special tokens {' '.join(FIM_TOKENS)} to fill in the middle, but this one lacks them; "
            f"{way_out}"
        )
    return tokenizer.fim


def encode_infill(tokenizer: FimEncoder, prefix: str, suffix: str, spm: bool = False) -> list[int]:
    """Return the prompt after which a model writes what stands between `prefix` and `suffix`, and then end-of-text.

    It has no begin-of-text token, as in training. Raises TokenizerError for a vocabulary without the control tokens.
    """
    fim = require_fim(tokenizer, "complete without a suffix, or train a tokenizer with --tokenizer.kind bpe")
    return arrange(fim, tokenizer.encode(prefix), tokenizer.encode(suffix), [], spm)

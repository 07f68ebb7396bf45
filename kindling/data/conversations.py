"""Encodes a conversation and marks which tokens to train on, or says why it is dropped.

    example = encode_conversation((Exchange("Add a and b.", "return a + b"),), cfg, tokenizer, context=1024)
    example.targets      # IGNORE (-100) where the next token belongs to a prompt

A conversation is dropped if it would teach the model anything other than to answer and stop: if a response is empty,
contains a control token or a marker of the template as text, or does not survive the tokenizer unchanged. A conversation
that is too long is dropped, or cut and then ended with the end-of-text token.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from config import IGNORE, DataConfig
from kindling.data.filters import Drop
from kindling.data.jinja_chat import TemplateError
from kindling.data.prompts import Exchange, Segment, Spelled, encode_spelled, find_marker, flatten
from kindling.errors import TokenizerError
from kindling.tokenization.tokenizer import Tokenizer

CUT = "response cut to the context"
SPELT, MARKED = "control token kept as text", "template marker kept"  # in an instruction
REWRITTEN = "rewritten by the tokenizer"
PROMPT, RESPONSE, PROMPT_HASH, RESPONSE_HASH = range(4)  # columns of the segments


def text_hash(text: str) -> int:
    """Return a 63-bit hash of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big") >> 1


class _Turn(NamedTuple):
    """An exchange and its ids."""

    exchange: Exchange
    spelled: Spelled

    @property
    def segment(self) -> Segment:
        """Its ids."""
        return self.spelled.segment


def conversation_text(exchanges: tuple[Exchange, ...]) -> str:
    """Return the text of a conversation without a template, for the filters and the search for duplicates."""
    return "\n".join(part for e in exchanges for part in (e.instruction, e.input, e.response) if part)


def normalize_exchanges(exchanges: tuple[Exchange, ...], tokenizer: Tokenizer) -> tuple[Exchange, ...]:
    """Return the exchanges with their texts normalised as the tokenizer does it; filters and hashes must use these."""
    if tokenizer.cfg.normalizer == "none":
        return exchanges
    return tuple(
        Exchange(*(unicodedata.normalize("NFKC", text) for text in (e.instruction, e.response, e.input)))
        for e in exchanges
    )


def refusal(exchanges: tuple[Exchange, ...], cfg: DataConfig, tokenizer: Tokenizer) -> Drop | None:
    """Return why a conversation is dropped because of its texts, or None."""
    for e in exchanges:
        if not e.instruction.strip():
            return Drop("empty instruction", repr(e.instruction))
        if not e.response.strip():
            return Drop("empty response", repr(e.response))
        if marker := find_marker(cfg.template, e.response):
            return Drop("template marker", repr(marker))
        if token := tokenizer.find_control_token_text(e.response):
            return Drop("control token", repr(token))
    return None


@dataclass(frozen=True)
class Example:
    """A conversation as token ids, and its segments, which say which ids are prompt and which are response.

    `examples.ExampleWriter` stores both, and `examples.Examples` reads them back.
    """

    ids: np.ndarray  # (n,) uint32, or int64 if read from shards
    segments: np.ndarray  # (S, 4) int64, for each exchange: the numbers of tokens, and the hashes of the texts
    # these two are set only when an example is made, not when it is read from shards
    n_bytes: int = 0  # of the responses
    changes: tuple[tuple[str, int], ...] = ()  # what was cut off or is unusual, with the number of bytes cut

    @property
    def supervised(self) -> np.ndarray:
        """Which ids belong to responses, end-of-text tokens included, (n,) bool."""
        lengths = self.segments[:, [PROMPT, RESPONSE]].ravel()
        return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)

    @property
    def targets(self) -> np.ndarray:
        """The targets, (n - 1,): the next id, or IGNORE where it belongs to a prompt."""
        return np.where(self.supervised, self.ids, IGNORE)[1:]


def encode_conversation(
    exchanges: tuple[Exchange, ...], cfg: DataConfig, tokenizer: Tokenizer, context: int
) -> Example | Drop:
    """Encode a conversation as an example of at most `context` + 1 tokens, or return why it is dropped.

    The conversation must come from `normalize_exchanges`, and `refusal` must have let it pass.
    """
    try:  # for each exchange: the ids of its prompt, and those of its response with the end-of-text token
        turns = list(map(_Turn, exchanges, encode_spelled(cfg.template, exchanges, tokenizer)))
    except TokenizerError as e:
        return Drop(e.rule, e.reason)
    except TemplateError as e:
        return Drop("chat template", str(e).split(";")[0])
    changes: list[tuple[str, int]] = []
    for i, (exchange, (segment, *texts)) in enumerate(turns):
        control = int(i == 0 and segment.prompt[:1] == [tokenizer.bos_id])
        back = [tokenizer.decode(segment.prompt[control:]), tokenizer.decode(segment.response[:-1])]
        if back != texts:
            if not tokenizer.may_rewrite:
                return Drop("not reproducible", repr(exchange.response[:40]))
            if marker := find_marker(cfg.template, back[1]):
                return Drop("template marker", repr(marker))
            turns[i] = _Turn(
                replace(exchange, response=back[1]), Spelled(segment, *back)
            )  # what it says once it is tokens
            changes = [(REWRITTEN, 0)]
    asked = [f"{e.instruction}\n{e.input}" for e in exchanges]
    changes += [(SPELT, 0)] if any(map(tokenizer.find_control_token_text, asked)) else []
    changes += [(MARKED, 0)] if any(find_marker(cfg.template, text) for text in asked) else []
    length = sum(len(part) for turn in turns for part in turn.segment)
    room = context + 1  # the last token is only a target
    if length > room:
        n_prompt = len(turns[0].segment.prompt)
        if n_prompt > room - 2:  # leave room for one token of a response, and end-of-text
            return Drop("prompt too long", f"{n_prompt:,} tokens, context {context:,}")
        if cfg.too_long == "drop":
            return Drop("too long", f"{length:,} tokens, context {context:,}")
        if not (turns := _cut(turns, tokenizer, room)):
            return Drop("prompt too long", "not one character of the response fits after it")
        kept = [turn.exchange for turn in turns]
        changes.append((CUT, _bytes(exchanges) - _bytes(kept)))
    rows = []
    for _, ((prompt, response), *texts) in turns:
        rows.append((len(prompt), len(response), *map(text_hash, texts)))
    ids = np.array(flatten(turn.segment for turn in turns), dtype=np.uint32)
    n_bytes = sum(len(turn.exchange.response.encode()) for turn in turns)
    return Example(ids, np.array(rows, dtype=np.int64), n_bytes, tuple(changes))


def _bytes(exchanges: Iterable[Exchange]) -> int:
    return sum(len(text.encode()) for e in exchanges for text in (e.instruction, e.input, e.response))


def _cut(turns: list[_Turn], tokenizer: Tokenizer, room: int) -> list[_Turn]:
    """Return what fits into `room` tokens: whole exchanges, then one whose response is cut and ended by end-of-text."""
    kept = []
    for exchange, ((prompt, response), asked, said) in turns:
        *ids, eos_id = response
        left = max(0, room - len(prompt) - 1)
        ids = ids[:left]
        while ids and not said.startswith(tokenizer.decode(ids)):  # cut in the middle of a character
            ids.pop()
        if not ids:  # also after a cut, because no prompt fits into the rest
            break
        cut = tokenizer.decode(ids)
        kept.append(_Turn(replace(exchange, response=cut), Spelled(Segment(prompt, [*ids, eos_id]), asked, cut)))
        room -= len(prompt) + len(ids) + 1
    return kept

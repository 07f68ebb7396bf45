"""From the exchanges of a conversation to token ids of which it is known which are supervised, or to why not.

    example = example_of((Exchange("Add a and b.", "return a + b"),), cfg, tokenizer, context=1024)

Refused is what would teach the model something else than to answer and stop: an empty answer, an answer that spells out a
control token or one of the template's own markers, an answer that the tokenizer does not give back as it was. What is too
long is refused too, or cut, and then closed with end-of-text all the same.
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
from kindling.data.prompts import Exchange, Segment, encode, flatten, marker_in, prompt_text
from kindling.tokenization.tokenizer import Tokenizer, TokenizerError

CUT = "response cut to the context"
SPELT, MARKED = "control token kept as text", "template marker kept"  # in an instruction


PROMPT, RESPONSE, PROMPT_HASH, RESPONSE_HASH = range(4)  # columns of the segments


@dataclass(frozen=True)
class Example:
    """A conversation as token ids, and its segments, which say which of them are responses."""

    ids: np.ndarray  # (n,) uint32, or int64 where they were read back
    segments: np.ndarray  # (S, 4) int64, a row for each exchange: tokens of prompt and response, hashes of their texts
    # of a new example only
    n_bytes: int = 0  # of the responses
    changes: tuple[tuple[str, int], ...] = ()  # what was cut off or odd, with the bytes cut

    @property
    def supervised(self) -> np.ndarray:
        """Which of the ids are responses, end-of-text tokens included, (n,) bool."""
        lengths = self.segments[:, [PROMPT, RESPONSE]].ravel()
        return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)

    @property
    def targets(self) -> np.ndarray:
        """What each id but the last is to predict, (n - 1,): the id after it where that is supervised."""
        return np.where(self.supervised, self.ids, IGNORE)[1:]


def text_hash(text: str) -> int:
    """Return 63 bits by which to know a text again."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big") >> 1


class _Turn(NamedTuple):
    """An exchange, and what it is encoded to."""

    exchange: Exchange
    segment: Segment


def joined(exchanges: tuple[Exchange, ...]) -> str:
    """Return all that is said in a conversation, without any template: what filters and duplicates go by."""
    return "\n".join(part for e in exchanges for part in (e.instruction, e.input, e.response) if part)


def normalized(exchanges: tuple[Exchange, ...], tokenizer: Tokenizer) -> tuple[Exchange, ...]:
    """Return the texts as the tokenizer will see them: what is refused, and what is supervised, must be these."""
    if tokenizer.cfg.normalizer == "none":
        return exchanges
    return tuple(
        Exchange(*(unicodedata.normalize("NFKC", text) for text in (e.instruction, e.response, e.input)))
        for e in exchanges
    )


def refusal(exchanges: tuple[Exchange, ...], cfg: DataConfig, tokenizer: Tokenizer) -> Drop | None:
    """Return why a conversation must not be trained on, as far as its texts tell, or None."""
    for e in exchanges:
        if not e.instruction.strip():
            return Drop("empty instruction", repr(e.instruction))
        if not e.response.strip():
            return Drop("empty response", repr(e.response))
        if marker := marker_in(cfg.template, e.response):
            return Drop("template marker", repr(marker))
        if token := tokenizer.spelt_control_token(e.response):
            return Drop("control token", repr(token))
    return None


def example_of(exchanges: tuple[Exchange, ...], cfg: DataConfig, tokenizer: Tokenizer, context: int) -> Example | Drop:
    """Return a normalized conversation that is not refused as an example of at most `context` + 1 tokens, or why it is none."""
    try:
        turns = list(map(_Turn, exchanges, encode(cfg.template, exchanges, tokenizer)))
    except TokenizerError as e:
        return Drop("not in the vocabulary", str(e).split(";")[0])
    for i, (exchange, segment) in enumerate(turns):
        texts = prompt_text(cfg.template, exchange, first=i == 0), exchange.response
        control = int(i == 0 and tokenizer.bos_id is not None)
        if (tokenizer.decode(segment.prompt[control:]), tokenizer.decode(segment.response[:-1])) != texts:
            return Drop("not reproducible", repr(exchange.response[:40]))
    asked = [f"{e.instruction}\n{e.input}" for e in exchanges]
    changes = [(SPELT, 0)] if any(map(tokenizer.spelt_control_token, asked)) else []
    changes += [(MARKED, 0)] if any(marker_in(cfg.template, text) for text in asked) else []
    length = sum(len(part) for turn in turns for part in turn.segment)
    room = context + 1  # the last token is a target only
    if length > room:
        n_prompt = len(turns[0].segment.prompt)
        if n_prompt > room - 2:  # one token of a response, and the end
            return Drop("prompt too long", f"{n_prompt:,} tokens, context {context:,}")
        if cfg.too_long == "drop":
            return Drop("too long", f"{length:,} tokens, context {context:,}")
        if not (turns := _cut(turns, tokenizer, room)):
            return Drop("prompt too long", "not one character of the response fits after it")
        kept = [turn.exchange for turn in turns]
        changes.append((CUT, _bytes(exchanges) - _bytes(kept)))
    rows = []
    for i, (exchange, segment) in enumerate(turns):
        texts = prompt_text(cfg.template, exchange, first=i == 0), exchange.response
        rows.append((len(segment.prompt), len(segment.response), *map(text_hash, texts)))
    ids = np.array(flatten(turn.segment for turn in turns), dtype=np.uint32)
    n_bytes = sum(len(turn.exchange.response.encode()) for turn in turns)
    return Example(ids, np.array(rows, dtype=np.int64), n_bytes, tuple(changes))


def _bytes(exchanges: Iterable[Exchange]) -> int:
    return sum(len(text.encode()) for e in exchanges for text in (e.instruction, e.input, e.response))


def _cut(turns: list[_Turn], tokenizer: Tokenizer, room: int) -> list[_Turn]:
    """Return as much of a conversation as `room` tokens hold: whole exchanges, then one whose response is cut and closed."""
    kept = []
    for exchange, (prompt, response) in turns:
        *ids, eos_id = response
        left = max(0, room - len(prompt) - 1)
        ids = ids[:left]
        while ids and not exchange.response.startswith(tokenizer.decode(ids)):  # in the middle of a character
            ids.pop()
        if not ids:  # as after a cut: no prompt fits into what it leaves
            break
        kept.append(_Turn(replace(exchange, response=tokenizer.decode(ids)), Segment(prompt, [*ids, eos_id])))
        room -= len(prompt) + len(ids) + 1
    return kept

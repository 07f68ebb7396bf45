"""A request to generate text, after a protocol has read it, and the events that answer it. No protocol's words are used here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kindling.generation.healing import Healing
from kindling.generation.settings import Sampling
from kindling.serving.edit import Edit

Ending = Literal["end of text", "limit", "stop", "context", "edit", "time"]
"""The model's own end of text, `max_new_tokens`, a stop string, a full context, a rule of `Edit`, or the time limit."""


@dataclass(frozen=True)
class Generation:
    """One text to be generated."""

    ids: Sequence[int]
    """The prompt, from 1 to block_size - 1 tokens; who makes the request crops it."""
    sampling: Sampling
    healing: Healing | None = None
    """What the first new tokens must spell, which is not part of the answer."""
    n_taken_back: int = 0
    """Tokens that healing took from the end of the prompt: to who asked, they are part of it."""
    edit: Edit | None = None
    own_text: bool = False
    """Decode the answer on its own, as a response of a conversation is encoded in training. False: it goes on from the prompt."""
    n_logprobs: int | None = None
    """Give the log-probability of each token, and of this many of the most likely ones. None: give none."""
    time_limit_s: float = 60.0
    """From `submit` to the last token, the wait in the queue included."""
    lines_limit_s: float | None = None
    """From the first token on; it ends the text only once that has a line break."""


@dataclass(frozen=True)
class Token:
    """A new token, with its log-probability before any filter of `Sampling`, among the tokens that `healing` allows."""

    id: int
    logprob: float
    likely: tuple[tuple[int, float], ...]
    """The most likely tokens in its place, with their log-probabilities, the most likely first."""
    begins: int = 0
    """Where its text begins in the answer; below 0 if it also ends what the prompt had begun."""


@dataclass(frozen=True)
class Piece:
    """New text, in whole characters, and the tokens that it begins in or that begin in it (none unless `n_logprobs`)."""

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Done:
    """The last event of a request that was generated to its end."""

    ended_by: Ending
    n_prompt: int
    """Tokens of the prompt, those that healing took back included."""
    n_cached: int
    """Tokens of the prompt whose keys and values were there from an earlier request."""
    n_new: int
    """Sampled tokens, but for the end of text and those that only spell what healing took back."""
    stop: str | None = None
    """The stop string that ended it."""


@dataclass(frozen=True)
class Failed:
    """The last event of a request that could not be generated. `reason` is one line for the client."""

    reason: str


@dataclass(frozen=True)
class Refused:
    """The only event of a request that found no place in time. `retry_after_s` says when to ask again."""

    reason: str
    retry_after_s: float


Event = Piece | Done | Failed | Refused

"""Generates text: after a prompt, at the end of a file, or as the answer to a question.

    complete(model, tokenizer, "def fib(n):", Sampling(stop=("\\ndef ",)), say=print).text

Text is returned in whole characters while it is sampled, and ends before the first stop string.
Limits: a prompt that is longer than the context is cropped from the left. A conversation loses its oldest exchanges instead,
and an answer ends at the end of the context.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from kindling.data.prompts import Exchange, prompt_that_fits
from kindling.generation.decoding import stream, stream_batch
from kindling.generation.healing import longest_prompt, split_for_healing, token_texts
from kindling.generation.sampling import GenerationError, Sampling
from kindling.generation.text_stream import TextStream

if TYPE_CHECKING:
    from kindling.generation.decoding import Allowed
    from kindling.tokenization.tokenizer import Tokenizer
    from model import LanguageModel

Say = Callable[[str], object]
"""Is called with each piece of text, in whole characters."""
Ending = Literal["end of text", "limit", "stop", "context"]


class Completion(NamedTuple):
    """What a model wrote after a prompt."""

    text: str
    n_tokens: int
    """The number of sampled tokens, including those of a stop string."""
    ended_by: Ending
    """The model's own end of text, `max_new_tokens`, a stop string, or the end of the context."""


def extend(
    model: LanguageModel,
    tokenizer: Tokenizer,
    ids: list[int],
    sampling: Sampling,
    text: TextStream,
    say: Say | None = None,
    allowed: Allowed | None = None,
    whole_characters: bool = False,
) -> Completion:
    """Return what the model writes after the prompt `ids`, as text from the stream `text`.

    `whole_characters`: a character that the limit cuts is left out, as for a reader. Otherwise it becomes U+FFFD, as in
    `complete_batch`, so that a sample is all that was written.
    """
    pieces, n_tokens = [], 0

    def put(piece: str) -> None:
        if piece:
            pieces.append(piece)
            if say is not None:
                say(piece)

    for token in stream(model, ids, sampling, tokenizer.end_ids, allowed):
        n_tokens += 1
        put(text.add(token))
        if text.stopped:
            break
    put(text.finish(cut=whole_characters and n_tokens == sampling.max_new_tokens))
    ended_by: Ending = "stop" if text.stopped else "limit" if n_tokens == sampling.max_new_tokens else "end of text"
    return Completion("".join(pieces), n_tokens, ended_by)


def encode_document(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of the beginning of a document, as in training. For an empty text, this is the end-of-text token."""
    return ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(text) or [tokenizer.eos_id]


def complete(
    model: LanguageModel, tokenizer: Tokenizer, prompt: str, sampling: Sampling, say: Say | None = None
) -> Completion:
    """Return what the model writes after `prompt`; an empty prompt starts a new document."""
    ids = encode_document(tokenizer, prompt)
    if len(ids) > model.cfg.block_size:
        print(
            f"note: the prompt has {len(ids)} tokens and the context {model.cfg.block_size}: its beginning is cropped",
            file=sys.stderr,
        )
    return extend(model, tokenizer, ids, sampling, TextStream(tokenizer, sampling.stop, ids[-1:]), say)


def token_spellings(tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """Return the text of each token, as healing.py needs it."""
    (*_, before) = tokenizer.encode("x")
    control = {*tokenizer.special_tokens, *tokenizer.cfg.special_tokens}
    return token_texts(tokenizer.decode_batch, before, tokenizer.vocab_size, vocab_size, control)


def complete_document(
    model: LanguageModel, tokenizer: Tokenizer, text: str, sampling: Sampling, say: Say | None = None
) -> Completion:
    """Return what the model writes at the end of a document, also where the end is inside a token.

    The document is cropped from the left, with a note, so that `sampling.max_new_tokens`, or half the context, fit behind it.
    The completion ends at the end of the context.
    """
    block_size = model.cfg.block_size
    ids = encode_document(tokenizer, text)
    room = longest_prompt(block_size, sampling.max_new_tokens)
    if len(ids) > room:
        print(
            f"note: of the {len(ids)} tokens of the text, the last {room} are read: the context has {block_size}",
            file=sys.stderr,
        )
    ids = ids[-room:]
    limit = min(sampling.max_new_tokens, block_size - len(ids))
    spellings = token_spellings(tokenizer, model.cfg.vocab_size)
    its_own = replace(sampling, max_new_tokens=limit)
    new = extend_healed(model, tokenizer, ids, its_own, spellings, say, whole_characters=True)
    return new._replace(ended_by="context") if new.ended_by == "limit" and limit < sampling.max_new_tokens else new


def extend_healed(
    model: LanguageModel,
    tokenizer: Tokenizer,
    ids: list[int],
    sampling: Sampling,
    spellings: Sequence[str],
    say: Say | None = None,
    whole_characters: bool = False,
) -> Completion:
    """Return what the model writes after a prompt that may end inside a token; `spellings` are those of `token_spellings`."""
    kept, healing = split_for_healing(ids, spellings)
    # the tokens that were taken back are written again
    again = replace(sampling, max_new_tokens=sampling.max_new_tokens + len(ids) - len(kept))
    pieces = TextStream(tokenizer, sampling.stop, kept[-1:], skip=len(healing.text))
    return extend(model, tokenizer, kept, again, pieces, say, healing.allowed, whole_characters)


def complete_batch(
    model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling
) -> Iterator[tuple[int, Completion]]:
    """Yield the number and the completion of each prompt, as it ends. A prompt is a list of token ids.

    A completion is the same as for the prompt alone with its seed, up to the end of the context. Raises ValueError for a prompt
    that leaves no room in the context.
    """
    for row in stream_batch(model, prompts, sampling, tokenizer.end_ids, seeds):
        row.ended = row.ended or has_stop(tokenizer.decode(row.out), sampling.stop)
        if not row.ended:
            continue
        text = TextStream(tokenizer, sampling.stop, prompts[row.number][-1:])
        said = text.add_all(row.out)
        ended_by: Ending = "end of text"
        if text.stopped:
            ended_by = "stop"
        elif len(row.out) == row.limit:
            ended_by = "limit" if row.limit == sampling.max_new_tokens else "context"
        yield row.number, Completion(said, len(row.out), ended_by)


def has_stop(text: str, stops: Sequence[str]) -> bool:
    """Return whether the text contains one of the stop strings."""
    return any(stop in text for stop in stops)


class Answer(NamedTuple):
    """The answer to a question."""

    text: str
    stopped: bool
    """The answer ended by itself or before a stop string, not at a limit."""
    cut_by: str = ""
    """Otherwise the limit, in words."""


def answer(
    model: LanguageModel,
    tokenizer: Tokenizer,
    template: str,
    exchanges: Sequence[Exchange],
    sampling: Sampling,
    say: Say | None = None,
    room: int = 1,
) -> Answer:
    """Return the response to the last of the `exchanges`, which has none yet.

    Prompt and response together have at most block_size tokens. The oldest exchanges are left out, with a note, until the
    response has room for at least `room` tokens. Raises GenerationError if the last exchange alone leaves no room.
    """
    block_size = model.cfg.block_size
    ids = _conversation_ids(tokenizer, template, exchanges, block_size, room)
    free = block_size - len(ids)
    limit = min(sampling.max_new_tokens, free)
    # decoded on its own, as a response is encoded in training
    text = TextStream(tokenizer, sampling.stop)
    said = extend(model, tokenizer, ids, replace(sampling, max_new_tokens=limit), text, say, whole_characters=True)
    cut_by = ""
    if said.ended_by == "limit":
        cut_by = f"the context of {block_size} tokens" if limit == free else f"--max-new-tokens {limit}"
    return Answer(said.text, not cut_by, cut_by)


def _conversation_ids(
    tokenizer: Tokenizer, template: str, exchanges: Sequence[Exchange], block_size: int, room: int
) -> list[int]:
    """Return the ids of the last exchange, and of as many before it as leave `room`. Raises GenerationError if none is left."""
    assert exchanges and not exchanges[-1].response, "the response is for the model to write"
    ids, dropped = prompt_that_fits(template, exchanges, tokenizer, block_size, room)
    if len(ids) >= block_size:
        raise GenerationError(
            f"a question must leave room for an answer in the context of {block_size} tokens, but has {len(ids)} "
            f"with its template; shorten it"
        )
    if dropped:
        what = "oldest exchange is" if dropped == 1 else f"{dropped} oldest exchanges are"
        print(f"note: the {what} left out: the context has {block_size} tokens", file=sys.stderr)
    return ids

"""OpenAI's protocol: /v1/models, /v1/completions, and Mistral's /v1/fim/completions. Chat is in openai_chat.py.

A prompt that is cropped is reported: `usage.prompt_tokens` counts the tokens that were read, and `truncated` is true.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from kindling.serving.body import BadRequest, Fields, is_integer, is_text
from kindling.serving.edit import Edit
from kindling.serving.generation import Done, Piece, Token
from kindling.serving.logprobs import in_columns
from kindling.serving.options import (
    AT_CURSOR,
    Names,
    edit,
    options,
    refuse_penalties,
    require_few,
    sampling,
    with_seeds,
)
from kindling.serving.replies import Answers, Reply, Stream, Whole, collect, sse
from kindling.serving.served_model import (
    Options,
    Prompt,
    Served,
    after_ids,
    at_cursor,
    continuation,
    is_literal_fim,
    literal,
)

NAMES = Names(("max_tokens", "max_completion_tokens"))
FIM_NAMES = Names(("max_tokens", "max_completion_tokens"), seed="random_seed")
MAX_TOKENS = 16  # OpenAI's default
FINISHED = {"end of text": "stop", "stop": "stop", "edit": "stop"}  # otherwise "length"


def error(e: Exception, status: int) -> dict[str, Any]:
    """Return an error as OpenAI's library reads it."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
    code = {401: "invalid_api_key", 404: "not_found", 503: "busy"}.get(status)
    return {"error": {"message": str(e), "type": kind, "param": getattr(e, "param", None), "code": code}}


def model_card(served: Served) -> dict[str, Any]:
    """Return the model as /v1/models lists it, with llama.cpp's `meta`."""
    context, parameters = served.block_size, served.about.get("parameters")
    meta = {"n_ctx": context, "n_ctx_train": context, "n_vocab": served.n_tokens, "n_params": parameters}
    created = int(served.metrics.started)
    return {"id": served.name, "object": "model", "created": created, "owned_by": "kindling", "meta": meta}


async def models(served: Served, fields: Fields) -> Reply:
    """Answer /v1/models."""
    return {"object": "list", "data": [model_card(served)]}


async def model(served: Served, fields: Fields) -> Reply:
    """Answer /v1/models/NAME."""
    if fields.text("model") != served.name:
        raise BadRequest(f"the model must be {served.name}, but is another; see /v1/models", "model", 404)
    return model_card(served)


def refuse_unsupported(fields: Fields) -> None:
    """Raise BadRequest for what OpenAI's server can do and this one cannot; values that ask for nothing pass."""
    refuse_penalties(fields, "repetition_penalty")
    fields.refuse("logit_bias", ({},), "this server does not support it")
    fields.text("model")


def usage(wholes: Sequence[Whole], n: int) -> dict[str, Any]:
    """Return the tokens of an answer; a prompt with several samples counts once."""
    dones = [whole.done for whole in wholes]
    prompt, new = sum(done.n_prompt for done in dones[::n]), sum(done.n_new for done in dones)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": sum(done.n_cached for done in dones[::n])},
    }


def finish_reason(done: Done) -> str:
    """Return why an answer ended, in OpenAI's words."""
    return FINISHED.get(done.ended_by, "length")


class Asked(NamedTuple):
    """What a request for completions asks for."""

    prompts: list[Prompt]
    n: int
    """Samples of each."""
    n_logprobs: int | None
    echoes: list[str]
    """What stands before each answer: the prompt for `echo`, otherwise nothing."""


def _given(served: Served, fields: Fields) -> list[str | list[int]]:
    """Return the prompts: a text, a list of texts, token ids, or a list of lists of them."""
    given = fields.any("prompt")
    if given is None or isinstance(given, str):
        return [fields.text("prompt") or ""]
    if isinstance(given, list) and given and all(map(is_text, given)):
        return list(given)
    lists = given if isinstance(given, list) and given and isinstance(given[0], list) else [given]
    for ids in lists:
        if not isinstance(ids, list) or not ids or not all(is_integer(i) and 0 <= i < served.n_tokens for i in ids):
            must = f"texts of valid Unicode, or token ids from 0 to {served.n_tokens - 1}, one prompt or a list of them"
            raise fields.wrong("prompt", must)
    return [[int(i) for i in ids] for ids in lists]


def _prompt(
    served: Served, given: str | list[int], suffix: str | None, how: Options, rules: Edit, is_literal: bool
) -> Prompt:
    if isinstance(given, list):
        if suffix:
            raise BadRequest("prompt must be text where there is a suffix, but is token ids; decode them", "prompt")
        return after_ids(served, given, how)
    if is_literal:
        return literal(served, given, how, rules) or continuation(served, given, how)
    return continuation(served, given, how) if suffix is None else at_cursor(served, given, suffix, how, rules)


def _asked(served: Served, fields: Fields, names: Names) -> Asked:
    """Read a request for completions. Raises BadRequest."""
    refuse_unsupported(fields)
    fields.refuse("best_of", (1,), "set n for several samples")
    suffix, n = fields.text("suffix"), fields.integer("n", 1, served.limits.n) or 1
    n_logprobs, echo = fields.integer("logprobs", 0, served.limits.logprobs), fields.flag("echo")
    given = _given(served, fields)
    if echo and n_logprobs is not None:
        raise BadRequest("echo must be false with logprobs, but is true: a prompt's are not computed; drop one", "echo")
    require_few(served, len(given), n, "n")
    is_literal = suffix is None and any(isinstance(one, str) and is_literal_fim(served, one) for one in given)
    at_its_end = suffix is None and not is_literal
    default = replace(served.sampling, max_new_tokens=MAX_TOKENS) if at_its_end else AT_CURSOR
    how = options(served, sampling(served, fields, names, default), n_logprobs)
    rules = edit(served, fields)
    prompts = [_prompt(served, one, suffix, how, rules, is_literal) for one in given]
    texts = (
        [one if isinstance(one, str) else served.vocabulary.decode(one) for one in given] if echo else [""] * len(given)
    )
    return Asked(with_seeds(prompts, n), n, n_logprobs, [text for text in texts for _ in range(n)])


def head(served: Served, kind: str, prefix: str) -> dict[str, Any]:
    """Return what every answer begins with."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": served.name,
    }


def with_usage(fields: Fields) -> bool:
    """Return whether a stream is to end with the usage."""
    return fields.section("stream_options").flag("include_usage")


async def completions(served: Served, fields: Fields) -> Reply:
    """Answer /v1/completions. Raises BadRequest, Busy and GenerationFailed."""
    asked = await asyncio.to_thread(_asked, served, fields, NAMES)  # long prompts may take a second to encode
    begin = head(served, "text_completion", "cmpl")
    streams, includes = fields.flag("stream"), with_usage(fields)
    answers = Answers(served, asked.prompts)
    if streams:
        return Stream(answers, _completion_chunks(served, answers, asked, begin, includes))
    with answers:
        wholes = await collect(answers, len(asked.prompts))
    choices = [
        {
            "text": asked.echoes[i] + whole.text,
            "index": i,
            "logprobs": None if asked.n_logprobs is None else in_columns(served.vocabulary, whole.tokens),
            "finish_reason": finish_reason(whole.done),
        }
        for i, whole in enumerate(wholes)
    ]
    return {**begin, "choices": choices, "usage": usage(wholes, asked.n), "truncated": answers.truncated}


async def _completion_chunks(
    served: Served, answers: Answers, asked: Asked, begin: dict[str, Any], includes: bool
) -> AsyncGenerator[str]:
    wholes = [Whole() for _ in asked.prompts]
    nothing: dict[str, Any] = {"usage": None} if includes else {}

    def chunk(i: int, text: str, tokens: Sequence[Token], reason: str | None) -> str:
        likely = in_columns(served.vocabulary, tokens) if asked.n_logprobs is not None and tokens else None
        choice = {"text": text, "index": i, "logprobs": likely, "finish_reason": reason}
        return sse({**begin, "choices": [choice], **nothing})

    for i, echo in enumerate(asked.echoes):
        if echo:
            yield chunk(i, echo, (), None)
    async for i, event in answers:
        if isinstance(event, Piece):
            yield chunk(i, event.text, event.tokens, None)
        else:
            wholes[i].done = event
            yield chunk(i, "", (), finish_reason(event))
    if includes:
        yield sse({**begin, "choices": [], "usage": usage(wholes, asked.n), "truncated": answers.truncated})
    yield sse("[DONE]")


async def fim(served: Served, fields: Fields) -> Reply:
    """Answer /v1/fim/completions: a prompt and a suffix, and an answer in the form of a chat's."""
    refuse_unsupported(fields)
    prefix, suffix = fields.text("prompt"), fields.text("suffix") or ""
    if prefix is None:
        raise fields.wrong("prompt", "a text", "give the text before the cursor")
    fields.integer("min_tokens", 0, 0)
    how = options(served, sampling(served, fields, FIM_NAMES, AT_CURSOR))
    begin, streams = head(served, "chat.completion", "fim"), fields.flag("stream")
    includes = with_usage(fields)
    prompt = await asyncio.to_thread(at_cursor, served, prefix, suffix, how, edit(served, fields))
    answers = Answers(served, [prompt])
    if streams:
        return Stream(answers, _fim_chunks(answers, begin, includes))
    with answers:
        (whole,) = await collect(answers, 1)
    message = {"role": "assistant", "content": whole.text, "tool_calls": None}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason(whole.done)}
    return {**begin, "choices": [choice], "usage": usage([whole], 1), "truncated": answers.truncated}


async def _fim_chunks(answers: Answers, begin: dict[str, Any], includes: bool) -> AsyncGenerator[str]:
    begin = {**begin, "object": "chat.completion.chunk"}
    async for _, event in answers:
        done = event if isinstance(event, Done) else None
        # clients read `content` of every chunk, also of the last one
        delta = {"role": "assistant", "content": event.text if isinstance(event, Piece) else ""}
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason(done) if done else None}
        ends = {"usage": usage([Whole(done=done)], 1), "truncated": answers.truncated} if done and includes else {}
        yield sse({**begin, "choices": [choice], **ends})
    yield sse("[DONE]")

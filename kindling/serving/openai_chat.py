"""OpenAI's /v1/chat/completions, for runs that were fine-tuned on instructions.

Messages become exchanges of the run's template. A system message has no place in a template, so it stands before the first
question that fits in the context. Of a run that was fine-tuned on single exchanges, only the last question is asked, and
`truncated` is true.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from kindling.data.prompts import Exchange
from kindling.serving.body import BadRequest, Fields
from kindling.serving.generation import Piece, Token
from kindling.serving.logprobs import listed
from kindling.serving.openai import finish_reason, head, refuse_unsupported, usage, with_usage
from kindling.serving.options import Names, only_warms_cache, options, require_few, sampling, with_seeds
from kindling.serving.replies import Answers, Reply, Stream, Whole, collect, sse
from kindling.serving.served_model import Conversation, Served, chat

NAMES = Names(("max_completion_tokens", "max_tokens", "n_predict"), no_limit=(-1, 0))


def conversation_of(fields: Fields, most: int) -> Conversation:
    """Return the conversation of some messages. Raises BadRequest."""
    system: list[str] = []
    asked: list[str] = []
    exchanges: list[Exchange] = []
    messages = fields.sections("messages", most)
    for message in messages:
        role, text = message.text("role"), _content(message)
        if role in ("system", "developer"):
            system.append(text)
        elif role == "user":
            asked.append(text)
        elif role == "assistant" and asked:
            exchanges.append(Exchange("\n\n".join(asked), text))
            asked = []
        else:
            raise message.wrong("role", "user, assistant after user, or system")
    if not asked:
        raise BadRequest("messages must end with one of the role user, but do not; add the question", "messages")
    exchanges.append(Exchange("\n\n".join(asked)))
    return Conversation(exchanges, "\n\n".join(system))


def _content(message: Fields) -> str:
    """Return the text of a message: one text, or a list of parts that are texts."""
    if not isinstance(message.any("content"), list):
        text = message.text("content")
        if text is None:
            raise message.wrong("content", "a text", "write the message")
        return text
    parts = message.sections("content", 1000)
    for part in parts:
        if part.any("type") != "text" or "text" not in part:
            raise part.wrong("type", "text", "leave out images and files")
    return "".join(part.text("text") or "" for part in parts)


async def chat_completions(served: Served, fields: Fields) -> Reply:
    """Answer /v1/chat/completions. Raises BadRequest, Busy and GenerationFailed."""
    refuse_unsupported(fields)
    for name in ("tools", "functions"):
        fields.refuse(name, ([],), "this server calls no tools")
    if fields.section("response_format").text("type") not in (None, "text"):
        raise fields.wrong("response_format", 'of the type "text"', "leave it out")
    n, asked = fields.integer("n", 1, served.limits.n) or 1, conversation_of(fields, served.limits.messages)
    require_few(served, 1, n, "n")
    wants = fields.flag("logprobs")
    n_logprobs = (fields.integer("top_logprobs", 0, served.limits.logprobs) or 0) if wants else None
    chosen = sampling(served, fields, NAMES, served.sampling)
    prompts = with_seeds([await asyncio.to_thread(chat, served, asked, options(served, chosen, n_logprobs))], n)
    begin, streams, includes = head(served, "chat.completion", "chatcmpl"), fields.flag("stream"), with_usage(fields)
    if only_warms_cache(fields):
        message = {"role": "assistant", "content": ""}  # llama.vim warms a cache that this server keeps by itself
        return {**begin, "choices": [{"index": 0, "message": message, "finish_reason": "length"}]}
    answers = Answers(served, prompts)
    if streams:
        return Stream(answers, _chunks(served, answers, begin, n, wants, includes))
    with answers:
        wholes = await collect(answers, n)
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": whole.text},
            "logprobs": {"content": listed(served.vocabulary, whole.tokens)} if wants else None,
            "finish_reason": finish_reason(whole.done),
        }
        for i, whole in enumerate(wholes)
    ]
    return {**begin, "choices": choices, "usage": usage(wholes, n), "truncated": answers.truncated}


async def _chunks(
    served: Served, answers: Answers, begin: dict[str, Any], n: int, wants: bool, includes: bool
) -> AsyncGenerator[str]:
    begin = {**begin, "object": "chat.completion.chunk", **({"usage": None} if includes else {})}
    wholes = [Whole() for _ in range(n)]

    def chunk(i: int, delta: dict[str, Any], tokens: Sequence[Token] = (), reason: str | None = None) -> str:
        likely = {"content": listed(served.vocabulary, tokens)} if wants and tokens else None
        choice = {"index": i, "delta": delta, "logprobs": likely, "finish_reason": reason}
        return sse({**begin, "choices": [choice]})

    for i in range(n):
        yield chunk(i, {"role": "assistant", "content": ""})
    async for i, event in answers:
        if isinstance(event, Piece):
            yield chunk(i, {"content": event.text}, event.tokens)
        else:
            wholes[i].done = event
            yield chunk(i, {}, reason=finish_reason(event))
    if includes:
        yield sse({**begin, "choices": [], "usage": usage(wholes, n), "truncated": answers.truncated})
    yield sse("[DONE]")

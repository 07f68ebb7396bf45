"""Ollama's protocol: /api/generate, /api/chat, /api/tags, /api/show, /api/version.

Streams are lines of JSON, and are the default. A run that was fine-tuned on instructions answers a prompt as a question, unless
`raw`, a `template` or a `suffix` says otherwise. Times are in nanoseconds.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from kindling.data.exported_templates import go_template
from kindling.data.jinja_chat import is_jinja
from kindling.data.prompts import Exchange
from kindling.serving.body import Fields
from kindling.serving.generation import Done, Piece
from kindling.serving.openai import finish_reason
from kindling.serving.openai_chat import conversation_of
from kindling.serving.options import AT_CURSOR, Names, edit, options, refuse_penalties, sampling
from kindling.serving.replies import Answers, Reply, Stream, collect
from kindling.serving.served_model import Conversation, Prompt, Served, at_cursor, chat, continuation, require_chat
from kindling.tokenization.infilling import FIM_TOKENS

NAMES = Names(("num_predict",), (-1, -2, 0), random_seed=(-1,), repetition_penalty="repeat_penalty")
VERSION = "0.5.0"  # of Ollama's protocol, which clients ask for
LINES = "application/x-ndjson"


def error(e: Exception, status: int) -> dict[str, Any]:
    """Return an error as Ollama's clients read it."""
    return {"error": str(e)}


def _date(seconds: float) -> str:
    """Return a time in seconds since 1970 as a date and time of day, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _chosen(served: Served, fields: Fields, at_cursor: bool) -> Any:
    asked = fields.section("options")
    for name in ("num_ctx", "num_thread", "num_gpu", "repeat_last_n"):
        asked.integer(name, -1, 10**9)
    asked.refuse("mirostat", (0,), "this server does not support it")
    refuse_penalties(asked, "repeat_penalty")
    default = AT_CURSOR if at_cursor else replace(served.sampling, max_new_tokens=served.limits.max_new_tokens)
    return sampling(served, asked, NAMES, default)


async def generate(served: Served, fields: Fields) -> Reply:
    """Answer /api/generate. Raises BadRequest, Busy and GenerationFailed."""
    fields.text("model"), fields.text("system"), fields.text("template")
    fields.refuse("images", ([],), "this server reads no images")
    fields.refuse("format", ("",), "this server knows no grammars")
    text, suffix = fields.text("prompt") or "", fields.text("suffix") or ""
    is_raw = fields.flag("raw") or "template" in fields
    how = options(served, _chosen(served, fields, bool(suffix)))
    streams = fields.flag("stream", True)
    begin = {"model": served.name, "created_at": _date(time.time())}
    if not text and not suffix:
        return {**begin, "response": "", "done": True, "done_reason": "load"}
    if suffix:
        prompt = await asyncio.to_thread(at_cursor, served, text, suffix, how, edit(served, fields))
    elif served.template is not None and not is_raw:
        asked = Conversation([Exchange(text)], fields.text("system") or "")
        prompt = await asyncio.to_thread(chat, served, asked, how)
    else:
        prompt = await asyncio.to_thread(continuation, served, text, how)
    return await _reply(served, begin, prompt, streams, lambda text: {"response": text})


async def chat_messages(served: Served, fields: Fields) -> Reply:
    """Answer /api/chat. Raises BadRequest, Busy and GenerationFailed."""
    fields.text("model")
    fields.refuse("tools", ([],), "this server calls no tools")
    fields.refuse("format", ("",), "this server knows no grammars")
    begin, streams = {"model": served.name, "created_at": _date(time.time())}, fields.flag("stream", True)
    require_chat(served)
    if not fields.any("messages"):
        return {**begin, "message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "load"}
    asked = conversation_of(fields, served.limits.messages)
    how = options(served, _chosen(served, fields, at_cursor=False))
    prompt = await asyncio.to_thread(chat, served, asked, how)
    return await _reply(
        served, begin, prompt, streams, lambda text: {"message": {"role": "assistant", "content": text}}
    )


async def _reply(served: Served, begin: dict[str, Any], prompt: Prompt, streams: bool, said: Any) -> Reply:
    answers = Answers(served, [prompt])
    if streams:
        return Stream(answers, _lines(answers, begin, said), LINES)
    with answers:
        (whole,) = await collect(answers, 1)
    return {**begin, **said(whole.text), **_end(answers, whole.done)}


async def _lines(answers: Answers, begin: dict[str, Any], said: Any) -> AsyncGenerator[str]:
    async for _, event in answers:
        line = {**said(event.text), "done": False} if isinstance(event, Piece) else {**said(""), **_end(answers, event)}
        yield json.dumps({**begin, **line}) + "\n"


def _end(answers: Answers, done: Done) -> dict[str, Any]:
    prompt_ns, answer_ns = int(answers.prompt_s * 1e9), int(answers.predicted_s * 1e9)
    return {
        "done": True,
        "done_reason": finish_reason(done),
        "truncated": answers.truncated,
        "total_duration": prompt_ns + answer_ns,
        "load_duration": 0,
        "prompt_eval_count": done.n_prompt,
        "prompt_eval_duration": prompt_ns,
        "eval_count": done.n_new,
        "eval_duration": answer_ns,
    }


def _details(served: Served) -> dict[str, Any]:
    parameters = served.about.get("parameters") or 0
    size = f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"
    kind = served.about.get("precision", "fp32")
    return {
        "parent_model": "",
        "format": "kindling",
        "family": "kindling",
        "families": ["kindling"],
        "parameter_size": size,
        "quantization_level": {"int8": "Q8_0", "bf16": "BF16"}.get(kind, "F32"),
    }


def _capabilities(served: Served) -> list[str]:
    return ["completion", *(["insert"] if served.can_infill else [])]


async def tags(served: Served, fields: Fields) -> Reply:
    """Answer /api/tags: the one model."""
    card: dict[str, Any] = {
        "name": f"{served.name}:latest",
        "model": f"{served.name}:latest",
        "modified_at": _date(served.metrics.started),
    }
    card |= {
        "size": served.about.get("bytes", 0),
        "digest": served.about.get("sha256", ""),
        "details": _details(served),
    }
    return {"models": [card]}


async def show(served: Served, fields: Fields) -> Reply:
    """Answer /api/show. Editors look for "insert", or for `.Suffix` in the template, before they ask for text at a cursor."""
    fields.text("model"), fields.text("name")
    prefix, middle, suffix, _ = FIM_TOKENS
    filled = f"{prefix}{{{{ .Prompt }}}}{suffix}{{{{ .Suffix }}}}{middle}"
    template = served.template
    # Ollama's language cannot say what a template in Jinja does, as in modelfile.py
    asks = "{{ .Prompt }}" if template is None or is_jinja(template) else go_template(template, served.vocabulary)
    insert = f"{{{{ if .Suffix }}}}{filled}{{{{ else }}}}{asks}{{{{ end }}}}"
    info = {
        "general.architecture": "kindling",
        "general.parameter_count": served.about.get("parameters"),
        "kindling.context_length": served.block_size,
    }
    return {
        "modelfile": "",
        "parameters": f"num_ctx {served.block_size}",
        "template": insert if served.can_infill else asks,
        "details": _details(served),
        "model_info": info,
        "capabilities": _capabilities(served),
        "modified_at": _date(served.metrics.started),
    }


async def version(served: Served, fields: Fields) -> Reply:
    """Answer /api/version."""
    return {"version": VERSION}

"""llama.cpp's protocol: /infill, /completion, /tokenize, /detokenize, /apply-template, /props, /health.

`input_extra` (text of other files) is checked, and not read: the models have a short context and were trained on single files.
`samplers` and `cache_prompt` are checked too: the order of the filters is fixed, and prompts are always cached.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from kindling.data.exported_templates import jinja_template
from kindling.data.prompts import encode as encode_conversation
from kindling.data.prompts import flatten
from kindling.serving.body import HUGE, Fields, is_integer, is_text
from kindling.serving.edit import Edit
from kindling.serving.generation import Piece
from kindling.serving.logprobs import listed, text_or_bytes
from kindling.serving.openai_chat import conversation_of
from kindling.serving.options import (
    AT_CURSOR,
    Names,
    edit,
    only_warms_cache,
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
    after_parts,
    at_cursor,
    continuation,
    encoded,
    require_chat,
)

NAMES = Names(("n_predict", "max_tokens"), (-1, 0), random_seed=(-1,), repetition_penalty="repeat_penalty")
STOP_TYPES = {"end of text": "eos", "stop": "word", "edit": "word"}  # otherwise "limit"
OTHERS_TEMPERATURE = 0.8  # of the second text at a cursor and those after it: the first is the most likely one
LISTED = 1000  # most items of a list whose values are not used


def error(e: Exception, status: int) -> dict[str, Any]:
    """Return an error in llama.cpp's form, which is OpenAI's with the status as its code."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 503: "unavailable_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": str(e), "type": kind, "param": getattr(e, "param", None), "code": status}}


class Asked(NamedTuple):
    """What a request asks for."""

    prompts: list[Prompt]
    is_list: bool
    """The answer is a list, as several texts were asked for."""
    n_logprobs: int | None
    keep: tuple[str, ...]
    """`response_fields`: the only fields of the answer, by their paths. Empty: all."""


async def infill(served: Served, fields: Fields) -> Reply:
    """Answer /infill: what stands between `input_prefix` + `prompt` and `input_suffix`."""
    prefix, suffix = (fields.text(name) for name in ("input_prefix", "input_suffix"))
    for name, value in (("input_prefix", prefix), ("input_suffix", suffix)):
        if value is None:
            raise fields.wrong(name, "a text", "give the text around the cursor")
    for extra in fields.sections("input_extra", LISTED):
        extra.text("text"), extra.text("filename")
    text = (prefix or "") + (fields.text("prompt") or "")
    how = _how(served, fields, at_cursor=True)
    rules = edit(served, fields, fields.integer("n_indent", 0, HUGE) or 0)
    n = fields.integer("n_cmpl", 1, served.limits.n) or 1
    discards = only_warms_cache(fields)
    if discards and not text:
        return _kept(_final(served, Whole(), None, False, 0.0, 0.0), _keep(fields))
    if discards:
        how, n = how._replace(sampling=replace(how.sampling, max_new_tokens=1)), 1
    first = await asyncio.to_thread(at_cursor_of, served, text, suffix or "", how, rules)
    others = how.sampling if "temperature" in fields else replace(how.sampling, temperature=OTHERS_TEMPERATURE)
    sampled = first._replace(generation=replace(first.generation, sampling=others))
    prompts = [first, *with_seeds([sampled], n)[1:]]
    return await _reply(served, fields, Asked(prompts, n > 1, how.n_logprobs, _keep(fields)), discards)


def at_cursor_of(served: Served, prefix: str, suffix: str, how: Options, rules: Edit) -> Prompt:
    """Return the generation at a cursor, with the editor's names in errors."""
    if suffix.strip():
        served.require_infill("input_suffix")
    return at_cursor(served, prefix, suffix, how, rules)


async def completion(served: Served, fields: Fields) -> Reply:
    """Answer /completion: what follows `prompt`, a text, token ids, both mixed, or a list of these."""
    asked = await asyncio.to_thread(_asked, served, fields)  # long prompts may take a second to encode
    return await _reply(served, fields, asked, only_warms_cache(fields))


def _asked(served: Served, fields: Fields) -> Asked:
    given = fields.any("prompt")
    is_list = isinstance(given, list) and bool(given) and not any(is_integer(item) for item in given)
    all_given = given if is_list else [given]
    n = fields.integer("n_cmpl", 1, served.limits.n) or 1
    require_few(served, len(all_given), n, "prompt")
    how = _how(served, fields, at_cursor=False)
    prompts = [_prompt(served, fields, one, how) for one in all_given]
    return Asked(with_seeds(prompts, n), is_list or n > 1, how.n_logprobs, _keep(fields))


def _prompt(served: Served, fields: Fields, given: Any, how: Options) -> Prompt:
    if is_text(given):
        return continuation(served, given, how)
    parts: list[Any] = given if isinstance(given, list) and given else [None]
    if not all(is_text(part) or (is_integer(part) and 0 <= part < served.n_tokens) for part in parts):
        must = f"a text of valid Unicode, token ids from 0 to {served.n_tokens - 1}, or a list of prompts"
        raise fields.wrong("prompt", must)
    return after_parts(served, [part if isinstance(part, str) else int(part) for part in parts], how)


def _how(served: Served, fields: Fields, at_cursor: bool) -> Options:
    """Read the settings of a request. Raises BadRequest."""
    fields.flag("cache_prompt")
    fields.texts("samplers", LISTED)
    fields.integer("id_slot", -1, HUGE)
    fields.refuse("grammar", ("",), "this server knows no grammars")
    fields.refuse("json_schema", ({},), "this server knows no grammars")
    refuse_penalties(fields, "repeat_penalty")
    default = replace(served.sampling, max_new_tokens=served.limits.max_new_tokens)
    chosen = sampling(served, fields, NAMES, AT_CURSOR if at_cursor else default)
    fields.integer("t_max_prompt_ms", -1, HUGE)  # llama.cpp does not use it either
    predict_ms = fields.integer("t_max_predict_ms", -1, HUGE)
    how = options(served, chosen, fields.integer("n_probs", 0, served.limits.logprobs) or None)
    return how._replace(lines_limit_s=predict_ms / 1000) if predict_ms is not None and predict_ms > 0 else how


def _keep(fields: Fields) -> tuple[str, ...]:
    return fields.texts("response_fields", LISTED)


def _kept(content: dict[str, Any], keep: Sequence[str]) -> dict[str, Any]:
    """Return only the fields of an answer that were asked for, each under its whole path."""
    if not keep:
        return content
    out: dict[str, Any] = {}
    for path in keep:
        found: Any = content
        for part in path.split("/"):
            found = found.get(part) if isinstance(found, dict) else None
        if found is not None:
            out[path] = found
    return out


def _final(
    served: Served, whole: Whole, n_logprobs: int | None, truncated: bool, prompt_s: float, predicted_s: float
) -> dict[str, Any]:
    """Return the whole answer, or the last event of a stream."""
    done, prompt_ms, predicted_ms = whole.done, max(1e-3, 1000 * prompt_s), max(1e-3, 1000 * predicted_s)
    n_new_prompt = max(0, done.n_prompt - done.n_cached)
    content: dict[str, Any] = {
        "index": 0,
        "content": whole.text,
        "tokens": [],
        "id_slot": -1,
        "stop": True,
        "model": served.name,
        "tokens_predicted": done.n_new,
        "tokens_evaluated": done.n_prompt,
        "truncated": truncated,
        "generation_settings": {"n_ctx": served.block_size},
        "has_new_line": "\n" in whole.text,
        "stop_type": STOP_TYPES.get(done.ended_by, "limit"),
        "stopping_word": done.stop or "",
        "tokens_cached": done.n_prompt + done.n_new,  # all that the slot holds; those found there are timings.cache_n
        "timings": {
            "cache_n": done.n_cached,
            "prompt_n": n_new_prompt,
            "prompt_ms": prompt_ms,
            "prompt_per_token_ms": prompt_ms / max(1, n_new_prompt),
            "prompt_per_second": 1000 * n_new_prompt / prompt_ms,
            "predicted_n": done.n_new,
            "predicted_ms": predicted_ms,
            "predicted_per_token_ms": predicted_ms / max(1, done.n_new),
            "predicted_per_second": 1000 * done.n_new / predicted_ms,
        },
    }
    if n_logprobs is not None:
        content["completion_probabilities"] = listed(served.vocabulary, whole.tokens)
    return content


async def _reply(served: Served, fields: Fields, asked: Asked, discards: bool) -> Reply:
    streams = fields.flag("stream")
    answers = Answers(served, asked.prompts)
    if streams and not discards:
        return Stream(answers, _chunks(served, answers, asked))
    with answers:
        wholes = await collect(answers, len(asked.prompts))
    contents = []
    for i, whole in enumerate(wholes):
        whole = replace(whole, text="", tokens=[]) if discards else whole
        times = (answers.truncated, answers.prompt_s, answers.predicted_s)
        contents.append(_kept({**_final(served, whole, asked.n_logprobs, *times), "index": i}, asked.keep))
    return contents if asked.is_list else contents[0]


async def _chunks(served: Served, answers: Answers, asked: Asked) -> AsyncGenerator[str]:
    async for i, event in answers:
        if isinstance(event, Piece):
            chunk = {"index": i, "content": event.text, "tokens": [t.id for t in event.tokens], "stop": False}
            chunk |= {"id_slot": -1}
            if asked.n_logprobs is not None:
                chunk["completion_probabilities"] = listed(served.vocabulary, event.tokens)
        else:
            times = (answers.truncated, answers.prompt_s, answers.predicted_s)
            chunk = {**_final(served, Whole(done=event), None, *times), "index": i}
        yield sse(_kept(chunk, asked.keep))


async def tokenize(served: Served, fields: Fields) -> Reply:
    """Answer /tokenize. A control token that is written in the text is text, also with `parse_special`."""
    return await asyncio.to_thread(_tokenize, served, fields)  # a whole file may take a second


def _tokenize(served: Served, fields: Fields) -> Reply:
    text = fields.text("content")
    if text is None:
        raise fields.wrong("content", "a text", "give the text")
    fields.flag("parse_special")
    bos = served.vocabulary.bos_id
    ids = [bos] if fields.flag("add_special") and bos is not None else []
    ids += encoded(served, text, "content")
    if not fields.flag("with_pieces"):
        return {"tokens": ids}
    pieces = {i: {"id": i, "piece": text_or_bytes(served.vocabulary, i)} for i in set(ids)}
    return {"tokens": [pieces[i] for i in ids]}


async def detokenize(served: Served, fields: Fields) -> Reply:
    """Answer /detokenize."""
    return await asyncio.to_thread(lambda: {"content": served.vocabulary.decode(fields.ids("tokens", served.n_tokens))})


async def apply_template(served: Served, fields: Fields) -> Reply:
    """Answer /apply-template: the text of a conversation, up to where the answer begins."""
    asked, template = conversation_of(fields, served.limits.messages), require_chat(served)
    first, *others = asked.exchanges
    exchanges = [replace(first, instruction=asked.before + first.instruction), *others]

    def text() -> str:
        return served.vocabulary.decode(flatten(encode_conversation(template, exchanges, served.vocabulary)))

    return {"prompt": await asyncio.to_thread(text)}


async def props(served: Served, fields: Fields) -> Reply:
    """Answer /props."""
    settings = {"n_ctx": served.block_size, "params": {"n_predict": served.limits.max_new_tokens}}
    return {
        "default_generation_settings": settings,
        "total_slots": served.about.get("rows", 1),
        "model_alias": served.name,
        "model_path": served.name,
        "chat_template": jinja_template(served.template, served.vocabulary) if served.template else "",
        "build_info": "kindling",
    }


async def health(served: Served, fields: Fields) -> Reply:
    """Answer /health."""
    return {"status": "ok"}

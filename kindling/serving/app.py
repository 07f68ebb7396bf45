"""The server's app: which path is answered by which function, and how an answer or an error is sent."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import sys
import traceback
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kindling.errors import KindlingError
from kindling.serving import llamacpp, ollama, openai, openai_chat
from kindling.serving.body import BadRequest, Fields, parse
from kindling.serving.replies import GenerationFailed, Reply, Stream
from kindling.serving.safety import (
    ErrorForm,
    Gone,
    Guard,
    Receive,
    Scope,
    Send,
    read_body,
    refuse,
    require_json,
    send_json,
    unless_gone,
)
from kindling.serving.scheduler import Busy
from kindling.serving.served_model import Served

PAGE = Path(__file__).with_name("page.html")
Handler = Callable[[Served, Fields], Awaitable[Reply]]


class Entry(NamedTuple):
    """A path of the server."""

    path: str
    method: str
    handler: Handler
    error: ErrorForm


ENTRIES = (
    Entry("/v1/models", "GET", openai.models, openai.error),
    Entry("/models", "GET", openai.models, openai.error),
    Entry("/v1/models/{model:path}", "GET", openai.model, openai.error),
    Entry("/v1/completions", "POST", openai.completions, openai.error),
    Entry("/beta/completions", "POST", openai.completions, openai.error),  # DeepSeek's path for a prompt with a suffix
    Entry("/v1/chat/completions", "POST", openai_chat.chat_completions, openai.error),
    Entry("/v1/fim/completions", "POST", openai.fim, openai.error),
    Entry("/infill", "POST", llamacpp.infill, llamacpp.error),
    Entry("/completion", "POST", llamacpp.completion, llamacpp.error),
    Entry("/completions", "POST", llamacpp.completion, llamacpp.error),
    Entry("/tokenize", "POST", llamacpp.tokenize, llamacpp.error),
    Entry("/detokenize", "POST", llamacpp.detokenize, llamacpp.error),
    Entry("/apply-template", "POST", llamacpp.apply_template, llamacpp.error),
    Entry("/props", "GET", llamacpp.props, llamacpp.error),
    Entry("/health", "GET", llamacpp.health, llamacpp.error),
    Entry("/api/generate", "POST", ollama.generate, ollama.error),
    Entry("/api/chat", "POST", ollama.chat_messages, ollama.error),
    Entry("/api/tags", "GET", ollama.tags, ollama.error),
    Entry("/api/show", "POST", ollama.show, ollama.error),
    Entry("/api/version", "GET", ollama.version, ollama.error),
)
PATHS = frozenset(entry.path for entry in ENTRIES) | {"/", "/about.json", "/metrics"}


def error_form(path: str) -> ErrorForm:
    """Return the form that the clients of a path read errors in."""
    return ollama.error if path.startswith("/api/") else openai.error


def make_app(served: Served, host: str, api_key: str | None, public_name: str | None = None) -> Guard:
    """Return the ASGI app that serves a model at an address, and under a name that a proxy has."""
    routes = [Route(entry.path, Endpoint(served, entry), methods=[entry.method]) for entry in ENTRIES]
    page = PAGE.read_text(encoding="utf-8")
    routes += [
        Route("/", partial(_page, page, page_rules(page))),
        Route("/about.json", partial(_about, served)),
        Route("/metrics", partial(_metrics, served)),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _no_route})
    app.router.redirect_slashes = False
    return Guard(app, host, api_key, served.metrics, PATHS, error_form, public_name)


class Endpoint:
    """Answers one path: reads the request, calls its function, and sends what that returns."""

    def __init__(self, served: Served, entry: Entry):
        self._served, self._entry = served, entry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._read_and_answer(scope, receive, send)
        except Gone:
            self._served.metrics.n_left += 1

    async def _read_and_answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        try:
            if self._entry.method == "POST":
                require_json(scope)
                body = await read_body(scope, receive, self._served.limits)
        except BadRequest as e:
            await refuse(receive, send, e.status, self._entry.error(e, e.status))
            return
        try:
            fields = Fields(dict(scope["path_params"])) if self._entry.method == "GET" else parse(body)
        except BadRequest as e:
            await send_json(send, e.status, self._entry.error(e, e.status))
            return
        if self._served.log_prompts:  # in ASCII, as a terminal obeys control characters
            print(f"{ascii(scope['path'])[1:-1]}: {fields.as_json()}", file=sys.stderr, flush=True)
        await unless_gone(receive, self._answer(fields, send))

    async def _answer(self, fields: Fields, send: Send) -> None:
        form = self._entry.error
        try:
            reply = await self._entry.handler(self._served, fields)
            if isinstance(reply, Stream):
                with reply.answers:
                    await _send_stream(send, reply, form)
                return
        except Busy as e:
            wait = str(math.ceil(e.retry_after_s)).encode()
            await send_json(send, 503, form(e, 503), [(b"retry-after", wait)])
        except GenerationFailed as e:
            await send_json(send, 500, form(e, 500))
        except KindlingError as e:
            status = e.status if isinstance(e, BadRequest) else 400
            await send_json(send, status, form(e, status))
        except Exception as e:
            _report(e)
            await send_json(send, 500, form(KindlingError("the server has failed; see what it printed"), 500))
        else:
            await send_json(send, 200, reply)


async def _send_stream(send: Send, stream: Stream, form: ErrorForm) -> None:
    """Send a stream. An error before its first chunk is raised; a later one is its last chunk."""
    await stream.answers.wait_for_first()  # some begin with a chunk that says nothing yet
    async with aclosing(stream.chunks) as chunks:
        first = await anext(chunks)
        headers = [(b"content-type", stream.media_type.encode()), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": first.encode(), "more_body": True})
        try:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk.encode(), "more_body": True})
        except (GenerationFailed, Busy) as e:
            status = 503 if isinstance(e, Busy) else 500
            await send(
                {"type": "http.response.body", "body": stream.failure(form(e, status)).encode(), "more_body": True}
            )
        await send({"type": "http.response.body", "body": b""})


def _report(e: Exception) -> None:
    """Print where an unforeseen error came from, but not its text, which may hold a prompt."""
    where = "".join(traceback.format_tb(e.__traceback__))
    print(f"error: {type(e).__name__} while a request was answered\n{where}", file=sys.stderr, flush=True)


async def _no_route(request: Request, e: Exception) -> Response:
    """Answer a path that does not exist, or a method that it does not take."""
    assert isinstance(e, HTTPException)
    must = "is none of this server's" if e.status_code == 404 else "does not take this method"
    content = error_form(request.url.path)(KindlingError(f"the path {must}; see docs/serving.md"), e.status_code)
    return JSONResponse(content, e.status_code, headers=e.headers)


def page_rules(page: str) -> str:
    """Return the page's Content-Security-Policy: its own script and style, no other host, and no text that becomes HTML."""
    own = {}
    for tag in ("script", "style"):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        own[tag] = f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"
    return (
        f"default-src 'none'; script-src {own['script']}; style-src {own['style']}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


async def _page(page: str, rules: str, request: Request) -> Response:
    headers = {"content-security-policy": rules, "cache-control": "no-cache"}
    return Response(page, media_type="text/html", headers=headers)


async def _about(served: Served, request: Request) -> Response:
    """Answer what the page shows of the model."""
    sampling, limits = served.sampling, served.limits
    return JSONResponse(
        {
            "name": served.name,
            "context": served.block_size,
            "can": {"complete": True, "infill": served.can_infill, "chat": served.template is not None},
            "remembers": served.remembers,
            "sampling": {
                name: getattr(sampling, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")
            },
            "limits": {"max_new_tokens": limits.max_new_tokens, "n": limits.n, "logprobs": limits.logprobs},
            "min_confidence": served.min_confidence,
            **served.about,
        }
    )


async def _metrics(served: Served, request: Request) -> Response:
    return Response(served.metrics.text(served.scheduler.counters), media_type="text/plain; version=0.0.4")

"""What the server refuses before it reads a request: pure ASGI, around the whole app.

- A Host header with a foreign name, which a page of another site can make a browser send (DNS rebinding).
- Requests that a page of another site sends (Origin, Sec-Fetch-Site). No answer carries CORS headers.
- Requests without the key, if there is one.

Bodies that are too large or come too slowly are refused where they are read (`read_body`), connections in connections.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import re
import socket
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from kindling.errors import KindlingError
from kindling.serving.body import BadRequest
from kindling.serving.metrics import Metrics
from kindling.serving.served_model import Limits

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
ErrorForm = Callable[[Exception, int], dict[str, Any]]

NAME = re.compile(r"[a-z0-9_.-]+(:\d{1,5})?|\[[0-9a-f:.]+\](:\d{1,5})?")
REST_S, QUIET_S = 3.0, 0.5  # how long the rest of a refused request is read, and without any news
OPEN_PATHS = ("/", "/health")  # need no key: they say nothing that was asked or answered
SLICE = 10_000  # items of a list that are written as JSON at once
NO_SNIFFING = (b"x-content-type-options", b"nosniff")  # an answer is never a page or a script, whatever it looks like
ONCE = (b"host", b"origin", b"sec-fetch-site")
LOCAL = ("localhost", "127.0.0.1", "::1")


class Gone(Exception):
    """The client closed its connection."""


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server that is bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_key(host: str, api_key: str | None, public_name: str | None = None) -> None:
    """Raise KindlingError if others could use the server without a key, or for a key or a name that no header can hold."""
    if api_key is None and not is_loopback(host):
        raise KindlingError(
            f"--host must be of this machine alone without --api-key, but is {host}; give a key, or leave out --host"
        )
    if public_name is not None and not NAME.fullmatch(public_name.lower()):
        raise KindlingError(
            f"--public-name must be a name, or NAME:PORT, but is {public_name!a}; leave out https:// and the path"
        )
    if public_name is not None and api_key is None:
        raise KindlingError(
            "--public-name must come with --api-key, as others reach the server then, but does not; give a key"
        )
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise KindlingError("--api-key must be printable ASCII without spaces around it, but is not; choose another")


def host_of(header: str) -> str | None:
    """Return the host of a Host header or of an origin, in lower case and without its port; None if it is malformed."""
    host, colon, port = header.strip().lower().rpartition(":")
    if not colon or port.endswith("]"):
        host, port = header.strip().lower(), ""
    if port and not port.isdigit():
        return None
    if host.startswith("[") and host.endswith("]"):
        return host[1:-1]
    return None if ":" in host or not host else host


class Guard:
    """Lets through what may be answered, counts every answer, and refuses the rest."""

    def __init__(
        self,
        app: App,
        host: str,
        api_key: str | None,
        metrics: Metrics,
        paths: Collection[str],
        form: Callable[[str], ErrorForm],
        public_name: str | None = None,
    ):
        """`paths` are those of the app, for labels; `form` gives the form of an error by its path.

        `public_name` is what others call the server where a proxy stands before it.
        """
        self._app, self._key, self._metrics, self._paths, self._form = app, api_key, metrics, paths, form
        self._is_local = is_loopback(host)
        self._names = {*LOCAL, host.lower()}
        if not self._is_local:
            self._names.add(socket.gethostname().lower())
        self._origins: set[str] = set()
        if public_name is not None:
            self._names.add(host_of(public_name) or "")
            self._origins = {f"http://{public_name.lower()}", f"https://{public_name.lower()}"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path, status = scope["path"], 0

        async def counted(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), NO_SNIFFING]}
            await send(message)

        self._metrics.n_open += 1
        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self._app(scope, receive, counted)
            else:
                await refuse(receive, counted, refusal.status, self._form(path)(refusal, refusal.status))
        finally:
            self._metrics.n_open -= 1
            if status:
                label = path if path in self._paths else "other"
                self._metrics.requests[label, status] += 1

    def _refusal(self, scope: Scope) -> BadRequest | None:
        """Return why a request is refused, or None."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        names = [name for name, _ in scope["headers"]]
        for name in ONCE:
            if names.count(name) > 1:
                return BadRequest(f"the header {name.decode().title()} must come once, but comes again", None, 403)
        host = host_of(headers.get(b"host", ""))
        if host is None or not self._is_own(host):
            return BadRequest(
                "the Host header must name this server, but does not; use the address that it printed", None, 403
            )
        origin, own = headers.get(b"origin"), headers[b"host"]
        is_foreign = origin is not None and origin not in {f"http://{own}", f"https://{own}", *self._origins}
        if scope["method"] not in ("GET", "HEAD") and (is_foreign or headers.get(b"sec-fetch-site") == "cross-site"):
            return BadRequest("a request must not come from a page of another site, but does", None, 403)
        if self._key is not None and scope["path"] not in OPEN_PATHS:
            kind, _, key = headers.get(b"authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._key.encode()):
                return BadRequest(
                    "a request must have the header `Authorization: Bearer KEY` with the server's key, but has not",
                    None,
                    401,
                )
        return None

    def _is_own(self, host: str) -> bool:
        if host in self._names:
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        return address.is_loopback or not self._is_local  # rebinding needs a name; an address is what it says


async def read_body(scope: Scope, receive: Receive, limits: Limits) -> bytes:
    """Return the body of a request. Raises BadRequest if it is too large or too slow, and Gone."""
    too_large = BadRequest(
        f"the body must have at most {limits.body_bytes:,} bytes, but has more; send less text", None, 413
    )
    length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    if not length.isdigit() or int(length[:20]) > limits.body_bytes:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.body_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limits.body_bytes:
                    raise too_large
                if not message.get("more_body"):
                    return b"".join(parts)
    except TimeoutError:
        raise BadRequest(
            f"the body must arrive within {limits.body_s:g} s, but did not; send it faster", None, 408
        ) from None


def require_json(scope: Scope) -> None:
    """Raise BadRequest for a body of a browser that says it is something else than JSON.

    A browser may send such a body for a page of another site without asking first. `curl -d` calls its body a form.
    """
    headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
    kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
    is_browser = b"origin" in headers or b"sec-fetch-site" in headers
    if is_browser and kind and kind != "application/json" and not kind.endswith("+json"):
        raise BadRequest("Content-Type must be application/json, but is another; send that header", None, 415)


async def unless_gone(receive: Receive, work: Any) -> None:
    """Await a coroutine, and cancel it as soon as the client has gone. Raises Gone then."""

    async def leaves() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(leaves())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


def _is_long(content: Any) -> bool:
    return isinstance(content, dict) and any(
        isinstance(value, list) and len(value) > SLICE for value in content.values()
    )


def dumped(content: Any) -> bytes:
    """Return JSON. A long list in an object is written in slices, as no other thread can run while one is written."""
    if not _is_long(content):
        return json.dumps(content).encode()
    fields = []
    for name, value in content.items():
        if isinstance(value, list) and len(value) > SLICE:
            slices = (json.dumps(value[i : i + SLICE])[1:-1] for i in range(0, len(value), SLICE))
            fields.append(f"{json.dumps(name)}: [{', '.join(slices)}]")
        else:
            fields.append(f"{json.dumps(name)}: {json.dumps(value)}")
    return f"{{{', '.join(fields)}}}".encode()


async def refuse(receive: Receive, send: Send, status: int, content: Any) -> None:
    """Answer a request whose body was not read, and close the connection.

    The rest of the body is read for a moment and thrown away: a client that is still sending would not see the answer.
    """

    async def sends(message: MutableMapping[str, Any]) -> None:
        await send({**message, "more_body": True} if message["type"] == "http.response.body" else message)

    await send_json(sends, status, content, [(b"connection", b"close")])
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(REST_S):
            message: MutableMapping[str, Any] = {"more_body": True}
            while message.get("more_body"):  # none when the client has gone
                message = await asyncio.wait_for(receive(), QUIET_S)
    await send({"type": "http.response.body", "body": b""})


async def send_json(send: Send, status: int, content: Any, headers: Collection[tuple[bytes, bytes]] = ()) -> None:
    """Send an answer as JSON."""
    body = await asyncio.to_thread(dumped, content) if _is_long(content) else dumped(content)
    lines = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
    lines += [(b"www-authenticate", b"Bearer")] if status == 401 else []
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body})

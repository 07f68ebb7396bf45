"""The server's process: its socket, uvicorn with the limits of this package, and how Ctrl-C ends it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import socket
from collections.abc import Iterator

import uvicorn

from kindling.errors import KindlingError
from kindling.serving.app import make_app
from kindling.serving.connections import guarded
from kindling.serving.served_model import Served
from kindling.stopping import StopRequest

IDLE_S = 60  # a connection without a request is kept as long: editors ask again soon
STOPPING = "finishing what is being written; once more to stop at once"


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address; port 0 is any free one. Raises KindlingError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.create_server((host, port), family=family, backlog=512)
    except OverflowError:
        raise KindlingError(f"--port must be from 0 to 65535, but is {port}; choose another") from None
    except OSError as e:
        if e.errno == errno.EADDRINUSE:
            raise KindlingError(
                f"--port must be free, but {port} is in use; stop what listens there, or give --port 0 for any free one"
            ) from None
        raise KindlingError(
            f"--host and --port must be an address of this machine, but {host}:{port} is not ({e.strerror}); choose another"
        ) from None
    # asyncio sends small pieces at once only where a socket names its protocol; otherwise each waits for the client's
    # acknowledgement, up to 40 ms
    return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=sock.detach())


def address_of(sock: socket.socket, host: str) -> str:
    """Return the address of a server for a browser on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"


class _Server(uvicorn.Server):
    """uvicorn's server, which a StopRequest ends instead of uvicorn's own signal handlers."""

    def __init__(self, config: uvicorn.Config, stop: StopRequest):
        super().__init__(config)
        self._stop = stop

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._stop.signal is not None


def make_server(
    served: Served, host: str, api_key: str | None, stop: StopRequest, public_name: str | None = None
) -> uvicorn.Server:
    """Return the server of a model; `serve(sockets=[...])` runs it."""
    for name in ("uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)  # what comes in is counted, not printed
    config = uvicorn.Config(
        make_app(served, host, api_key, public_name),
        http=guarded(served.limits, served.metrics),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=max(1, round(served.limits.time_s)),
    )
    return _Server(config, stop)


def run(served: Served, sock: socket.socket, host: str, api_key: str | None, public_name: str | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM, then finish what is being written. Return the exit code."""
    gc.collect()
    gc.freeze()  # what is there now stays; looking through all of it would hold up an answer for tens of milliseconds
    with StopRequest(STOPPING) as stop:
        asyncio.run(make_server(served, host, api_key, stop, public_name).serve(sockets=[sock]))
    served.scheduler.close(1.0)
    return stop.exit_code

"""Limits on connections that HTTP itself has no word for.

How many there are, how long a request's headers may take, and how long a client may read nothing of its answer.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from kindling.serving.metrics import Metrics
from kindling.serving.served_model import Limits

REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%s"
)
TOO_MANY = b'{"error": {"message": "the server has as many connections as it takes; ask again in 1 s", "code": 503}}'
STOPPING_S = 1.0  # as `body_s`, for what a client reads while the server stops


class Guarded(H11Protocol):
    """A connection with limits; `guarded` sets them."""

    _limits: Limits
    _metrics: Metrics
    _timer: asyncio.TimerHandle | None = None
    _refused = False
    _look_s: float
    _looks: asyncio.TimerHandle | None = None
    _n_unread = 0  # bytes of the answer that the client had not taken at the last look

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._look()
        if len(self.connections) > self._limits.connections:
            self._refused = True
            self._metrics.refused["connections"] += 1
            transport.write(REFUSAL % (len(TOO_MANY), TOO_MANY))
            transport.close()
        else:
            self._wait()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()  # the headers are whole
        elif self._timer is None:
            self._wait()  # for the rest of the next request's headers

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        if self._looks is not None:
            self._looks.cancel()
        super().connection_lost(exc)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._n_unread = 0  # it has read; what waits next is new

    def shutdown(self) -> None:
        super().shutdown()
        self._look_s, self._n_unread = min(self._look_s, STOPPING_S), 0
        self._look()

    def send_400_response(self, msg: str) -> None:
        self._metrics.refused["not HTTP"] += 1
        super().send_400_response(msg)

    def _wait(self) -> None:
        self._timer = self.loop.call_later(self._limits.body_s, self._too_slow)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """Close the connection if the client has read nothing since the last look; otherwise look again later."""
        if self._looks is not None:
            self._looks.cancel()
        # nothing is added to what waits in a transport that is full or that closes
        waits = self.flow.write_paused or self.transport.is_closing()
        n_unread = self.transport.get_write_buffer_size() if waits else 0
        if 0 < self._n_unread <= n_unread:
            self.transport.abort()
            return
        self._n_unread = n_unread
        self._looks = self.loop.call_later(self._look_s, self._look)

    def _too_slow(self) -> None:
        self._timer = None
        if self.cycle is None or self.cycle.response_complete:
            self._metrics.refused["slow"] += 1
            self.transport.close()


def guarded(limits: Limits, metrics: Metrics) -> type[H11Protocol]:
    """Return uvicorn's protocol with these limits."""
    return type("Guarded", (Guarded,), {"_limits": limits, "_metrics": metrics, "_look_s": limits.body_s})

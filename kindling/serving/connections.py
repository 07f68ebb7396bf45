"""Limits on connections that HTTP itself has no word for: how many there are, and how long a request's headers may take."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from kindling.serving.metrics import Metrics
from kindling.serving.served import Limits

REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%s"
)
TOO_MANY = b'{"error": {"message": "the server has as many connections as it takes; ask again in 1 s", "code": 503}}'


def guarded(limits: Limits, metrics: Metrics) -> type[H11Protocol]:
    """Return uvicorn's protocol with these limits."""

    class Guarded(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _refused = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                self._refused = True
                metrics.refused["connections"] += 1
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
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            metrics.refused["not HTTP"] += 1
            super().send_400_response(msg)

        def _wait(self) -> None:
            self._timer = self.loop.call_later(limits.body_s, self._too_slow)

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _too_slow(self) -> None:
            self._timer = None
            if self.cycle is None or self.cycle.response_complete:
                metrics.refused["slow"] += 1
                self.transport.close()

    return Guarded

"""The generations that answer one request, from the scheduler's thread to the server's event loop.

    with Answers(served, prompts) as answers:
        async for number, event in answers: ...

Leaving the block cancels what is not finished, so a client that has gone costs nothing more.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from kindling.errors import KindlingError
from kindling.serving.generation import Done, Event, Failed, Piece, Refused, Token
from kindling.serving.scheduler import Busy
from kindling.serving.served_model import Prompt, Served

SSE = "text/event-stream"
Events = asyncio.Queue[tuple[int, Event]]


class GenerationFailed(KindlingError):
    """The model could not generate an answer."""


class _Mail:
    """What the scheduler's thread says to the clients of an event loop, which is woken once for all that is said together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[tuple[Events, tuple[int, Event]]] = []

    def put(self, loop: asyncio.AbstractEventLoop, queue: Events, item: tuple[int, Event]) -> None:
        """Put an item in a queue of the loop, from another thread."""
        with self._lock:
            self._waiting.append((queue, item))
            is_first = len(self._waiting) == 1
        if is_first:
            try:
                loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop has been closed
                self._take()

    def _take(self) -> list[tuple[Events, tuple[int, Event]]]:
        with self._lock:
            taken, self._waiting = self._waiting, []
        return taken

    def _deliver(self) -> None:
        for queue, item in self._take():
            queue.put_nowait(item)


_mail_of: WeakKeyDictionary[asyncio.AbstractEventLoop, _Mail] = WeakKeyDictionary()


class Answers:
    """Some generations in progress."""

    def __init__(self, served: Served, prompts: Sequence[Prompt]):
        """Submit all of them. Raises Busy, and then none runs."""
        self._loop, self._events = asyncio.get_running_loop(), Events()
        self._left = len(prompts)
        self._next: tuple[int, Piece | Done] | None = None
        self.truncated = any(prompt.truncated for prompt in prompts)
        self.submitted = time.perf_counter()
        self.first: float | None = None
        """When the first event came."""
        self._cancels: list[Any] = []
        try:
            for number, prompt in enumerate(prompts):
                self._cancels.append(served.scheduler.submit(prompt.generation, self._saying(number)))
        except BaseException:
            self.cancel()
            raise

    def _saying(self, number: int) -> Any:
        mail = _mail_of.setdefault(self._loop, _Mail())

        def say(event: Event) -> None:
            mail.put(self._loop, self._events, (number, event))

        return say

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *error: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """End what is still running."""
        for cancel in self._cancels:
            cancel()

    async def wait_for_first(self) -> None:
        """Wait until there is something to send. Raises Busy and GenerationFailed, which then are still a status of their own."""
        self._next = await self._get()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece | Done]]:
        """Yield each event with the number of its generation. Raises Busy and GenerationFailed."""
        while self._left:
            number, event = self._next or await self._get()
            self._next = None
            self._left -= isinstance(event, Done)
            yield number, event

    async def _get(self) -> tuple[int, Piece | Done]:
        number, event = await self._events.get()
        if self.first is None:
            self.first = time.perf_counter()
        if isinstance(event, Failed):
            raise GenerationFailed(event.reason)
        if isinstance(event, Refused):
            raise Busy(event.retry_after_s, event.reason)
        return number, event

    @property
    def prompt_s(self) -> float:
        """Seconds from the request to the first event."""
        return (self.first or time.perf_counter()) - self.submitted

    @property
    def predicted_s(self) -> float:
        """Seconds since the first event."""
        return time.perf_counter() - (self.first or time.perf_counter())


@dataclass
class Whole:
    """All of one answer."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    done: Done = field(default_factory=lambda: Done("limit", 0, 0, 0))


async def collect(answers: Answers, n: int) -> list[Whole]:
    """Return the answers to `n` generations, once all are finished. Raises Busy and GenerationFailed."""
    wholes = [Whole() for _ in range(n)]
    async for number, event in answers:
        if isinstance(event, Done):
            wholes[number].done = event
        else:
            wholes[number].text += event.text
            wholes[number].tokens += event.tokens
    return wholes


@dataclass(frozen=True)
class Stream:
    """A reply that is sent while it is generated."""

    answers: Answers
    chunks: AsyncGenerator[str]
    media_type: str = SSE

    def failure(self, content: Any) -> str:
        """Return the chunk for an error in the midst of the stream."""
        return sse(content) if self.media_type == SSE else json.dumps(content) + "\n"


Reply = Any | Stream
"""What is sent as JSON, or a stream."""


def sse(content: Any) -> str:
    """Return an event of a stream of server-sent events."""
    return f"data: {content if isinstance(content, str) else json.dumps(content)}\n\n"

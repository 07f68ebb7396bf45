"""A server on a free port of this machine, in a thread of the tests, and plain sockets to talk to it."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple

from fake_engine import EOS, FakeEngine, FakeVocabulary

from kindling.errors import KindlingError
from kindling.serving.scheduler import Scheduler
from kindling.serving.served_model import Served
from kindling.serving.server import bind, make_server
from kindling.tokenization.infilling import FimIds

FIM = FimIds(prefix=1, middle=2, suffix=3, pad=4)


class Vocabulary(FakeVocabulary):
    """Characters of ASCII, of which the first are the end of text and the control tokens of fill-in-the-middle."""

    fim = FIM
    spellings: Sequence[str] = ["" if i < 5 else chr(i) for i in range(128)]

    def encode(self, text: str) -> list[int]:
        if not text.isascii():
            raise KindlingError("the text must be ASCII, but is not; use other letters")
        return [max(5, ord(c)) for c in text]


class PlainVocabulary(Vocabulary):
    """The same of a model that was never trained to fill in the middle."""

    fim = None


def tells(prompt: str) -> str:
    """Write `pass` after a prompt of fill-in-the-middle, then its end; otherwise digits, and the end after 9."""
    if prompt.startswith(chr(FIM.prefix)):
        written = prompt.rpartition(":")[2]
        return "pass"[len(written)] if len(written) < 4 else ""
    digit = prompt[-1]
    return "" if digit == "9" else str(int(digit) + 1) if digit.isdigit() else "0"


def served(
    follows: Callable[[str], str] = tells,
    vocabulary: FakeVocabulary | None = None,
    block_size: int = 256,
    max_queue: int = 64,
    n_rows: int = 4,
    **more,
) -> Served:
    vocabulary = vocabulary or Vocabulary()
    engine = FakeEngine(follows, n_rows=n_rows, block_size=block_size)
    engine.sure = 30.0  # so that sampling takes nothing else
    about = {"parameters": 1_234_567, "shape": {"n_layer": 1}, "precision": "int8", "source": "fake"}
    scheduler = Scheduler(engine, vocabulary, max_queue)
    return Served("fake", vocabulary, scheduler, block_size, about=about, **more)


class Running(NamedTuple):
    url: str
    port: int
    served: Served
    stop: SimpleNamespace

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Send a request with its body as JSON, or as it is if it is bytes; return status, headers and body."""
        raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        lines = {"Host": f"127.0.0.1:{self.port}", "Content-Length": str(len(raw)), "Connection": "close"}
        lines |= {"Content-Type": "application/json"} if method == "POST" else {}
        lines |= {name.replace("_", "-").title(): value for name, value in headers.items()}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value)
        return self.send(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + raw)

    def send(self, raw: bytes) -> tuple[int, dict[str, str], bytes]:
        """Send bytes as they are; return the answer. Its status is 0 if the server closed the connection without one."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as sock:
            sock.sendall(raw)
            return read_answer(sock)

    def post(self, path: str, **fields) -> dict:
        """Return the JSON that answers a good request."""
        status, _, raw = self.ask("POST", path, fields)
        assert status == 200, raw
        return json.loads(raw)


def read_answer(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Read an answer to the end of its connection."""
    raw = b""
    try:
        while more := sock.recv(2**16):
            raw += more
    except ConnectionResetError:
        pass
    head, _, body = raw.partition(b"\r\n\r\n")
    if not head:
        return 0, {}, b""
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = b"".join(chunks_of(body))
    return int(first.split()[1]), headers, body


def chunks_of(body: bytes) -> Iterator[bytes]:
    while body:
        size, _, rest = body.partition(b"\r\n")
        yield rest[: int(size, 16)]
        body = rest[int(size, 16) + 2 :]


@contextmanager
def running(
    model: Served, host: str = "127.0.0.1", api_key: str | None = None, public_name: str | None = None
) -> Iterator[Running]:
    sock, stop = bind("127.0.0.1", 0), SimpleNamespace(signal=None)
    port = sock.getsockname()[1]
    server = make_server(model, host, api_key, stop, public_name)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])))
    thread.start()
    try:
        yield Running(f"http://127.0.0.1:{port}", port, model, stop)
    finally:
        stop.signal = 2
        thread.join(20)
        model.scheduler.close(1.0)
    assert not thread.is_alive()


def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds, for a few seconds at most."""
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end, "it never held"
        time.sleep(0.005)


__all__ = [
    "EOS",
    "FIM",
    "PlainVocabulary",
    "Running",
    "Vocabulary",
    "read_answer",
    "running",
    "served",
    "tells",
    "until",
]

"""Broken requests for serving.py: what a server gets from faulty clients, scanners and networks.

for name, send in KINDS.items():
    status = send(random.Random(0), port)     # of the answer; 0 if the connection was closed without one

Slow senders take seconds each, so many of them are kept open beside the others (`Slow`).
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

TIMEOUT_S = 30.0
MANY_BYTES = 2_200_000  # above the server's limit of 2 MiB
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/fim/completions", "/infill", "/completion", "/api/generate",
         "/api/chat", "/tokenize", "/detokenize")  # fmt: skip
WRONG: tuple[Any, ...] = (-1, 0, 1.5, 1e300, 2**70, True, "5", "x" * 5000, [], [[]], [None], {}, {"a": [1]}, "\ud800",
                          ["a"] * 40, [10**9])  # fmt: skip
FIELDS = ("prompt", "max_tokens", "temperature", "top_p", "n", "seed", "stop", "logprobs", "suffix", "echo", "messages",
          "input_prefix", "n_predict", "content", "tokens", "options", "stream_options", "min_p", "top_k")  # fmt: skip
Random = random.Random


def head(path: str, *lines: str, method: str = "POST") -> bytes:
    """Return the lines before a body."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *lines, "", ""]).encode("latin-1")


def request(body: bytes, path: str = "/v1/completions") -> bytes:
    """Return a whole request."""
    return head(path, f"Content-Length: {len(body)}", "Content-Type: application/json", "Connection: close") + body


def good(n: int, **more: Any) -> bytes:
    """Return a request that is answered with `n` tokens."""
    content = {"prompt": "def fib(n):\n    return", "max_tokens": n, "temperature": 0, **more}
    return request(json.dumps(content).encode())


def status_of(port: int, raw: bytes, ends: bool = False) -> int:
    """Send bytes, and return the status of the answer, read to its end; 0 if there is none. `ends`: nothing more is sent."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as sock, contextlib.suppress(ConnectionError):
        with contextlib.suppress(OSError):  # of a server that has answered, and reads no more
            sock.sendall(raw)
            if ends:
                sock.shutdown(socket.SHUT_WR)
        while more := sock.recv(2**16):
            answer = answer or more
            if answer.startswith(b"HTTP/1.1 4") and not ends:
                with contextlib.suppress(OSError):  # it may have closed the connection by now
                    sock.shutdown(socket.SHUT_WR)  # or the server waits for the next request
                ends = True
    return int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def gone(port: int, raw: bytes, waits: bool, resets: bool) -> int:
    """Send bytes and leave, after the first of the answer has come if `waits`, with a reset if `resets`."""
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as sock:
        sock.sendall(raw)
        if waits:
            sock.recv(100)
        if resets:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return 0


def _wrong_value(rng: Random) -> bytes:
    fields = {"prompt": "1", rng.choice(FIELDS): rng.choice(WRONG), rng.choice(FIELDS): rng.choice(WRONG)}
    return request(json.dumps({"max_tokens": 2, "n_predict": 2, **fields}).encode(), rng.choice(PATHS))


def _scrambled(rng: Random) -> bytes:
    body = bytearray(json.dumps({"prompt": "def f():", "max_tokens": 2, "stop": ["\n"], "temperature": 0.5}).encode())
    for _ in range(rng.randint(1, 6)):
        body[rng.randrange(len(body))] = rng.randrange(256)
    return request(bytes(body))


def _body(text: bytes) -> Callable[[Random], bytes]:
    return lambda rng: request(text, rng.choice(PATHS))


def _sent(make: Callable[[Random], bytes], ends: bool = False) -> Callable[[Random, int], int]:
    return lambda rng, port: status_of(port, make(rng), ends)


def _cut(rng: Random, port: int) -> int:
    raw = good(2)
    return gone(port, raw[: rng.randrange(1, len(raw))], waits=False, resets=rng.random() < 0.5)


KINDS: dict[str, Callable[[Random, int], int]] = {
    "random bytes": _sent(lambda rng: rng.randbytes(rng.randint(1, 3000)), ends=True),
    "random bytes as a body": _sent(lambda rng: request(rng.randbytes(rng.randint(1, 3000)), rng.choice(PATHS))),
    "no body": _sent(_body(b"")),
    "JSON that is cut off": _sent(_body(b'{"prompt": "a", "max_tok')),
    "JSON that is no object": _sent(lambda rng: request(rng.choice([b"[1]", b'"a"', b"null", b"7", b"{} {}"]))),
    "JSON of 9,000 levels": _sent(_body(b'{"prompt": ' + b"[" * 9000 + b"]" * 9000 + b"}")),
    "objects of 3,000 levels": _sent(_body(b'{"a":' * 3000 + b"1" + b"}" * 3000)),
    "a wrong type or range": _sent(_wrong_value),
    "changed bytes": _sent(_scrambled),
    "NaN and infinity": _sent(_body(b'{"prompt": "a", "temperature": NaN, "top_p": -Infinity}')),
    "a number that overflows": _sent(_body(b'{"prompt": "a", "temperature": 1e999}')),
    "a number of 5,000 digits": _sent(_body(b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}")),
    "bad UTF-8": _sent(_body(b'{"prompt": "\xff\xfe\xc0"}')),
    "half of a surrogate pair": _sent(lambda rng: request(b'{"prompt": "\\ud800"}')),
    "a body above the limit": _sent(_body(b'{"prompt": "' + b"a" * MANY_BYTES + b'"}')),
    "a length above the limit": _sent(lambda rng: head("/v1/completions", f"Content-Length: {10 ** rng.randint(8, 30)}")),
    "a length that is no number": _sent(lambda rng: head("/v1/completions", "Content-Length: -5")),
    "two lengths": _sent(lambda rng: head("/v1/completions", "Content-Length: 2", "Content-Length: 3") + b"{}"),
    "a broken chunk": _sent(lambda rng: head("/infill", "Transfer-Encoding: chunked") + b"zz\r\n", ends=True),
    "chunks above the limit": _sent(
        lambda rng: head("/infill", "Transfer-Encoding: chunked") + b"8000\r\n" + (b"a" * 0x8000 + b"\r\n8000\r\n") * 70,
        ends=True,
    ),
    "headers above the limit": _sent(lambda rng: head("/health", "X: " + "a" * 100_000, method="GET")[:-4]),
    "a foreign host": _sent(lambda rng: b"GET /props HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n"),
    "a page of another site": _sent(lambda rng: head("/infill", "Origin: https://evil.example", "Content-Length: 2") + b"{}"),
    "another type of body": _sent(lambda rng: head("/infill", "Content-Type: text/xml", "Content-Length: 2") + b"{}"),
    "an unknown path": _sent(lambda rng: head(f"/{rng.randrange(10**9)}", "Connection: close", method="GET")),
    "an unknown method": _sent(lambda rng: head("/infill", "Connection: close", method=rng.choice(["PUT", "BREW", "OPTIONS"]))),
    "cut off at any byte": _cut,
    "gone at once": lambda rng, port: gone(port, good(200), waits=False, resets=rng.random() < 0.5),
    "gone mid-stream": lambda rng, port: gone(port, good(200, stream=True), waits=True, resets=rng.random() < 0.5),
    "a prompt of 300,000 characters": _sent(
        lambda rng: request(json.dumps({"prompt": "ab = 1\n" * 43_000, "max_tokens": 1}).encode())
    ),
}  # fmt: skip


class Slow:
    """Connections that send a byte now and then, and nothing, until the server closes them."""

    PIECE_S = 0.5

    def __init__(self, port: int):
        self._port = port
        self._open: list[tuple[socket.socket, Iterator[int]]] = []
        self._next = time.monotonic()
        self.n_begun = 0
        self.statuses: list[int] = []
        """Of the answers to those that were closed; 0 without one."""

    def begin(self, rng: Random) -> None:
        """Open a connection that sends its headers, its body or nothing slowly."""
        sock = socket.create_connection(("127.0.0.1", self._port), timeout=TIMEOUT_S)
        raw = rng.choice([b"", good(1), head("/infill", "Content-Length: 1000") + b" " * 1000])
        at_once = raw[: rng.choice([0, raw.find(b"\r\n\r\n") + 4])]
        sock.sendall(at_once)
        sock.setblocking(False)
        self._open.append((sock, iter(raw[len(at_once) : -1])))
        self.n_begun += 1

    def go_on(self) -> None:
        """Send the next byte of each if it is time, and close those that the server has closed."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self.PIECE_S
        for sock, rest in list(self._open):
            try:
                answer = sock.recv(2**16)
            except BlockingIOError:
                with contextlib.suppress(ConnectionError, StopIteration):
                    sock.sendall(bytes([next(rest)]))
                continue
            except ConnectionError:
                answer = b""
            self._open.remove((sock, rest))
            self.statuses.append(int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else 0)
            sock.close()

    @property
    def n_open(self) -> int:
        """Those that the server has not closed yet."""
        return len(self._open)

    def wait(self, patience_s: float) -> None:
        """Go on until the server has closed all, at most so long; close the rest."""
        end = time.monotonic() + patience_s
        while self._open and time.monotonic() < end:
            self.go_on()
            time.sleep(0.02)
        for sock, _ in self._open:
            sock.close()

"""Requests that are broken in every way that we know: each gets its status, and a good one is answered as before."""

import json
import random
import re
import socket
from dataclasses import replace

import pytest
from http_server import Running, read_answer, running, served, until
from hypothesis import given, settings
from hypothesis import strategies as st

from kindling.serving import safety
from kindling.serving.served_model import Limits

LIMITS = Limits(body_bytes=20_000, body_s=0.3, connections=40, max_new_tokens=32, time_s=10)
POSTS = ("/v1/completions", "/v1/chat/completions", "/v1/fim/completions", "/infill", "/completion", "/tokenize")
POSTS += ("/detokenize", "/apply-template", "/api/generate", "/api/chat", "/api/show", "/beta/completions")


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch, running(served(limits=LIMITS)) as one:
        patch.setattr(safety, "QUIET_S", 0.02)
        yield one


def is_well(server: Running) -> None:
    assert server.post("/v1/completions", prompt="7")["choices"][0]["text"] == "89"


# what is wrong, its body, the status
BODIES = {
    "empty": (b"", 400),
    "random bytes": (random.Random(0).randbytes(500), 400),
    "not JSON": (b"prompt=a", 400),
    "cut off JSON": (b'{"prompt": "a', 400),
    "two values": (b"{} {}", 400),
    "a list": (b"[1]", 400),
    "a text": (b'"prompt"', 400),
    "null": (b"null", 400),
    "deep lists": (b'{"prompt": ' + b"[" * 9000 + b"]" * 9000 + b"}", 400),
    "deep objects": (b'{"a":' * 3000 + b"1" + b"}" * 3000, 400),
    "NaN": (b'{"prompt": "a", "temperature": NaN}', 400),
    "Infinity": (b'{"prompt": "a", "temperature": -Infinity}', 400),
    "a number that overflows": (b'{"prompt": "a", "temperature": 1e999}', 400),
    "a number of 5,000 digits": (b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", 400),
    "a number of 300 digits": (b'{"prompt": "a", "max_tokens": ' + b"9" * 300 + b"}", 400),
    "bad UTF-8": (b'{"prompt": "\xff\xfe"}', 400),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16"), 400),
    "a lone surrogate": (b'{"prompt": "\\ud800"}', 400),
    "a key twice": (b'{"prompt": "a", "prompt": "b"}', 400),
    "a control character": (b'{"prompt": "a\nb"}', 400),
    "too large": (b'{"prompt": "' + b"a" * 30_000 + b'"}', 413),
}


@pytest.mark.parametrize("what", BODIES)
def test_a_broken_body_gets_its_status(server, what):
    body, status = BODIES[what]
    for path in POSTS[:1] if status == 413 else POSTS:
        got, _, raw = server.ask("POST", path, body)
        if what == "a lone surrogate" and path in ("/api/show",):  # it reads no such field
            continue
        assert got == status, (path, raw)
        error = json.loads(raw)["error"]
        message = error if path.startswith("/api/") else error["message"]
        assert message and "\n" not in message and message.isascii()
    is_well(server)


# a path, a field and its wrong values
WRONG = [
    ("/v1/completions", "prompt", [5, True, {}, [None], [[]], [1.5], [-1], [999], ["a", 1], [["a"]], "\ud800", "é"]),
    ("/v1/completions", "max_tokens", [0, -1, 1.5, "5", True, [], 1e300, 2**70]),
    ("/v1/completions", "temperature", [-0.1, 101, "1", True, {}]),
    ("/v1/completions", "top_p", [-1, 1.1, "x"]),
    ("/v1/completions", "n", [0, 17, 10**9, "2", 1.5]),
    ("/v1/completions", "seed", [-1, 2**64, 0.5, "x"]),
    ("/v1/completions", "stop", ["", [""], [1], ["a"] * 17, "a" * 1001, {}, ["\ud800"]]),
    ("/v1/completions", "logprobs", [-1, 21, "1", True]),
    ("/v1/completions", "stream", [1, "true", {}]),
    ("/v1/completions", "echo", [1, "x"]),
    ("/v1/completions", "suffix", [1, [], "\ud800"]),
    ("/v1/completions", "best_of", [2, "x"]),
    ("/v1/completions", "stream_options", [1, [], {"include_usage": 1}]),
    ("/v1/completions", "logit_bias", [{"1": 1}, 5]),
    ("/v1/completions", "model", [1, {}, "\ud800"]),
    ("/v1/completions", "max_lines", [0, "1"]),
    ("/v1/fim/completions", "prompt", [None, 5]),
    ("/v1/fim/completions", "random_seed", [-1, "x"]),
    ("/infill", "input_prefix", [None, 1, []]),
    ("/infill", "input_suffix", [None, 1, []]),
    ("/infill", "prompt", [1, ["a"]]),
    ("/infill", "input_extra", ["a", [1], {}, [{"text": 1}]]),
    ("/infill", "n_predict", [-2, "1", 1.5]),
    ("/infill", "t_max_predict_ms", [-2, "1"]),
    ("/infill", "n_indent", [-1, "1"]),
    ("/infill", "samplers", [5, [1]]),
    ("/infill", "cache_prompt", [1]),
    ("/infill", "response_fields", [5, [1]]),
    ("/completion", "prompt", [None, 5, {}, [], [[]] * 17, [999], [-1], [1.5], [["a", None]]]),
    ("/completion", "repeat_penalty", [0, -1, "1", 101]),
    ("/completion", "grammar", ["root ::= a"]),
    ("/tokenize", "content", [None, 5, []]),
    ("/detokenize", "tokens", [None, "a", [128], [-1], ["1"], [True], [1.5]]),
    ("/api/generate", "options", [5, [], {"temperature": "1"}, {"num_predict": -3}, {"top_k": 1.5}, {"stop": 5}]),
    ("/api/generate", "prompt", [5, ["a"]]),
    ("/api/generate", "raw", ["x"]),
    ("/v1/chat/completions", "messages", [None, 5, [], [5], [{"role": "user"}], [{"role": 5, "content": "a"}]]),
]
GOOD = {"prompt": "1", "input_prefix": "1", "input_suffix": "", "content": "1", "tokens": [49]}


@pytest.mark.parametrize(("path", "field", "values"), WRONG, ids=[f"{path} {field}" for path, field, _ in WRONG])
def test_a_wrong_value_is_a_bad_request_that_names_its_field(server, path, field, values):
    for value in values:
        status, _, raw = server.ask("POST", path, {**GOOD, field: value})
        assert status == 400, (value, raw)
        error = json.loads(raw)["error"]
        assert field in (error if isinstance(error, str) else error["message"]), (value, raw)
    is_well(server)


def test_unknown_fields_are_ignored_and_null_is_left_out(server):
    more = {"user": "me", "stream": None, "max_tokens": None, "stop": None, "something": {"deep": [1, 2]}, "id_slot": 0}
    assert server.post("/v1/completions", prompt="7", **more)["choices"][0]["text"] == "89"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("POST", "/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("OPTIONS", "/v1/completions", 405),
        ("HEAD", "/v1/models", 200),
        ("HEAD", "/", 200),
        ("DELETE", "/api/show", 405),
        ("PUT", "/", 405),
        ("BREW", "/", 405),
        ("POST", "/", 405),
        ("GET", "/v1/models/", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/%00%ff", 404),
        ("GET", "//evil.com/", 404),
        ("GET", "/" + "a" * 5000, 404),
    ],
)
def test_other_paths_and_methods_get_their_status(server, method, path, status):
    got, headers, body = server.ask(method, path)
    assert got == status, body
    assert "access-control-allow-origin" not in headers
    if status >= 400 and method != "HEAD":
        assert json.loads(body)["error"]
    is_well(server)


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("text/plain", 415),
        ("multipart/form-data; boundary=x", 415),
        ("application/json; charset=utf-8", 200),
        ("", 200),
    ],
)
def test_the_type_of_a_body_of_a_browser_must_be_json(server, kind, status):
    for browser in ({"origin": server.url}, {"sec_fetch_site": "same-origin"}):
        assert server.ask("POST", "/v1/completions", {"prompt": "7"}, content_type=kind, **browser)[0] == status


def test_other_clients_may_call_a_body_what_they_like_as_curl_does(server):
    kind = "application/x-www-form-urlencoded"
    assert server.ask("POST", "/api/generate", {"prompt": "7", "stream": False}, content_type=kind)[0] == 200
    assert server.ask("POST", "/api/generate", b"prompt=7", content_type=kind)[0] == 400


@pytest.mark.parametrize(("header", "status"), [("", 413), ("Origin: http://evil.com\r\n", 403)])
def test_a_client_sees_why_it_is_refused_also_while_it_still_sends(server, header, status):
    body = bytes(8_000_000)
    raw = HEAD + f"{header}Content-Length: {len(body)}\r\n\r\n".encode() + body
    assert server.send(raw)[0] == status  # it reads only once all is sent
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:  # without a length, too
        sock.sendall(HEAD + header.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(100):
            sock.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        sock.sendall(b"0\r\n\r\n")
        assert read_answer(sock)[0] == status


def test_a_bad_request_that_was_read_leaves_its_connection_open(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        for _ in range(2):
            sock.sendall(HEAD + b"Content-Length: 3\r\n\r\n[1]")
            raw = b""
            while not raw.endswith(b"}"):
                raw += sock.recv(2**16)
            assert raw.startswith(b"HTTP/1.1 400")


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
RAW = {
    "no HTTP": (b"hello\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), 400),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
    "no host in HTTP/1.0": (b"GET /health HTTP/1.0\r\n\r\n", 403),
    "headers without end": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000, 400),
    "two lengths": (HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
    "a length that is no number": (HEAD + b"Content-Length: x\r\n\r\n{}", 400),
    "a negative length": (HEAD + b"Content-Length: -5\r\n\r\n{}", 400),
    "a huge length": (HEAD + b"Content-Length: 99999999999\r\n\r\n{}", 413),
    "a length of 19 digits": (HEAD + b"Content-Length: 9999999999999999999\r\n\r\n{}", 413),
    "a broken chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 0),
    "large chunks": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"7000\r\n" + b"a" * 0x7000 + b"\r\n", 413),
    "a slow body": (HEAD + b"Content-Length: 99\r\n\r\n{", 408),
    "slow headers": (b"GET /health HTTP/1.1\r\nHost: loc", 0),
    "nothing": (b"", 0),
    "an upgrade": (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: upgrade, close\r\n\r\n",
        200,
    ),
}


@pytest.mark.parametrize("what", RAW)
def test_a_broken_connection_gets_its_status_and_is_closed(server, what):
    raw, status = RAW[what]
    got = server.send(raw)[0]
    assert got in ((status,) if status else (0, 400)), got
    is_well(server)


def test_the_headers_of_a_second_request_have_their_time_too(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert sock.recv(2**16).startswith(b"HTTP/1.1 200")
        sock.sendall(b"GET /health HT")
        sock.settimeout(5)
        while sock.recv(2**16):  # the rest of the first answer; b"" is the end of the connection
            pass
    is_well(server)


def test_a_request_that_comes_in_pieces_is_whole(server):
    body = b'{"prompt": "7"}'
    raw = HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        for i in range(0, len(raw), 7):
            sock.sendall(raw[i : i + 7])
        assert read_answer(sock)[0] == 200


def test_clients_that_cut_off_their_request_leave_nothing(server):
    body = b'{"prompt": "1"}'
    raw = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    for end in range(0, len(raw), 9):
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(raw[:end])
    until(lambda: server.served.metrics.n_open == 0)
    is_well(server)
    assert server.served.metrics.n_left > 0
    assert not any(status >= 500 for _, status in server.served.metrics.requests)


def test_more_connections_than_the_limit_are_refused():
    with running(served(limits=replace(LIMITS, connections=5, body_s=5))) as server:
        sockets = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(5)]
        until(lambda: server.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 503)
        assert server.served.metrics.refused["connections"] >= 1
        for sock in sockets:
            sock.close()
        until(lambda: server.ask("GET", "/health")[0] == 200)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = sorted({field for _, field, _ in WRONG} | {"options", "role", "suffix", "min_p", "n_cmpl", "n_probs", "tools"})
REQUESTS = st.tuples(
    st.sampled_from(POSTS),
    st.dictionaries(st.sampled_from(NAMES), JSON | st.sampled_from(["1", "a", 1, 0.5, True, ["1"]]), max_size=6)
    | st.binary(max_size=60),
)


def ask_anything(server: Running, path: str, body: object) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, _, answer = server.ask("POST", path, raw)
    assert status in (200, 400), (path, raw, answer)
    if status == 400:
        assert json.loads(answer)["error"]
    else:
        assert answer and not re.search(rb"NaN|Infinity", answer)


@given(REQUESTS)
@settings(max_examples=50)
def test_whatever_is_sent_is_answered_or_refused(server, request_):
    ask_anything(server, *request_)


@pytest.mark.slow
@given(REQUESTS)
@settings(max_examples=10_000)
def test_whatever_is_sent_is_answered_or_refused_ten_thousand_times(server, request_):
    ask_anything(server, *request_)


def memory_bytes() -> int:
    with open("/proc/self/status", encoding="ascii") as f:
        return 1024 * int(re.search(r"VmRSS:\s+(\d+)", f.read())[1])


TEN_THOUSAND = 10_000


@pytest.mark.slow
def test_ten_thousand_broken_requests_change_nothing(server):
    rng, kinds = random.Random(1), [*BODIES.values()]
    broken = [raw for raw, status in RAW.values() if status not in (0, 408)]
    before = 0
    for number in range(TEN_THOUSAND):
        kind = number % 4
        if kind == 0:
            body, status = rng.choice(kinds)
            got = server.ask("POST", POSTS[0], body)[0]
            assert got == status
        elif kind == 1:
            path, field, values = rng.choice(WRONG)
            assert server.ask("POST", path, {**GOOD, field: rng.choice(values)})[0] == 400
        elif kind == 2:
            assert server.send(rng.choice(broken))[0] in (0, 200, 400, 403, 413)
        else:
            with socket.create_connection(("127.0.0.1", server.port)) as sock:
                body = b'{"prompt": "1", "stream": true}'
                raw = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
                sock.sendall(raw[: rng.randrange(len(raw) + 1)])
        if number % 500 == 0:
            is_well(server)
        if number == 2000:
            before = memory_bytes()
    until(lambda: server.served.metrics.n_open == 0)
    is_well(server)
    assert memory_bytes() - before < 20e6
    failed = {found for found in server.served.metrics.requests if found[1] >= 500}
    assert failed <= {("/v1/completions", 503)}  # a queue that is full of cut-off requests may refuse one

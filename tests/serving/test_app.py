"""The server's app over real connections, with a model of digits: streams, clients that leave, a full queue, all paths."""

import json
import re
import socket
import threading
from base64 import b64encode
from hashlib import sha256
from time import sleep
from types import SimpleNamespace

import pytest
from http_server import FIM, PlainVocabulary, read_answer, running, served, tells, until
from uvicorn.protocols.http.flow_control import FlowControl

from kindling.data.exported_templates import go_template
from kindling.serving import connections
from kindling.serving.app import ENTRIES
from kindling.serving.metrics import Metrics
from kindling.serving.served_model import Limits


@pytest.fixture(scope="module")
def server():
    with running(served(literal_fim=True)) as one:
        yield one


def events_of(body: bytes) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in body.decode().split("\n\n") if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def test_the_page_says_what_it_may_load_and_the_model_is_described(server):
    status, headers, body = server.ask("GET", "/")
    assert status == 200 and headers["content-type"].startswith("text/html") and body
    rules = headers["content-security-policy"]
    assert "default-src 'none'; script-src 'sha256-" in rules and "unsafe" not in rules
    (script,) = re.findall(b"<script>(.*?)</script>", body, re.DOTALL)
    assert f"script-src 'sha256-{b64encode(sha256(script).digest()).decode()}'; style-src 'sha256-" in rules
    assert not re.search(rb"innerHTML|insertAdjacentHTML|document\.write|\son[a-z]+=", body)
    about = json.loads(server.ask("GET", "/about.json")[2])
    assert about["name"] == "fake" and about["can"] == {"complete": True, "infill": True, "chat": False}
    assert about["parameters"] == 1_234_567 and about["sampling"]["temperature"] == 0.8


def test_text_at_a_cursor_uses_prefix_and_suffix(server):
    fields = {"input_prefix": "def f():\n", "prompt": "    if x:", "input_suffix": "\n    return 1\n"}
    answer = server.post("/infill", **fields, n_predict=16, n_indent=4)
    assert (answer["content"], answer["stop_type"], answer["truncated"]) == ("pass", "eos", False)
    asked = "".join(map(chr, (FIM.prefix, FIM.suffix))) + "\n    return 1\n" + chr(FIM.middle) + "def f():\n    if x:"
    rows = ["".join(map(chr, ids)) for ids in server.served.scheduler._batch._engine.rows]
    assert asked + "pass" in rows  # of a pass, what another test's request has left in the row is no part
    for path, body, read in (
        ("/v1/completions", {"prompt": "if x:", "suffix": "\nend"}, lambda a: a["choices"][0]["text"]),
        ("/beta/completions", {"prompt": "if x:", "suffix": "\nend"}, lambda a: a["choices"][0]["text"]),
        (
            "/v1/fim/completions",
            {"prompt": "if x:", "suffix": "\nend"},
            lambda a: a["choices"][0]["message"]["content"],
        ),
        ("/api/generate", {"prompt": "if x:", "suffix": "\nend", "stream": False}, lambda a: a["response"]),
    ):
        assert read(server.post(path, **body)) == "pass", path


def test_at_the_end_of_a_file_the_text_goes_on(server):
    answer = server.post("/infill", input_prefix="x = 5", input_suffix="\n")
    assert answer["content"] == "6789"


def test_control_tokens_written_in_a_prompt_are_commands_only_where_the_server_was_told_so(server):
    spelled = "<fim_prefix>if x:<fim_suffix>\nend<fim_middle>"
    assert server.post("/v1/completions", prompt=spelled)["choices"][0]["text"] == "pass"
    assert server.post("/completion", prompt=spelled, n_predict=3)["content"] == "012"
    assert server.post("/api/generate", prompt=spelled, raw=True, stream=False)["response"].startswith("012")
    status, _, raw = server.ask("POST", "/v1/completions", {"prompt": spelled.replace("if", "<fim_suffix>")})
    assert status == 400 and b"must have <fim_suffix> once, but has it 2 times" in raw
    assert server.post("/v1/completions", prompt="<fim_prefix>1<fim_middle>", max_tokens=1)["choices"][0]["text"] == "0"
    with running(served()) as other:
        assert other.post("/v1/completions", prompt=spelled, max_tokens=3)["choices"][0]["text"] == "012"


def test_a_model_without_infilling_says_so_where_there_is_a_suffix():
    with running(served(vocabulary=PlainVocabulary())) as server:
        for path, fields in (
            ("/infill", {"input_prefix": "a", "input_suffix": "b"}),
            ("/v1/completions", {"prompt": "a", "suffix": "b"}),
            ("/v1/fim/completions", {"prompt": "a", "suffix": "b"}),
            ("/api/generate", {"prompt": "a", "suffix": "b"}),
        ):
            status, _, body = server.ask("POST", path, fields)
            assert status == 400 and b"never trained to fill in the middle" in body
        assert "insert" not in server.post("/api/show")["capabilities"]
        assert server.post("/infill", input_prefix="1", input_suffix="")["content"] == "23456789"


def test_llama_cpp_answers_have_what_its_clients_read(server):
    fields = {"prompt": "1", "n_predict": 3, "n_probs": 2, "response_fields": []}
    answer = server.post("/completion", **fields)
    assert answer["content"] == "234" and answer["stop"] is True and answer["stop_type"] == "limit"
    assert answer["timings"]["predicted_n"] >= 3 and answer["timings"]["predicted_per_second"] > 0
    assert answer["tokens_cached"] == answer["tokens_evaluated"] + answer["tokens_predicted"] == 4
    assert [token["token"] for token in answer["completion_probabilities"]] == ["2", "3", "4"]
    assert server.post(
        "/completion", prompt="7", response_fields=["content", "timings/predicted_n", "none"]
    ).keys() == {"content", "timings/predicted_n"}
    assert [one["content"] for one in server.post("/completion", prompt=["7", "8"])] == ["89", "9"]
    assert server.post("/completion", prompt=["1", 50, 51])["content"] == "456789"  # "1", then the ids of 2 and 3
    assert server.post("/infill", input_prefix="1", input_suffix="", n_predict=0)["content"] == ""
    assert server.post("/infill", input_prefix="", input_suffix="", n_predict=0, response_fields=[""]) == {}
    status, _, body = server.ask("POST", "/completion", {"prompt": "6", "stream": True})
    chunks = events_of(body)
    assert status == 200 and "".join(chunk["content"] for chunk in chunks) == "789"
    assert [chunk["stop"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_text_becomes_tokens_and_back(server):
    assert server.post("/tokenize", content="12") == {"tokens": [49, 50]}
    assert server.post("/tokenize", content="1", with_pieces=True) == {"tokens": [{"id": 49, "piece": "1"}]}
    assert server.post("/detokenize", tokens=[49, 50]) == {"content": "12"}
    status, _, body = server.ask("POST", "/apply-template", {"messages": [{"role": "user", "content": "a"}]})
    assert status == 400 and b"fine-tuned on instructions" in body


@pytest.mark.parametrize("template", ["alpaca", "user-assistant"])
def test_the_template_that_llama_cpp_s_clients_get_says_the_same_as_the_server(template):
    jinja2 = pytest.importorskip("jinja2")
    system, question, answer = (
        {"role": r, "content": c} for r, c in (("system", "s\n"), ("user", "{q}"), ("assistant", "a"))
    )
    with running(served(template=template)) as server:
        text = json.loads(server.ask("GET", "/props")[2])["chat_template"]
        for messages in (
            [question],
            [system, question],
            [question, answer, question],
            [system, question, answer, question],
        ):
            rendered = jinja2.Environment().from_string(text).render(messages=messages, add_generation_prompt=True)
            said = server.post("/apply-template", messages=messages)["prompt"]
            assert rendered == said
        assert go_template(template, PlainVocabulary()) in server.post("/api/show")["template"]
    with running(served()) as server:
        assert json.loads(server.ask("GET", "/props")[2])["chat_template"] == ""


def test_a_model_s_own_template_is_not_shown_to_ollama_s_clients_as_one_of_ours():
    own = "{%- for m in messages -%}{{- '<' + m.role + '>' + m.content + '</>\n' -}}{%- endfor -%}<assistant>"
    with running(served(template=own)) as server:
        assert json.loads(server.ask("GET", "/props")[2])["chat_template"] == own
        shown = server.post("/api/show")["template"]
    assert "<user>" not in shown and shown.endswith("{{ else }}{{ .Prompt }}{{ end }}")


def test_ollama_streams_lines_and_lists_the_model(server):
    status, headers, body = server.ask("POST", "/api/generate", {"prompt": "6"})
    lines = [json.loads(line) for line in body.splitlines()]
    assert status == 200 and headers["content-type"] == "application/x-ndjson"
    assert "".join(line["response"] for line in lines) == "789" and lines[-1]["done_reason"] == "stop"
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    (card,) = json.loads(server.ask("GET", "/api/tags")[2])["models"]
    assert card["name"] == "fake:latest" and card["details"]["parameter_size"] == "1.2M"
    shown = server.post("/api/show", name="fake")
    assert shown["capabilities"] == ["completion", "insert"] and ".Suffix" in shown["template"]
    assert shown["parameters"] == "num_ctx 256" and server.post("/api/generate")["done_reason"] == "load"
    status, _, body = server.ask("POST", "/api/chat", {"messages": [{"role": "user", "content": "a"}]})
    assert status == 400 and set(json.loads(body)) == {"error"}


def test_a_confidence_that_is_not_reached_gives_nothing(server):
    fields = {"input_prefix": "5", "input_suffix": "", "n_predict": 2}
    assert server.post("/infill", **fields, min_confidence=0.9)["content"] == "67"
    unsure = served(follows=tells, min_confidence=1.0)
    with running(unsure) as other:
        assert other.post("/infill", **fields)["content"] == ""


def waits_for(gate: threading.Event):
    def follows(text: str) -> str:
        gate.wait(10)
        return "x"

    return follows


def test_a_client_that_leaves_ends_its_request_at_once():
    gate = threading.Event()
    with running(served(waits_for(gate), n_rows=2)) as server:
        counters = server.served.scheduler.counters
        for n, streams in enumerate((True, False), start=1):
            body = json.dumps({"prompt": "a", "max_tokens": 200, "stream": streams}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            sock = socket.create_connection(("127.0.0.1", server.port))
            sock.sendall(head + body)
            until(lambda n=n: counters.n_waiting + counters.n_running == n)  # the first is in its pass all the time
            sock.close()
            until(lambda: server.served.metrics.n_open == 0)
        gate.set()
        until(lambda: server.served.scheduler.counters.requests["cancelled"] == 2)
        assert server.served.metrics.n_left == 2 and server.served.scheduler.counters.new_tokens < 50


def asks_much_and_reads_nothing(server) -> socket.socket:
    """Ask for far more than the buffers of a connection hold, and return once the server can write no more."""
    body = json.dumps({"prompt": "a" * 10**6, "n": 12, "max_tokens": 1, "echo": True, "stream": True}).encode()
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    assert sock.recv(8).startswith(b"HTTP/1.1")
    return sock


def test_a_client_that_reads_nothing_is_left_in_the_end_but_not_a_slow_one():
    with running(served(lambda text: "x", limits=Limits(body_s=0.15))) as server:
        with asks_much_and_reads_nothing(server):
            until(lambda: server.served.metrics.n_open == 0)
        with asks_much_and_reads_nothing(server) as sock:
            n_read = 0
            while n_read < 10**7:
                piece = sock.recv(2**19)
                assert piece, "the connection was closed"
                n_read += len(piece)
                sleep(0.03)


def test_a_client_has_read_where_as_much_waits_again():
    looks, closed, waiting = [], [], [70_000]
    transport = SimpleNamespace(
        is_closing=lambda: False, get_write_buffer_size=lambda: waiting[0], abort=lambda: closed.append(True)
    )
    loop = SimpleNamespace(call_later=lambda after, look: looks.append(look) or SimpleNamespace(cancel=lambda: None))
    protocol = object.__new__(connections.guarded(Limits(), Metrics()))
    protocol.transport, protocol.loop, protocol.flow = transport, loop, FlowControl(transport)
    protocol.pause_writing()
    protocol._look()
    protocol.resume_writing()
    protocol.pause_writing()
    looks[-1]()
    waiting[0] = 69_000
    looks[-1]()
    assert not closed
    looks[-1]()
    assert closed


def test_a_client_that_reads_nothing_does_not_hold_up_the_end_of_the_server(monkeypatch):
    monkeypatch.setattr(connections, "STOPPING_S", 0.05)
    with running(served(lambda text: "x", limits=Limits(body_s=600, time_s=600))) as server:
        sock = asks_much_and_reads_nothing(server)
    sock.close()


def test_a_full_queue_is_503_with_a_time_to_ask_again():
    gate = threading.Event()
    with running(served(waits_for(gate), n_rows=1, max_queue=0)) as server:
        first = threading.Thread(target=lambda: server.post("/v1/completions", prompt="a", max_tokens=2))
        first.start()
        until(lambda: server.served.metrics.n_open == 1 and server.served.scheduler.counters.n_running == 1)
        for path, body in (("/v1/completions", {"prompt": "b"}), ("/api/generate", {"prompt": "b"})):
            status, headers, raw = server.ask("POST", path, body)
            assert status == 503 and int(headers["retry-after"]) >= 1 and b"ask again" in raw
        gate.set()
        first.join(10)
        assert server.post("/v1/completions", prompt="b", max_tokens=1)["choices"][0]["text"] == "x"


def test_a_request_that_finds_no_place_in_time_is_503_before_anything_is_sent():
    gate = threading.Event()
    limits = Limits(time_s=0.05)
    with running(served(waits_for(gate), n_rows=1, limits=limits, template="alpaca")) as server:
        first = threading.Thread(target=lambda: server.post("/v1/completions", prompt="a", max_tokens=2))
        first.start()
        until(lambda: server.served.scheduler.counters.n_running == 1)
        chat = {"messages": [{"role": "user", "content": "b"}]}
        asked = [
            (path, {**fields, "stream": streams})
            for path, fields in (
                ("/v1/completions", {"prompt": "b", "echo": True}),
                ("/v1/chat/completions", chat),
                ("/infill", {"input_prefix": "b", "input_suffix": ""}),
                ("/api/chat", chat),
            )
            for streams in (True, False)
        ]
        answers = []
        others = [threading.Thread(target=lambda a=a: answers.append(server.ask("POST", *a))) for a in asked]
        for thread in others:
            thread.start()
        until(lambda: server.served.scheduler.counters.n_waiting == len(others))
        sleep(0.06)  # past the time limit of all
        gate.set()
        for thread in (first, *others):
            thread.join(10)
        assert [status for status, _, _ in answers] == [503] * len(asked)
        assert all(int(headers["retry-after"]) >= 1 and b"was busy" in raw for _, headers, raw in answers)


def test_a_model_that_fails_is_an_error_of_the_server_and_the_next_request_is_answered():
    fails = [True]

    def follows(text: str) -> str:
        if fails:
            raise RuntimeError("the secret text")
        return "x"

    with running(served(follows)) as server:
        status, _, body = server.ask("POST", "/v1/completions", {"prompt": "a", "stream": True})
        assert status == 500 and json.loads(body)["error"]["type"] == "server_error"
        fails.clear()
        assert server.post("/v1/completions", prompt="a", max_tokens=1)["choices"][0]["text"] == "x"


def test_an_error_in_the_midst_of_a_stream_is_its_last_message():
    def follows(text: str) -> str:
        if text.endswith("xx"):
            raise RuntimeError("no more")
        return "x"

    with running(served(follows)) as server:
        status, _, body = server.ask("POST", "/v1/completions", {"prompt": "a", "stream": True, "max_tokens": 9})
        first, *_, last = events_of(body)
        assert status == 200 and first["choices"][0]["text"] == "x" and last["error"]["type"] == "server_error"
        lines = server.ask("POST", "/api/generate", {"prompt": "a"})[2].splitlines()
        assert isinstance(json.loads(lines[-1])["error"], str)


def test_a_request_for_text_at_a_cursor_becomes_what_the_scheduler_takes(server, monkeypatch):
    taken = []
    submit = server.served.scheduler.submit

    def taking(generation, say):
        taken.append(generation)
        return submit(generation, say)

    monkeypatch.setattr(server.served.scheduler, "submit", taking)
    fields = {"input_prefix": "a", "prompt": "b", "input_suffix": "c", "n_indent": 4, "n_cmpl": 3, "max_lines": 2}
    server.post("/infill", **fields, t_max_prompt_ms=500, t_max_predict_ms=1000, top_k=40, top_p=0.9)
    assert [g.sampling.temperature for g in taken] == [0.0, 0.8, 0.8] and taken[1].sampling.seed != taken[
        2
    ].sampling.seed
    assert {(g.time_limit_s, g.lines_limit_s) for g in taken} == {(60, 1.0)} and taken[1].sampling.top_p == 0.9
    edit = taken[0].edit
    assert (edit.prefix, edit.suffix, edit.max_lines, edit.stop_at_dedent) == ("ab", "c", 2, True)
    taken.clear()
    server.post("/infill", **{**fields, "n_indent": 0, "n_cmpl": 2, "temperature": 0.5, "t_max_predict_ms": 0})
    assert [g.sampling.temperature for g in taken] == [0.5, 0.5] and taken[0].edit.stop_at_dedent is False
    assert taken[0].lines_limit_s is None


def test_figures_are_in_the_text_format(server):
    server.ask("GET", "/nowhere")
    assert server.post("/v1/completions", prompt="ab", max_tokens=2)["usage"]["completion_tokens"] == 2
    text = server.ask("GET", "/metrics")[2].decode()
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert int(figures['kindling_http_requests_total{path="other",status="404"}']) >= 1
    assert int(figures["kindling_new_tokens_total"]) > 0 and int(figures["kindling_rows"]) == 4
    assert figures['kindling_first_token_seconds_bucket{le="+Inf"}'] == figures["kindling_first_token_seconds_count"]


def test_a_connection_is_used_again(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        for _ in range(3):
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            raw = b""
            while not raw.endswith(b"}"):
                raw += sock.recv(2**16)
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert read_answer(sock)[0] == 200


def test_every_path_is_described():
    from conftest import ROOT

    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    missing = {entry.path.partition("/{")[0] for entry in ENTRIES} - {
        path for path in (entry.path.partition("/{")[0] for entry in ENTRIES) if f"`{path}`" in page
    }
    assert missing == set()

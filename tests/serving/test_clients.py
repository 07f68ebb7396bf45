"""The requests of editors, written down from their sources in clients/, and what each editor reads of the answer.

`reads` are the paths that the client reads of the answer, or of every message of a stream; `some`, of the messages that have
them; `flat`: a path is one key. `text` is a path and what its values join to. `until`: the client stops reading there.
"""

import json
from pathlib import Path

import pytest
from http_server import running, served

CLIENTS = sorted(Path(__file__).with_name("clients").glob("*.json"))
EXCHANGES = [
    pytest.param(request, id=f"{path.stem}: {request['what']}")
    for path in CLIENTS
    for request in json.loads(path.read_text(encoding="utf-8"))["requests"]
]
KINDS = {"text": str, "number": (int, float), "flag": bool, "list": list}
MISSING = object()


@pytest.fixture(scope="module")
def servers():
    more = {"block_size": 512, "template": "user-assistant"}
    with running(served(**more)) as plain, running(served(**more, literal_fim=True)) as literal:
        yield {False: plain, True: literal}


def found(message, path: str, flat: bool = False):
    for part in [path] if flat else path.split("/"):
        if isinstance(message, list):
            message = message[int(part)] if int(part) < len(message) else MISSING
        else:
            message = message.get(part, MISSING) if isinstance(message, dict) else MISSING
    return message


def messages_of(raw: bytes, stream: str | None, headers: dict[str, str]) -> list:
    if stream is None:
        assert headers["content-type"] == "application/json"
        return [json.loads(raw)]
    if stream == "lines":
        return [json.loads(line) for line in raw.splitlines()]
    assert headers["content-type"] == "text/event-stream"
    events = raw.decode().split("\n\n")
    assert events.pop() == "" and all(event.startswith("data: ") for event in events)
    return [json.loads(event[6:]) for event in events if event != "data: [DONE]"]


@pytest.mark.parametrize("request_", EXCHANGES)
def test_an_editor_finds_what_it_reads(servers, request_):
    server = servers[request_.get("literal_fim", False)]
    method = request_.get("method", "POST")
    headers = {name.replace("-", "_"): value for name, value in request_.get("headers", {}).items()}
    status, answered, raw = server.ask(method, request_["path"], request_.get("body"), **headers)
    assert status == 200, raw
    messages, flat = messages_of(raw, request_.get("stream"), answered), request_.get("flat", False)
    if end := request_.get("until"):
        last = next(i for i, message in enumerate(messages) if found(message, end))
        messages = messages[: last + 1]
    for path, kind in request_.get("reads", {}).items():
        for message in messages:
            value = found(message, path, flat)
            assert isinstance(value, KINDS[kind]) and isinstance(value, bool) == (kind == "flag"), (path, value)
    for path, kind in request_.get("some", {}).items():
        values = [value for message in messages if (value := found(message, path)) is not MISSING]
        assert values and all(isinstance(value, KINDS[kind]) for value in values), path
    for path, part in request_.get("contains", {}).items():
        assert part in found(messages[0], path)
    if text := request_.get("text"):
        values = [found(message, text[0], flat) for message in messages]
        assert "".join(value for value in values if isinstance(value, str)) == text[1]


def test_llama_vim_knows_an_answer_by_how_it_begins(servers):
    """Its first check is a pattern on the raw text."""
    body = {"input_prefix": "1", "input_suffix": "", "response_fields": ["content"]}
    raw = servers[False].ask("POST", "/infill", body)[2]
    assert raw.startswith(b"{") and b'"content": "' in raw

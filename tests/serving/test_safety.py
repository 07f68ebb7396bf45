"""Who may ask, from where, and what is printed of it."""

import json
import socket

import pytest
from http_server import running, served

from kindling.errors import KindlingError
from kindling.serving.safety import host_of, is_loopback, require_key

KEY = "correct horse"


@pytest.fixture(scope="module")
def server():
    with running(served()) as one:
        yield one


@pytest.mark.parametrize("host", ["127.0.0.1:{}", "localhost:{}", "LOCALHOST", "[::1]:{}", "127.0.0.1:9", "127.1.2.3"])
def test_the_names_of_this_machine_are_hosts(server, host):
    assert server.ask("GET", "/health", host=host.format(server.port))[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.com",
        "evil.com:{}",
        "localhost.evil.com",
        "127.0.0.1.evil.com",
        "localhost:evil.com",
        "8.8.8.8:{}",
        "[",
        "::1",
        "user@localhost",
        "localhost,evil.com",
        "0x7f000001",
        "2130706433",
    ],
)
def test_any_other_host_is_refused_as_a_browser_may_have_been_led_here(server, host):
    for method, path in (("GET", "/health"), ("GET", "/"), ("POST", "/v1/completions")):
        assert (
            server.ask(method, path, {"prompt": "1"} if method == "POST" else None, host=host.format(server.port))[0]
            == 403
        )


def test_hosts_are_read_without_their_ports():
    known = {"A.b:80": "a.b", "[::1]:80": "::1", "[::1]": "::1", "localhost": "localhost", "a:b": None, "": None}
    assert {header: host_of(header) for header in known} == known


@pytest.mark.parametrize(
    "origin", ["http://evil.com", "null", "http://localhost:{other}", "https://127.0.0.1", "file://"]
)
def test_pages_of_other_sites_cannot_ask(server, origin):
    origin = origin.format(other=server.port + 1)
    status, headers, _ = server.ask("POST", "/v1/completions", {"prompt": "7"}, origin=origin)
    assert status == 403 and not any(name.startswith("access-control") for name in headers)
    assert server.ask("POST", "/v1/completions", {"prompt": "7"}, sec_fetch_site="cross-site")[0] == 403
    preflight = server.ask("OPTIONS", "/v1/completions", origin=origin, access_control_request_method="POST")
    assert preflight[0] in (403, 405) and not any(name.startswith("access-control") for name in preflight[1])


@pytest.mark.parametrize("name", ["Origin", "Sec-Fetch-Site", "Host"])
def test_a_header_that_says_who_asks_comes_once(server, name):
    values = {"Origin": ("http://evil.com", server.url), "Sec-Fetch-Site": ("cross-site", "same-origin")}
    lines = {"Host": f"127.0.0.1:{server.port}", "Content-Length": "2", "Connection": "close"}
    head = "".join(f"{key}: {value}\r\n" for key, value in lines.items())
    twice = "".join(f"{name}: {value}\r\n" for value in values.get(name, ("127.0.0.1",)))
    assert server.send(f"POST /tokenize HTTP/1.1\r\n{head}{twice}\r\n{{}}".encode())[0] in (403, 400)
    assert name == "Host" or server.send(f"POST /tokenize HTTP/1.1\r\n{head}{twice}\r\n{{}}".encode())[0] == 403


def test_no_answer_is_taken_for_a_page_or_a_script(server):
    for method, path in (("GET", "/"), ("GET", "/health"), ("GET", "/nothing"), ("POST", "/tokenize")):
        assert server.ask(method, path)[1]["x-content-type-options"] == "nosniff"
    assert server.ask("GET", "/", host="evil.com")[1]["x-content-type-options"] == "nosniff"


def test_behind_a_proxy_the_server_has_the_name_of_the_proxy():
    with running(served(), api_key=KEY, public_name="Code.example.org:8443") as server:
        key, fields = {"authorization": f"Bearer {KEY}"}, {"prompt": "7"}
        for host in ("code.example.org:8443", "code.example.org", f"127.0.0.1:{server.port}"):
            assert server.ask("GET", "/v1/models", host=host, **key)[0] == 200
            for origin, status in (("https://code.example.org:8443", 200), ("https://evil.org", 403)):
                assert server.ask("POST", "/v1/completions", fields, host=host, origin=origin, **key)[0] == status
        assert server.ask("GET", "/v1/models", host="example.org", **key)[0] == 403
        origin = "https://code.example.org"  # another port, another server
        assert server.ask("POST", "/v1/completions", fields, origin=origin, **key)[0] == 403


def test_a_public_name_is_a_name_and_needs_a_key():
    for name in ("code.example.org", "code.example.org:443", "10.0.0.5", "[fe80::1]:80"):
        require_key("127.0.0.1", KEY, name)
        with pytest.raises(KindlingError, match="must come with --api-key"):
            require_key("127.0.0.1", None, name)
    for name in ("", "https://code.example.org", "a/b", "a b", "a:b", "a\n", "*"):
        with pytest.raises(KindlingError, match="--public-name must be a name"):
            require_key("127.0.0.1", KEY, name)


def test_its_own_page_can_ask(server):
    status, headers, _ = server.ask("POST", "/v1/completions", {"prompt": "7"}, origin=server.url)
    assert status == 200 and not any(name.startswith("access-control") for name in headers)


def test_without_the_key_only_the_page_and_the_health_are_answered():
    with running(served(), api_key=KEY) as server:
        for value in ("", KEY, f"Basic {KEY}", "Bearer", "Bearer wrong", f"Bearer {KEY}x", "Bearer \xff"):
            status, headers, body = server.ask("GET", "/v1/models", authorization=value)
            assert status == 401 and headers["www-authenticate"] == "Bearer"
            assert json.loads(body)["error"]["code"] == "invalid_api_key"
            status, _, body = server.ask("POST", "/api/generate", {"prompt": "1"}, authorization=value)
            assert status == 401 and isinstance(json.loads(body)["error"], str)
        for path in ("/metrics", "/about.json", "/nothing"):
            assert server.ask("GET", path)[0] == 401
        for path in ("/", "/health"):
            assert server.ask("GET", path)[0] == 200
        for value in (f"Bearer {KEY}", f"bearer  {KEY}"):
            assert server.ask("GET", "/v1/models", authorization=value)[0] == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "myhost"])
def test_others_reach_it_only_with_a_key(host):
    with pytest.raises(KindlingError, match="--api-key"):
        require_key(host, None)
    require_key(host, KEY)


@pytest.mark.parametrize("key", ["", " a", "a\n", "é"])
def test_a_key_must_fit_in_a_header(key):
    with pytest.raises(KindlingError, match="--api-key must be printable ASCII"):
        require_key("127.0.0.1", key)


def test_what_only_this_machine_reaches():
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "localhost.evil.com", "")))


def test_a_server_for_others_is_called_by_its_addresses_and_its_name():
    from kindling.serving.app import PATHS, error_form
    from kindling.serving.metrics import Metrics
    from kindling.serving.safety import Guard

    guard = Guard(None, "0.0.0.0", KEY, Metrics(), PATHS, error_form)
    own = ("10.0.0.5", "127.0.0.1", "localhost", socket.gethostname().lower(), "fe80::1")
    assert all(map(guard._is_own, own)) and not guard._is_own("evil.com")


SECRET = "my secret text"


def send_secrets(server) -> None:
    server.ask("POST", "/v1/completions", {"prompt": SECRET, "stop": [SECRET], "max_tokens": 2})
    server.ask("POST", "/v1/completions", {"prompt": SECRET, "temperature": SECRET})
    server.ask("POST", "/infill", {"input_prefix": SECRET, "input_suffix": SECRET})
    server.ask("POST", f"/{SECRET.replace(' ', '%20')}", {"prompt": SECRET})
    server.send(f"{SECRET}\r\n\r\n".encode())


def test_no_text_is_printed_or_counted(server, capfd, caplog):
    caplog.set_level(0)
    send_secrets(server)
    assert SECRET not in server.ask("GET", "/metrics")[2].decode()
    assert (capfd.readouterr(), caplog.text) == (("", ""), "")


def test_an_unforeseen_error_is_printed_without_the_text(server, capfd, monkeypatch):
    def fails(text: str) -> list[int]:
        raise RuntimeError(text)

    monkeypatch.setattr(server.served.vocabulary, "encode", fails)
    status, _, body = server.ask("POST", "/v1/completions", {"prompt": SECRET})
    assert status == 500 and SECRET not in body.decode()
    printed = capfd.readouterr().err
    assert "RuntimeError" in printed and "served_model.py" in printed and SECRET not in printed


def test_text_is_printed_where_the_user_said_so(capfd):
    with running(served(log_prompts=True)) as server:
        server.ask("POST", "/v1/completions", {"prompt": SECRET, "max_tokens": 2})
    assert f'/v1/completions: {{"prompt": "{SECRET}"' in capfd.readouterr().err


def test_what_is_printed_cannot_command_the_terminal(capfd):
    with running(served(log_prompts=True)) as server:
        server.ask("GET", "/v1/models/%1b%5d0;a%07%9b%e2%80%ae")
        server.ask("POST", "/v1/completions", {"prompt": "\x1b]0;a\x07\x7f", "max_tokens": 1})
    printed = capfd.readouterr().err
    assert "/v1/models/\\x1b]0;a" in printed and printed.replace("\n", "").isprintable() and printed.isascii()


def test_errors_hold_little_of_what_was_sent(server):
    _, _, body = server.ask("POST", "/v1/completions", {"prompt": "a", "temperature": SECRET * 9})
    assert SECRET not in body.decode() and "a text of 126 characters" in body.decode()

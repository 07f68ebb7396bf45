"""A name on the hub, where the hub does not answer: one line, soon, and what is cached still serves."""

import os
import socket
import subprocess
import sys
import threading
import time
from http.server import HTTPServer, SimpleHTTPRequestHandler

import pytest
from conftest import ROOT, assert_one_clear_line

from config import SourceConfig, TokenizerConfig
from kindling import hub
from kindling.data.shards import DataError
from kindling.data.sources import documents
from kindling.errors import TokenizerError
from kindling.evaluation.tasks import TaskError, load
from kindling.tokenization.pretrained import load_pretrained
from kindling.tokenization.train_tokenizer import train_bpe


@pytest.fixture(params=["closed", "silent"])
def endpoint(request, monkeypatch):
    """A hub that nobody serves, or one that accepts connections and never answers."""
    from huggingface_hub import constants

    listener = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    if request.param == "closed":
        listener.close()
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "ANSWER_S", 0.2)
    yield address
    listener.close()


def test_every_use_of_the_hub_says_so_soon_and_in_one_line(endpoint, capfd):
    started = time.monotonic()
    source = SourceConfig(kind="datasets", path="nobody/nothing")
    with pytest.raises(DataError, match=f"'nobody/nothing' must be reachable, but {endpoint} does not answer"):
        list(documents(source, None))
    with pytest.raises(TokenizerError, match=f"'nobody/nothing' gave {endpoint} does not answer"):
        load_pretrained(TokenizerConfig(kind="pretrained", path="nobody/nothing"))
    with pytest.raises(TaskError, match=f"{endpoint} does not answer"):
        load("humaneval", "nobody/nothing")
    assert time.monotonic() - started < 3
    assert capfd.readouterr() == ("", "")


def test_what_is_cached_is_used_where_the_hub_does_not_answer(endpoint, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--me--words" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (tmp_path / "models--me--words/refs").mkdir()
    (tmp_path / "models--me--words/refs/main").write_text("0" * 40, encoding="utf-8")
    made = train_bpe(["some text"], TokenizerConfig(), 300)
    (folder / "tokenizer.json").write_text(made.to_json(), encoding="utf-8")
    assert load_pretrained(TokenizerConfig(kind="pretrained", path="me/words")).sha256 == made.sha256
    assert hub.is_cached("models", "me/words") and not hub.is_cached("datasets", "me/words")
    assert not constants.HF_HUB_OFFLINE and os.environ.get("HF_HUB_OFFLINE") == "1"  # as before


def test_a_cached_data_set_is_left_to_the_library_that_then_asks_no_network(endpoint, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "datasets--me--stories").mkdir()
    offline = []

    def load_dataset(*args, **kwargs):
        offline.append(constants.HF_HUB_OFFLINE)
        return iter([{"text": "a story"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    (document,) = documents(SourceConfig(kind="datasets", path="me/stories", field="text"), None)
    assert document.text == "a story" and offline == [True]


def test_a_hub_that_answers_anything_is_reachable_and_asked_once(monkeypatch):
    from huggingface_hub import constants

    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_error(503)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.ask_ahead()
    for _ in range(2):
        with hub.cache_if_unreachable() as why:
            assert why is None and not hub.is_offline()
    server.shutdown()
    assert len(asked) == 1


def test_offline_by_the_environment_asks_nobody(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_why_unreachable", lambda endpoint: pytest.fail("it was asked"))
    monkeypatch.setattr(hub, "_asked", lambda endpoint: pytest.fail("it was asked"))
    hub.ask_ahead()
    with hub.cache_if_unreachable() as why:
        assert why is None and hub.is_offline()


@pytest.mark.parametrize("flags", [("--preset", "tinystories"), ("--preset", "code-50m")])
def test_a_preset_of_the_hub_is_refused_offline_before_anything_starts(flags, tmp_path):
    listener = socket.create_server(("127.0.0.1", 0))
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{listener.getsockname()[1]}", "HF_HOME": str(tmp_path)}
    command = [sys.executable, str(ROOT / "data_pipeline.py"), *flags]
    result = subprocess.run(
        command, cwd=tmp_path, env={**env, "HF_HUB_OFFLINE": "0"}, capture_output=True, text=True, timeout=100
    )
    listener.close()
    assert_one_clear_line(result, "does not answer (no answer in 1.5 s)")
    assert len(result.stderr.splitlines()) == 1 and not result.stdout

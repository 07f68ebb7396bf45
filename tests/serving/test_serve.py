"""The script serve.py: what it opens, what it refuses at the start, and how it ends."""

import asyncio
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from http_server import running, until
from tiny_runs import bigram_model, make_run

import serve
from config import TokenizerConfig
from kindling.data.exported_templates import jinja_template
from kindling.errors import KindlingError
from kindling.formats.int8_format import write
from kindling.serving.server import bind
from kindling.serving.server import run as run_server
from kindling.tokenization.train_tokenizer import train_bpe


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that says x for ever, with an export to int8."""
    tokenizer = train_bpe(["no merges"], TokenizerConfig(), 261)
    model = bigram_model(tokenizer, {"x": "x"}, 64)
    folder = tmp_path_factory.mktemp("serve") / "runs/says-x"
    made = make_run(folder, tokenizer, model, kind="local-python")
    (folder / "export/int8").mkdir(parents=True)
    write(folder / "export/int8", made_model(made), tokenizer, "says-x, step_000001")
    return folder


def made_model(made):
    import torch

    from kindling.runs.loading import load_model

    return load_model(made, torch.device("cpu"))[0]


class Process:
    """serve.py as a user starts it, on a free port."""

    def __init__(self, *args: str, cwd: Path = ROOT):
        env = {**os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "serve.py"), *args, "--port", "0"],
            cwd=cwd,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said = "".join(self.process.stdout.readline() for _ in range(4))
        self.port = int(re.search(r"page http://127\.0\.0\.1:(\d+)/", self.said)[1])

    def end(self, number: int) -> tuple[int, str]:
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=20)
        return self.process.returncode, err

    def request(self, n: int) -> socket.socket:
        """Begin a request for `n` tokens, and return its connection once the first text has come."""
        body = json.dumps({"prompt": "x", "max_tokens": n, "temperature": 0, "stream": True}).encode()
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        sock.sendall(head.encode() + body)
        assert sock.recv(2**16).startswith(b"HTTP/1.1 200")
        return sock


def rest_of(sock: socket.socket) -> bytes:
    raw = b""
    while more := sock.recv(2**16):
        raw += more
    return raw


def test_ctrl_c_finishes_what_is_being_written_and_an_export_needs_no_torch(run):
    server = Process(str(run / "export/int8"), "--kernel", "numpy", "--max-queue", "5")
    assert server.said.startswith(f"loading {run / 'export/int8'}\n")
    assert "says-x, step_000001" in server.said and "in int8, context 64; continues texts\n" in server.said
    maps = Path(f"/proc/{server.process.pid}/maps").read_text(encoding="utf-8")
    assert "libtorch" not in maps and "tokenizers" in maps
    with server.request(50) as sock:
        server.process.send_signal(signal.SIGINT)
        raw = rest_of(sock)
    assert raw.rstrip().endswith(b"0") and b"data: [DONE]" in raw
    _, err = server.process.communicate(timeout=20)
    assert server.process.returncode == 130
    assert err.strip() == "finishing what is being written; once more to stop at once"


def test_an_export_of_a_fine_tuned_run_chats_in_its_template(tmp_path):
    from kindling.runs.loading import chat_of

    tokenizer = train_bpe(["no merges"], TokenizerConfig(), 261)
    made = make_run(tmp_path / "runs/chats", tokenizer, bigram_model(tokenizer, {"\n": "a", "a": None}, 192))
    out = tmp_path / "runs/chats/export/int8"
    out.parent.mkdir()
    out.mkdir()
    write(out, made_model(made), tokenizer, "chats, step_000001", chat=chat_of(made))
    flags = opened(str(made.path), "--int8", "--kernel", "numpy")
    with running(serve.to_serve(serve.open_model(flags), flags)) as server:
        fields = {"messages": [{"role": "user", "content": "Say a."}], "temperature": 0}
        answer = server.post("/v1/chat/completions", **fields)
        template = json.loads(server.ask("GET", "/props")[2])["chat_template"]
    assert answer["choices"][0]["message"]["content"] == "a"
    assert template == jinja_template("alpaca", tokenizer)  # as in the exports to other formats
    vocabulary = serve.open_model(opened(str(made.path))).vocabulary
    assert jinja_template("alpaca", vocabulary) == template  # of the run in PyTorch
    meta = json.loads((out / "config.json").read_text(encoding="utf-8"))
    for chat, said in (({**meta["chat"], "rendered": "another"}, "export again"), (None, None)):
        (out / "config.json").write_text(json.dumps({**meta, "chat": chat}), encoding="utf-8")
        if said is None:
            assert serve.open_model(flags).template is None  # as the exports of earlier versions
        else:
            with pytest.raises(KindlingError, match=said):
                serve.open_model(flags)


def test_a_second_signal_stops_at_once(run, monkeypatch):
    stops = []
    from kindling import stopping

    monkeypatch.setattr(stopping.os, "_exit", stops.append)
    with stopping.StopRequest("x") as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: stop.signal is not None)
        assert stops == [] and stop.exit_code == 143
        os.kill(os.getpid(), signal.SIGINT)
        until(lambda: stops == [130])


def opened(*argv: str) -> serve.Flags:
    flags = serve.parse_cli(serve.Flags, "", list(argv))
    serve.check(flags)
    return flags


def test_a_run_and_its_export_are_told_apart(run, monkeypatch):
    kinds = {}
    for argv in ((str(run),), (str(run), "--int8"), (str(run / "export/int8"),)):
        model = serve.open_model(opened(*argv, "--kernel", "numpy", "--cache-mb", "1", "--device", "cpu"))
        kinds[argv[-1]] = (model.name, model.about["kind"])
        assert model.about["parameters"] > 1000 and model.about["shape"]["block_size"] == 64
    assert list(kinds.values()) == [
        ("says-x", "a run in PyTorch"),
        ("says-x", "an export to int8"),
        ("says-x", "an export to int8"),
    ]
    monkeypatch.chdir(run.parent.parent)
    assert serve.open_model(opened("--int8", "--kernel", "numpy")).name == "says-x"  # the newest run
    assert serve.open_model(opened("says-x", "--device", "cpu")).about["kind"] == "a run in PyTorch"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--host", "0.0.0.0"], "--host must be of this machine alone without --api-key"),
        (["--public-name", "code.example.org"], "--public-name must come with --api-key"),
        (["--port", "70000"], "--port must be from 0 to 65535"),
        (["--max-queue", "-1"], "--max-queue must be from 0"),
        (["--min-confidence", "2"], "--min-confidence must be from 0 to 1"),
        (["--time-limit-s", "nan"], "--time-limit-s must be from 0.1"),
        (["--cache-mb", "0"], "--cache-mb must be from 1"),
    ],
)
def test_flags_that_cannot_be_used_are_refused_at_the_start(argv, said):
    with pytest.raises(KindlingError, match=said):
        opened(*argv)


def test_the_key_may_stand_in_the_environment(monkeypatch):
    monkeypatch.setenv("KINDLING_API_KEY", "abc")
    assert serve.read_flags([]).api_key == "abc" and serve.read_flags(["--api-key", "d"]).api_key == "d"
    monkeypatch.setenv("KINDLING_API_KEY", "")  # as a script leaves it whose secret is missing: no key is not meant
    with pytest.raises(KindlingError, match="--api-key must be printable ASCII"):
        serve.main([])
    monkeypatch.delenv("KINDLING_API_KEY")
    assert serve.read_flags([]).api_key is None


def test_a_port_in_use_is_one_clear_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(KindlingError, match=f"--port must be free, but {port} is in use; stop .* --port 0") as e:
            bind("127.0.0.1", port)
    assert "\n" not in str(e.value)
    with pytest.raises(KindlingError, match="must be an address of this machine"):
        bind("203.0.113.7", 0)


def test_small_pieces_are_sent_at_once():
    """Otherwise each piece of a stream waits for the client's acknowledgement of the one before, up to 40 ms."""

    async def has_no_delay() -> bool:
        found = asyncio.get_running_loop().create_future()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.set_result(bool(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)))
            writer.close()

        sock = bind("127.0.0.1", 0)
        async with await asyncio.start_server(connected, sock=sock):
            with socket.create_connection(sock.getsockname()):
                return await found

    assert asyncio.run(has_no_delay())


def test_what_stays_is_not_looked_through_again_while_answers_wait(monkeypatch):
    frozen = []

    async def serve_once(sockets: list) -> None:
        frozen.append(gc.get_freeze_count())

    gc.unfreeze()
    monkeypatch.setattr("kindling.serving.server.make_server", lambda *args: SimpleNamespace(serve=serve_once))
    model = SimpleNamespace(scheduler=SimpleNamespace(close=lambda patience_s: None))
    try:
        run_server(model, None, "127.0.0.1", None)
    finally:
        gc.unfreeze()
    assert frozen[0] > 1000


def test_what_is_no_run_and_no_export_is_one_clear_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argv in (["nothing"], ["nothing", "--int8"], ["--int8"]):
        with pytest.raises(KindlingError) as e:
            serve.main([*argv, "--port", "0"])
        assert "\n" not in str(e.value) and "DIR" not in str(e.value)


def test_measured_figures_are_few_and_finite(tmp_path):
    from kindling.serving.open_export import measured

    assert measured(tmp_path) == []
    found = {
        "language_modelling": {"all": {"bits_per_byte": 1.5, "perplexity": float("inf")}},
        "infilling": {
            "all": {"loss": 2.0},
            "gaps": {"line": {"ways": {"SPM": {"exact": 0.25}}}},
        },  # as evaluate.py has it
        "functional": {"problems": {"pass_at": {"1": 0.1}}, "mbpp": {"skipped": "no"}},
    }
    (tmp_path / "eval.json").write_text(json.dumps(found), encoding="utf-8")
    assert [row["value"] for row in measured(tmp_path)] == [1.5, 0.25, 0.1]
    found |= {"functional": {"skipped": "no sandbox"}, "infilling": {"all": {}, "gaps": {"line": {"skipped": "no"}}}}
    (tmp_path / "eval.json").write_text(json.dumps(found), encoding="utf-8")
    assert [row["value"] for row in measured(tmp_path)] == [1.5]  # what was skipped hides nothing else
    (tmp_path / "eval.json").write_text('{"language_modelling": []}', encoding="utf-8")
    assert measured(tmp_path) == []

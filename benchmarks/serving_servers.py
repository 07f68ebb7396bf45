"""The servers that serving.py measures: models on disk, processes, and a client that notes when text comes.

models = make_models(folder, None, toy=False, with_gguf=True)
with Server(our_command(models.int8), folder / "log.txt") as server:
    answer = Client(server.port).complete("def fib(n):", 12)

A model has random weights, which cost the same time as trained ones, or those of a run. llama.cpp has no architecture for the
shape of `autocomplete`: it knows no exact GELU, no bias in the head, and no normalizer of text. So its model has `gelu_new` and
neither of the others, and the export of ours beside it is of the same model.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from kindling.errors import KindlingError

if TYPE_CHECKING:
    from config import Config, TokenizerConfig
    from kindling.tokenization.tokenizer import Tokenizer
    from model import GPT

ROOT = Path(__file__).resolve().parent.parent
START_S = 120.0
FOR_LLAMA = {"activation": "gelu_new", "head_bias": False}
TOY = {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 512}
SLOTS = 16  # of llama.cpp: texts that it generates at once
MEMORY = {"whole": "VmRSS", "own": "RssAnon", "of files": "RssFile", "shared": "RssShmem", "peak": "VmHWM"}
"""Figures of a process's memory, and their lines in /proc/PID/status. The first is the sum of the next three."""


class ServerError(KindlingError):
    """A server that did not start, or did not answer as it must."""


@dataclass(frozen=True)
class Models:
    """The same model in the formats of the servers, and text for prompts."""

    run: Path
    int8: Path
    ids: list[int]
    """Python source as token ids."""
    tokenizer: Tokenizer
    shape: dict[str, Any]
    int8_for_llama: Path | None = None
    gguf: Path | None = None


def make_models(folder: Path, run: Path | None, toy: bool, with_gguf: bool, shape: str = "autocomplete") -> Models:
    """Write the models into `folder`: of a run, or with random weights in the shape of a preset."""
    import torch

    from kindling.formats.int8_format import write
    from kindling.runs.loading import find_run, load_model

    text = python_source(200_000 if toy else 4_000_000)
    found = find_run(random_run(folder, text, toy, shape) if run is None else run)
    loaded, _ = load_model(found, torch.device("cpu"))
    model, tokenizer = loaded.for_generation(), found.tokenizer()
    (folder / "int8").mkdir()
    write(folder / "int8", model, tokenizer, "serving.py", found.config().data.fim_rate > 0)
    ids = tokenizer.encode(text[:1_000_000])
    models = Models(found.path, folder / "int8", ids, tokenizer, vars(model.cfg))
    return with_llama(folder, models, model, found.config().tokenizer) if with_gguf else models


def with_llama(folder: Path, models: Models, model: GPT, cfg: TokenizerConfig) -> Models:
    """Write the model for llama.cpp too, and one for us with the same weights."""
    from kindling.formats import gguf_format, int8_format
    from kindling.tokenization.tokenizer import from_json
    from model import GPT

    if any(getattr(model.cfg, name) != value for name, value in FOR_LLAMA.items()):
        held = GPT(replace(model.cfg, **FOR_LLAMA)).eval()
        held.load_state_dict(model.state_dict(), strict=False)  # all but the bias of the head
        model = held
    plain = json.dumps(json.loads(models.tokenizer.to_json()) | {"normalizer": None})
    tokenizer = from_json(plain, replace(cfg, normalizer="none"))
    (folder / "int8-for-llama").mkdir()
    int8_format.write(folder / "int8-for-llama", model, tokenizer, "serving.py")
    gguf_format.write(folder / "model.gguf", model, tokenizer, "q8_0", "serving")
    return replace(models, int8_for_llama=folder / "int8-for-llama", gguf=folder / "model.gguf")


def python_source(n_chars: int) -> str:
    """Return source code of the standard library."""
    text = ""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if len(text) < n_chars:
            text += path.read_text(encoding="utf-8", errors="ignore")
    return text


def random_run(folder: Path, text: str, toy: bool, shape: str) -> Path:
    """Write a run of the shape of a preset with random weights and a tokenizer of this text, and return its folder."""
    import torch

    from config import TokenizerConfig
    from kindling.data.shards import FORMAT
    from kindling.files import write_json
    from kindling.runs.checkpoint import RunDirectory
    from kindling.tokenization.train_tokenizer import train_bpe
    from model import GPT
    from presets import preset

    cfg: Config = preset(shape)
    cfg = replace(cfg, model=replace(cfg.model, **TOY)) if toy else cfg
    if cfg.tokenizer.kind == "pretrained":
        cfg = replace(cfg, tokenizer=TokenizerConfig())
    tokenizer = train_bpe([text], cfg.tokenizer, cfg.model.vocab_size)
    cfg = replace(cfg, model=replace(cfg.model, vocab_size=tokenizer.vocab_size))  # a text may hold fewer
    torch.manual_seed(0)
    model = GPT(cfg.model).eval()
    with torch.no_grad():  # a text must not end by chance, nor a part of a character hold back what follows
        for i in range(cfg.model.vocab_size):
            if not tokenizer.decode([i]).isascii() or i == tokenizer.eos_id:
                model.head.weight[i] = 0
    data = folder / "data"
    data.mkdir()
    splits = {name: {"tokens": 0, "documents": 0, "bytes": 0, "max_id": -1, "shards": []} for name in ("val", "test")}
    about = {"format": FORMAT, "fingerprint": "none", "dtype": "uint16", "tokenizer_sha256": tokenizer.sha256,
             "vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id, "splits": splits}  # fmt: skip
    write_json(data / "manifest.json", about)
    write_json(data / "ledger.json", {})
    (data / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    run = RunDirectory(folder / "run")
    run.create(cfg, data)
    run.save(1, model, {"best": None})
    return run.path


# -- processes --------------------------------------------------------------------------------------------------------


def our_command(model: Path, *flags: str) -> list[str]:
    """Return the command that serves an export, or a run with PyTorch."""
    return [sys.executable, str(ROOT / "serve.py"), str(model), "--port", "0", *flags]


def llama_command(llama: Path, gguf: Path, context: int, threads: int) -> list[str]:
    """Return the command of llama.cpp's server: its own binary, or the one in xllamacpp if `llama` is a Python that has it."""
    flags = [
        "--model",
        gguf,
        "--port",
        free_port(),
        "--ctx-size",
        SLOTS * context,
        "--parallel",
        SLOTS,
        "--threads",
        threads,
    ]
    packaged = llama.name.startswith("python")
    command = [llama, ROOT / "benchmarks/llama_server.py", *flags] if packaged else [llama, *flags, "--no-webui"]
    return [str(word) for word in command]


def free_port() -> int:
    """Return a port of this machine on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


class Server:
    """A server in a process of its own."""

    def __init__(self, command: list[str], log: Path, cwd: Path = ROOT):
        """Start it and wait until it answers; what it prints goes to `log`. Raises ServerError."""
        self._log = log
        with log.open("w", encoding="utf-8") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=cwd)
        chosen = command[command.index("--port") + 1]
        self.port = 0 if chosen == "0" else int(chosen)
        end = time.monotonic() + START_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise ServerError(f"a server must start, but {command[:3]} did not; it said: {self.words()[-500:]}")
            time.sleep(0.05)

    def words(self) -> str:
        """Return what it has printed."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def _answers(self) -> bool:
        if self.port == 0 and (found := re.search(r"http://127\.0\.0\.1:(\d+)/", self.words())):
            self.port = int(found[1])
        if self.port == 0:
            return False
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_S)
        try:
            connection.request("GET", "/v1/models")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def memory(self) -> dict[str, int]:
        """Return the bytes of the process that are in memory, its mapped files among them, and the most so far."""
        text = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return {name: 1024 * int(re.search(rf"^{line}:\s+(\d+) kB$", text, re.M)[1]) for name, line in MEMORY.items()}

    def cpu_s(self) -> float:
        """Return the CPU time that it has taken."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()


# -- a client ---------------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """A text, and when it came."""

    text: str
    first_s: float
    """From the request to the first text."""
    whole_s: float
    """From the request to the end of the answer."""
    n_new: int
    n_cached: int | None
    """Tokens of the prompt that were not run again, if the server tells."""


class Client:
    """A connection that is kept, as an editor keeps it."""

    def __init__(self, port: int, timeout_s: float = 120.0):
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)

    def complete(self, prompt: str, n: int, **more: Any) -> Answer:
        """Ask for `n` tokens as a stream, greedily. Raises ServerError."""
        content = {"prompt": prompt, "max_tokens": n, "temperature": 0, "stream": True, **more}
        body = json.dumps({**content, "stream_options": {"include_usage": True}})
        try:
            started, response = self._asked(body)
        except ConnectionError:  # llama.cpp's server closes a connection that is idle for 5 s
            self._connection.close()
            started, response = self._asked(body)
        if response.status != 200:
            raise ServerError(f"a request must be answered, but got {response.status}: {response.read()[:300]!r}")
        parts: list[str] = []
        first, usage = None, {}
        for line in response:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                usage = chunk.get("usage") or usage
                text = "".join(choice.get("text", "") for choice in chunk.get("choices", ()))
                first = time.perf_counter() if text and first is None else first
                parts.append(text)
        whole = time.perf_counter()
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        return Answer(
            "".join(parts), (first or whole) - started, whole - started, usage.get("completion_tokens", n), cached
        )

    def _asked(self, body: str) -> tuple[float, http.client.HTTPResponse]:
        started = time.perf_counter()
        self._connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        return started, self._connection.getresponse()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

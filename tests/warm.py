"""Runs the project's scripts in forks of one process that has already imported the heavy libraries.

    result = run(["main.py", "--name", "base"], cwd=folder, env=dict(os.environ), timeout_s=300)

A new interpreter needs 3 to 5 seconds to import torch; a fork of one that has done so starts in a tenth of a second. The warm
process is not a process of the tests, so it does not depend on the tests that ran before. Each process of the tests has a fork
of it, which runs one script at a time. The script runs as `__main__`, with its own working directory, environment and pipes,
and ends as an interpreter ends. With `ranks`, several forks run it as ranks that reach each other, with the variables that
torchrun would give them. Four things differ from a user's run: the libraries and the project's packages are in `sys.modules`
already; all forks have the same hash seed, so sets have the same order in all of them; workers are forks of the script, where a
user's are new interpreters; and modules are not taken apart at the end. Tests that depend on one of these start a new
interpreter, or call what starts the workers themselves.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import NoneType

SCRIPTS = ("main.py", "sft_train.py", "evaluate.py", "generate.py", "data_pipeline.py", "export.py", "visualize.py")
LIBRARIES = ["torch", "torch._dynamo", "torch.utils.tensorboard", "numpy", "tyro", "pydantic.dataclasses", "yaml"]
LIBRARIES += ["tqdm", "safetensors.torch", "tokenizers", "rensa", "regex", "typeguard", "multiprocessing.synchronize"]
# of the project what scripts import; these import the rest
MODULES = ["training.stage", "plots.run_report", "formats.hf_format", "formats.model_card", "generation.chat"]
MODULES += ["data.explain", "sandbox.self_test", "evaluation.code_eval", "evaluation.memorization", "evaluation.gold"]
MODULES += ["evaluation.perplexity", "evaluation.compare_runs", "evaluation.grade_written"]
ROOT = Path(__file__).resolve().parent.parent
ADDRESS = "KINDLING_WARM_PROCESS"  # the variable by which those who start processes of the tests give them its address
_address = os.environ.pop(ADDRESS, None)  # no script sees it
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before a test changes it
REQUEST_BYTES = 2**17


class _Server:
    """The warm process. It imports nothing before somebody connects to `address`, and ends with the process that started it."""

    def __init__(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
            listening.bind("")  # Linux chooses a name, without a file
            self.address = listening.getsockname()[1:].decode()
            listening.listen(64)
            end, self.end_of_tests = os.pipe()
            command = [sys.executable, __file__, str(listening.fileno()), str(end)]
            self.process = subprocess.Popen(
                command,
                pass_fds=[listening.fileno(), end],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=ENVIRONMENT,
                cwd="/",
            )
        os.close(end)


_server: _Server | None = None
_connection: socket.socket | None = None


def start() -> str:
    """Start the warm process for this process and for those of the tests that it starts; return its address."""
    global _server
    _server = _server or _Server()
    return _server.address


def _connected() -> socket.socket:
    """The connection of this process to its fork of the warm process."""
    global _connection
    if _connection is None:
        _connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        _connection.connect(f"\0{_address or start()}")
    return _connection


class Process:
    """A script in a fork of the warm process, with pipes, as a subprocess.Popen has them; `before` and `ranks` as in `run`.

    Until it has ended, no other can start.
    """

    def __init__(self, argv: list[str], cwd: Path, env: dict[str, str], before: str = "", ranks: int = 1):
        self.asked = _connected()
        request = json.dumps({"argv": argv, "cwd": str(cwd), "env": env, "before": before, "ranks": ranks}).encode()
        assert len(request) < REQUEST_BYTES
        (its_in, stdin), (stdout, its_out), (stderr, its_err) = os.pipe(), os.pipe(), os.pipe()
        socket.send_fds(self.asked, [request], [its_in, its_out, its_err])
        for end in (its_in, its_out, its_err):
            os.close(end)
        self.argv, self.ranks, self.returncode = argv, ranks, None
        self.stdin, self.stdout, self.stderr = open(stdin, "wb", 0), open(stdout, "rb", 0), open(stderr, "rb", 0)
        self.pid = int(self.asked.recv(64))

    def wait(self) -> int:
        """Return its exit code, when it has ended."""
        if self.returncode is None:
            self.returncode = int(self.asked.recv(64))
        return self.returncode

    def kill(self) -> None:
        """End it and, of several ranks, all of them."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL) if self.ranks > 1 else os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def communicate(self, given: bytes = b"", timeout_s: float = 600) -> tuple[bytes, bytes]:
        """Write `given` to it, and return what else it prints until it ends; raises subprocess.TimeoutExpired, and ends it."""
        assert len(given) < 2**16  # what a pipe holds
        with contextlib.suppress(BrokenPipeError):
            self.stdin.write(given)
        self.stdin.close()
        deadline = time.monotonic() + timeout_s
        read = {self.stdout: bytearray(), self.stderr: bytearray()}
        with selectors.DefaultSelector() as selector:
            for stream in read:
                selector.register(stream, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                    if raw := key.fileobj.read(2**16):
                        read[key.fileobj] += raw
                    else:
                        selector.unregister(key.fileobj)
                        key.fileobj.close()
                if time.monotonic() > deadline:
                    self.kill()
                    raise subprocess.TimeoutExpired(
                        self.argv, timeout_s, bytes(read[self.stdout]), bytes(read[self.stderr])
                    )
        self.wait()
        return bytes(read[self.stdout]), bytes(read[self.stderr])


def run(
    argv: list[str],
    cwd: Path,
    env: dict[str, str],
    timeout_s: float,
    before: str = "",
    ranks: int = 1,
    given: bytes = b"",
) -> subprocess.CompletedProcess:
    """Run a script, given by its path, in a fork of the warm process, and before it the code `before`; `given` is its input.

    If there are several `ranks`, the exit code is that of the first one that failed. Raises subprocess.TimeoutExpired.
    """
    process = Process(argv, cwd, env, before, ranks)
    said, complained = (
        raw.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n") for raw in process.communicate(given, timeout_s)
    )
    return subprocess.CompletedProcess(argv, process.returncode, said, complained)


def _become(request: dict, streams: list[int]) -> None:
    """Make this fork the script that was asked for, up to its first line."""
    import multiprocessing.context
    import multiprocessing.process

    kinds = multiprocessing.context._concrete_contexts
    kinds["spawn"] = kinds["fork"]  # a worker that is a new interpreter takes one or two seconds to start
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    # new objects, because those of the warm process were made for /dev/null, which is seekable
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = request["argv"]
    sys.path[0] = os.path.dirname(request["argv"][0])
    sys.path[1:1] = request["env"].get("PYTHONPATH", "").split(os.pathsep)
    multiprocessing.process.ORIGINAL_DIR = request["cwd"]  # spawned workers get it


def _become_rank(n: int) -> None:
    """Fork the `n` ranks of a script: each returns. This process holds their store, as torchrun does, and ends with them."""
    from torch.distributed import TCPStore

    os.setpgid(0, 0)  # so that a time limit ends all of them
    pids = []
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for rank in range(n):
        if (pid := os.fork()) == 0:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
            os.environ.update({name: str(value) for name, value in place.items()})
            return
        pids.append(pid)
    for number in range(3):
        os.close(number)  # the pipes end with the ranks
    code = 0
    while pids:
        pid, status = os.wait()
        pids.remove(pid)
        if status and not code:
            code = os.waitstatus_to_exitcode(status) & 0xFF
            for other in pids:
                os.kill(other, signal.SIGTERM)
    os._exit(code)


def _end(script: Callable[[], object]) -> None:
    """Run a script and end this process as an interpreter does, but without taking its modules apart.

    That takes half a second, since it copies all memory that is shared with the warm process.
    """
    code = 0
    try:
        script()
    except SystemExit as e:
        if not isinstance(e.code, (int, NoneType)):
            raise  # the interpreter prints it
        code = e.code or 0
    threading._shutdown()
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):  # the interpreter reports what it must
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code & 0xFF)
    sys.exit(code)


def _warm_up() -> None:
    """Import what scripts import."""
    import gc
    import importlib

    sys.path.insert(0, str(ROOT))
    for name in LIBRARIES + [f"kindling.{module}" for module in MODULES]:
        importlib.import_module(name)
    from data_pipeline import Flags  # with a config, as those of most scripts
    from kindling.cli import parse_cli

    parse_cli(Flags, "", [])  # the first time takes a third of a second longer: texts of settings, modules of tyro
    del sys.path[0]
    gc.freeze()  # garbage collection in a fork then does not copy shared memory


def _serve(asked: socket.socket) -> None:
    """For each request, fork, run the script in the fork, and send the fork's process id, then its exit code."""
    import runpy

    while True:
        raw, streams, _, _ = socket.recv_fds(asked, REQUEST_BYTES, 3)
        if not raw:
            os._exit(0)
        if (pid := os.fork()) == 0:
            asked.close()
            _become(request := json.loads(raw), streams)
            if request["ranks"] > 1:
                _become_rank(request["ranks"])
            exec(request["before"], {})
            _end(partial(runpy.run_path, sys.argv[0], run_name="__main__"))
            return
        for stream in streams:
            os.close(stream)
        asked.send(str(pid).encode())
        asked.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())


def _listen(listening: socket.socket, end: int) -> None:
    """Fork for each process of the tests that connects, until the pipe `end` is closed at its other end."""
    warm = False
    while listening in select.select([listening, end], [], [])[0]:
        asked, _ = listening.accept()
        pid_uid_gid = asked.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        if struct.unpack("3i", pid_uid_gid)[1] != os.getuid():  # such a name has no permissions
            asked.close()
            continue
        if not warm:
            _warm_up()
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
            warm = True
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listening.close()
            os.close(end)
            return _serve(asked)
        asked.close()


if __name__ == "__main__":
    _listen(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))

"""Checks that the sandbox works on this machine, before it runs any program of a model.

self_test("bwrap")    # raises SandboxError if not
"""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path
from typing import Any

from kindling.sandbox.bubblewrap import SandboxError
from kindling.sandbox.process import DEFAULT, Limits, Mode, Program, ProgramError

_PROBE = """
import os, socket

def add(a, b):
    return a + b

def listed(path):
    return os.listdir(path)

def read(path):
    return open(path).read()

def write(path):
    with open(path, "w") as f:
        return f.write("changed")

def connect(port):
    with socket.create_connection(("127.0.0.1", port), timeout=2) as s:
        s.sendall(b"hello")
    return True

def kill(pid):
    os.kill(pid, 0)
    return True

def forks(n):
    for i in range(n):
        if os.fork() == 0:
            while True:
                pass
    return True

def env():
    return sorted(os.environ)
"""


def self_test(mode: Mode, limits: Limits = DEFAULT) -> None:
    """Raise SandboxError unless a right program gives the right answer, a wrong one does not, and the sandbox confines both.

    A program's own report of what it could do is not enough: a file and a listening socket outside the sandbox must also show
    no trace.
    """
    environment = _run_a_good_and_a_bad_program(mode, limits)
    if mode == "none":
        return
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        canary = Path(folder) / "canary"
        canary.write_text("unchanged", encoding="utf-8")
        os.chmod(folder, 0o755)  # only the sandbox may stop a program, not permissions
        canary.chmod(0o666)
        listener.settimeout(0)
        for deed, call in _deeds(canary, listener.getsockname()[1], limits).items():
            with Program(_PROBE, mode, limits) as program:
                try:
                    program.call(*call)
                except ProgramError:
                    continue
            raise SandboxError(
                f"the sandbox must not let a program {deed}, but does; do not trust it, use another machine"
            )
        if _was_reached(listener) or canary.read_text(encoding="utf-8") != "unchanged":
            raise SandboxError("the sandbox must leave no trace outside, but did; do not trust it, use another machine")
    if set(environment) - {"HOME", "LANG", "LC_CTYPE", "PYTHONHASHSEED", "PWD"}:
        raise SandboxError("the sandbox must hide the environment, but does not; do not trust it, use another machine")


def _run_a_good_and_a_bad_program(mode: Mode, limits: Limits) -> list[str]:
    """Raise SandboxError unless the good program is right and the bad one wrong; return the good one's environment variables."""
    try:
        with Program(_PROBE, mode, limits) as good, Program("def add(a, b):\n    return a - b", mode, limits, 1) as bad:
            right, environment = good.call("add", 2, 3) == 5 != bad.call("add", 2, 3), good.call("env")
    except ProgramError as e:
        raise SandboxError(
            f"the sandbox must run a good program, but it fails ({e.reason}); raise the limits"
        ) from None
    if not right:
        raise SandboxError("the sandbox must tell a good program from a bad one, but does not; use another machine")
    return environment


def _deeds(canary: Path, port: int, limits: Limits) -> dict[str, tuple[Any, ...]]:
    """Return what a program must not be able to do, each with the call of the probe that tries it."""
    return {
        "read files": ("read", str(canary)),
        "read this project": ("read", __file__),
        "see processes": ("listed", "/proc"),
        "write files": ("write", str(canary)),
        "write to its root": ("write", "/canary"),
        "write to Python's own folder": ("write", str(Path(os.__file__).parent / "canary")),
        "reach the network": ("connect", port),
        "signal other processes": ("kill", os.getpid()),
        "start processes without end": ("forks", limits.processes + 1),
    }


def _was_reached(listener: socket.socket) -> bool:
    """Return whether anything has connected to a non-blocking socket."""
    try:
        listener.accept()
    except OSError:
        return False
    return True

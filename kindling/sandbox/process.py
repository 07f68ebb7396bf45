"""Runs untrusted Python in a sandbox and calls its functions.

    with Program(source, mode="bwrap") as program:
        value = program.call("add", 2, 3)

The program runs in its own process. On Linux this is under bubblewrap (0.8 or later): without network, `/proc` and
environment variables, and with read-only access to Python and the system's libraries, but to no other file (see
bubblewrap.py). The process has its own uid, limits of memory, CPU time and number of processes, and a filter of system calls
(see syscall_filter.py). It receives code and arguments and answers in JSON, which is decoded strictly. The caller compares
the answers, so no verdict ever comes from the program's process (see evaluation/check_correctness.py).

With `mode="none"` there are only the limits: a program can then read and delete what you can. Limits: the sandbox depends on
the kernel and cannot stop a program that exploits the kernel itself. Programs see the standard library, but no installed
package and no shell, and `tempfile` finds no folder.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import math
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from kindling.sandbox import bubblewrap, syscall_filter
from kindling.sandbox.bubblewrap import SandboxError

Mode = Literal["bwrap", "none"]
WORKER = Path(__file__).with_name("worker.py")
START_S = 30.0  # a process that has not started by then never will
DEATH_S = 5.0  # for a process whose pipe is closed to end; a busy machine takes its time
# bytes. From this many, building a set of numbers with equal hashes takes a second; from 2**20, a minute
MAX_ANSWER = 2**17
MAX_REASON = 200  # characters


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    cpu_s: int = 10
    """CPU seconds of each of its processes. CPU time gives the same verdict however busy the machine is."""
    wall_s: float = 28.0
    """Seconds in all, for programs that wait. Counted from the moment the sandbox is ready."""
    memory_bytes: int = 2**29
    """Address space of each of its processes."""
    disk_bytes: int = 2**24
    """The size of each file that it writes with mode="none". In the sandbox it can write no file."""
    processes: int = 3
    """Processes and threads, including itself."""


DEFAULT = Limits()


class ProgramError(BaseException):
    """The program failed. `kind` is exception, syntax, memory or timeout. An `except Exception` in a test does not catch it."""

    def __init__(self, kind: str, reason: str):
        self.kind, self.reason = kind, one_line(reason)
        super().__init__(self.kind, self.reason)


def one_line(text: str) -> str:
    """Return untrusted text as one short line of printable characters."""
    text = " ".join(text.split())[:MAX_REASON]
    return "".join(c if c.isprintable() else "?" for c in text)


class RemoteObject:
    """An object that stays in the program's process. It can be passed back, its attributes can be used, and it equals nothing."""

    __slots__ = ("_number", "_program", "_type")
    __hash__ = None  # type: ignore[assignment]  # mypy expects a method; None makes it unhashable

    def __init__(self, program: Program, number: int, type_name: str):
        for name, value in (("_program", program), ("_number", number), ("_type", type_name)):
            object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        return False

    def __ne__(self, other: object) -> bool:
        raise TypeError(f"the program answered with an object of type {self._type}, which is no plain value")

    def __bool__(self) -> bool:
        raise TypeError(f"the program answered with an object of type {self._type}, which is no plain value")

    def __getattr__(self, name: str) -> Any:
        return self._program.request("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._program.request("set", self, name, value)


class Program:
    """A program loaded in its own sandbox. Use it in a `with` statement: leaving it kills every process of the program."""

    def __init__(self, source: str, mode: Mode = "bwrap", limits: Limits = DEFAULT, slot: int = 0):
        """Start the sandbox and run the source's top level.

        `slot` is a different number for each sandbox that one process runs at the same time. Raises ProgramError if the source
        fails, SandboxError if the sandbox cannot be started.
        """
        self._limits = limits
        self._process, self._folder = _start(mode, limits, slot)
        assert self._process.stdin and self._process.stdout and self._process.stderr, "all three are pipes"
        self._requests, self._answers, self._errors = self._process.stdin, self._process.stdout, self._process.stderr
        try:
            self._deadline = time.monotonic() + START_S
            try:
                started = self._receive() == b"null"
            except ProgramError:
                started = False
            if not started:
                raise SandboxError(_broken(mode, self._ended()))
            self._deadline = time.monotonic() + limits.wall_s
            self.request("load", source)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def call(self, name: str | RemoteObject, *args: Any, **named: Any) -> Any:
        """Call a function of the program by its name and return its answer. Raises ProgramError."""
        return self.request("call", name, args, named)

    def request(self, *request: Any) -> Any:
        """Send one request and return the answer as a plain value or a RemoteObject. Raises ProgramError."""
        data = _literal(request).encode("utf-8", "surrogatepass")
        self._send(len(data).to_bytes(4, "big") + data)
        return self._decoded(self._receive())

    def _send(self, data: bytes) -> None:
        pipe = self._requests.fileno()
        while data:
            self._wait([], [pipe])
            try:
                data = data[os.write(pipe, data) :]
            except BrokenPipeError:
                raise self._death() from None

    def _receive(self) -> bytes:
        """Return the next answer."""
        length = int.from_bytes(self._read(4), "big")
        if length > MAX_ANSWER + 64:
            raise ProgramError("exception", f"an answer must have at most {MAX_ANSWER:,} bytes, but has {length:,}")
        return self._read(length)

    def _read(self, count: int) -> bytes:
        pipe, data = self._answers.fileno(), b""
        while len(data) < count:
            self._wait([pipe], [])
            piece = os.read(pipe, count - len(data))
            if not piece:
                raise self._death()
            data += piece
        return data

    def _wait(self, readable: list[int], writable: list[int]) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0 or not any(select.select(readable, writable, [], left)):
            raise ProgramError("timeout", f"took more than {self._limits.wall_s:g} s")

    def _death(self) -> ProgramError:
        """Return why the program's process ended."""
        try:
            code = self._process.wait(DEATH_S)
        except subprocess.TimeoutExpired:  # it closed the pipe but still runs
            return ProgramError("exception", "the program stopped answering")
        number = -code if code < 0 else code - 128
        if number == signal.SIGKILL:  # the limit of CPU time kills; a lack of memory raises MemoryError
            return ProgramError("timeout", f"took more than {self._limits.cpu_s} s of CPU time, or was killed")
        if number > 0 and number in set(signal.Signals):
            return ProgramError("exception", f"the process was ended by {signal.Signals(number).name}")
        return ProgramError("exception", f"the process ended by itself, with exit code {code}")

    def _decoded(self, data: bytes) -> Any:
        """Decode an answer. Any form that the worker does not write was forged by the program, and is an error."""
        try:
            answer = json.loads(data.decode("ascii"), parse_constant=_refused)
            ((kind, content),) = answer.items()
            if kind == "ok":
                return self._value(content)
            name, message = content
            if kind != "error" or not isinstance(name, str) or not isinstance(message, str):
                raise ValueError(kind)
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as e:
            raise ProgramError("exception", f"the answer is malformed ({type(e).__name__})") from None
        known = {"MemoryError": "memory", "SyntaxError": "syntax", "IndentationError": "syntax", "TabError": "syntax"}
        raise ProgramError(known.get(name, "exception"), f"{name}: {message}" if message else name)

    def _value(self, content: Any) -> Any:
        if content is None or isinstance(content, (bool, int, float, str)):
            return content
        ((tag, inner),) = content.items()
        if tag == "n":
            return {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}[inner]
        if tag == "b":
            return bytes.fromhex(inner)
        if tag == "h":
            number, type_name = inner
            if type(number) is not int or not isinstance(type_name, str):
                raise ValueError(tag)
            return RemoteObject(self, number, one_line(type_name))
        if not isinstance(inner, list):
            raise ValueError(tag)
        values = [self._value(v) for v in inner] if tag != "d" else []
        if tag == "c":
            return complex(*values)
        if tag == "d":
            return {self._value(key): self._value(value) for key, value in inner}
        return {"l": list, "t": tuple, "s": set, "f": frozenset}[tag](values)

    def _ended(self) -> str:
        """Kill the process and return what it wrote to its standard error."""
        self._kill()
        return self._errors.read(2000).decode("utf-8", "replace").strip()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # with bwrap, all processes in its namespace end
        self._process.wait()

    def close(self) -> None:
        """Kill every process of the program, and delete its files."""
        self._kill()
        for pipe in (self._requests, self._answers, self._errors):
            pipe.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)  # does not follow links that the program may have made


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _literal(value: Any) -> str:
    """Return a plain value as Python source. Raises TypeError for what cannot be sent."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str, bytes):
        return repr(value)
    if kind is complex:
        return f"complex({value.real!r},{value.imag!r})"
    if kind is type:
        name = value.__name__
        if getattr(builtins, name, None) is value:
            return name
    if kind is RemoteObject:
        return f"handles[{value._number}]"
    if kind is dict:
        return "{" + ",".join(f"{_literal(k)}:{_literal(v)}" for k, v in value.items()) + "}"
    if kind in (list, tuple, set, frozenset):
        inner = "".join(f"{_literal(v)}," for v in value)
        forms: dict[type, str] = {
            list: f"[{inner}]",
            tuple: f"({inner})",
            set: f"{{*(),{inner}}}",
            frozenset: f"frozenset(({inner}))",
        }
        return forms[kind]
    raise TypeError(f"an argument must be plain data, but is of type {kind.__name__}")


def _start(mode: Mode, limits: Limits, slot: int) -> tuple[subprocess.Popen[bytes], str | None]:
    """Start the worker in its own process group; return the process, and its folder if it has one."""
    confined = mode == "bwrap"
    uid = bubblewrap.own_uid(slot) if confined else 0
    python = [bubblewrap.interpreter(), "-s", "-S", "-P", "-B", "-c", _worker_source()]
    processes = limits.processes if confined else 0
    alarm_s = math.ceil(limits.wall_s) + 2  # ends the worker if this process is gone
    numbers = [uid, limits.memory_bytes, limits.disk_bytes, limits.cpu_s, processes, alarm_s, MAX_ANSWER]
    folder = None
    with contextlib.ExitStack() as stack:
        try:
            filter_fd = stack.enter_context(_pipe_with(syscall_filter.program() if confined else None))
            wrapper = bubblewrap.command(slot, filter_fd) if confined else []
            folder = None if confined else tempfile.mkdtemp(prefix="kindling-")  # deleted by close()
            process = subprocess.Popen(
                [*wrapper, *python, *map(str, numbers)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                cwd=folder or "/",
                # a fixed hash seed gives sets the same order each time
                env={"PYTHONHASHSEED": "0", "HOME": folder or "/", "LANG": "C.UTF-8"},
                pass_fds=() if filter_fd is None else (filter_fd,),
                start_new_session=True,
            )
        except OSError as e:
            if folder is not None:
                os.rmdir(folder)
            raise SandboxError(_broken(mode, str(e))) from None
    return process, folder


@lru_cache
def _worker_source() -> str:
    return WORKER.read_text(encoding="utf-8")


@contextlib.contextmanager
def _pipe_with(data: bytes | None) -> Iterator[int | None]:
    """Yield a file descriptor that reads the data, or None where there are none. The data must fit in a pipe."""
    if data is None:
        yield None
        return
    reading, writing = os.pipe()
    try:
        with open(writing, "wb") as f:
            f.write(data)
        yield reading
    finally:
        os.close(reading)


def _broken(mode: Mode, said: str) -> str:
    why = " ".join(said.split())[-300:] or "it ended without a word"
    if mode == "none":
        return f"a process for generated code must be able to start, but is not ({why}); see that memory is free"
    return (
        f"bubblewrap must be able to make a sandbox here, but is not ({why}); allow user namespaces (on Ubuntu: sudo sysctl "
        f"kernel.apparmor_restrict_unprivileged_userns=0), update bubblewrap to 0.8, or accept the risk of --sandbox none"
    )

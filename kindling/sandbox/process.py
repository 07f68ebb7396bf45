"""Runs untrusted Python in a sandbox and calls its functions.

    with Program(source, mode="bwrap") as program:
        value = program.call("add", 2, 3)

The program runs in its own process. On Linux this is under bubblewrap (0.8 or later): without network, `/proc` and
environment variables, and with read-only access to Python and the system's libraries, but to no other file (see
bubblewrap.py). The process has its own uid, limits of memory, CPU time and number of processes, and a filter of system calls
(see syscall_filter.py). It receives code and arguments and answers in JSON, which is decoded strictly (see values.py). The
caller compares the answers, so no verdict ever comes from the program's process (see evaluation/check_correctness.py).

With `mode="none"` there are only the limits: a program can then read and delete what you can. Limits: the sandbox depends on
the kernel and cannot stop a program that exploits the kernel itself. Programs see the standard library, but no installed
package and no shell, and `tempfile` finds no folder.
"""

from __future__ import annotations

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
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import GeneratorType
from typing import Any, Literal

from kindling.sandbox import bootstrap, bubblewrap, syscall_filter
from kindling.sandbox.arguments import SCALARS, Arguments, NotPlain
from kindling.sandbox.bubblewrap import SandboxError
from kindling.sandbox.remote import (
    QUESTIONS,
    Kept,
    RemoteAsyncIterator,
    RemoteCoroutine,
    RemoteFunction,
    RemoteIterator,
    RemoteObject,
    awaited,
    remote_generator,
)
from kindling.sandbox.values import FEW_BYTES, Answers
from kindling.sandbox.watch import Watch

Mode = Literal["bwrap", "none"]
START_S = 30.0  # a process that has not started by then never will
DEATH_S = 5.0  # for a process whose pipe is closed to end; a busy machine takes its time
MAX_ANSWER = 2**20  # bytes: a list of 150,000 numbers
MAX_ANSWERS = 2**24  # bytes of all answers of one program, for generators without end
FIELDS = SCALARS | {list, tuple, dict, set}  # attributes of an error: what a test cannot call
MIN_ANSWER = 64  # bytes that each answer counts for at least
MAX_REASON = 200  # characters


@dataclass(frozen=True)
class Limits:
    """What a `Program` may use: time, memory, files and processes."""

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


class Program:
    """A program loaded in its own sandbox. Use it in a `with` statement: leaving it kills every process of the program."""

    def __init__(
        self,
        source: str,
        mode: Mode = "bwrap",
        limits: Limits = DEFAULT,
        slot: int = 0,
        own: dict[str, type] | None = None,
    ):
        """Start the sandbox and run the source's top level.

        `slot` is a different number for each sandbox that one process runs at the same time. `own` are classes that the program
        shares with the caller, by name. Raises ProgramError if the source fails, SandboxError if the sandbox cannot be started.
        """
        self._limits, self._own, self._bytes_left = limits, own or {}, MAX_ANSWERS
        self._generators: weakref.WeakKeyDictionary[Any, RemoteObject] = weakref.WeakKeyDictionary()
        self._objects: weakref.WeakValueDictionary[int, RemoteObject] = weakref.WeakValueDictionary()
        self._kept = Kept()
        self._watch = Watch(limits.cpu_s, self._fail)
        self.failure: ProgramError | NotPlain | None = None
        """What no `except` in a test may undo: the program ended or broke a rule, or it could not be asked."""
        self._process, self._folder = _start(mode, limits, slot)
        assert self._process.stdin and self._process.stdout and self._process.stderr, "all three are pipes"
        self._requests, self._answers, self._errors = self._process.stdin, self._process.stdout, self._process.stderr
        try:
            self._deadline = time.monotonic() + START_S
            try:
                self._send(bootstrap.worker_code())
                started = self._receive() == b"null"
            except ProgramError:
                started = False
            if not started:
                raise SandboxError(_broken(mode, self._ended()))
            self._deadline = time.monotonic() + limits.wall_s
            self._ask("load", source, list(self._own))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def call(self, name: str | RemoteObject, *args: Any, **named: Any) -> Any:
        """Call a function of the program by its name and return its answer. Raises ProgramError, also for its own errors."""
        target: Any = self.function(name) if isinstance(name, str) else name
        try:
            return target(*args, **named)
        except BaseException as e:
            raise getattr(e, "of_program", e) from None

    def function(self, name: str) -> RemoteFunction:
        """Return a function or class of the program. It is looked up when it is used."""
        return RemoteFunction(self, name, "function")

    def handle(self, value: Any) -> tuple[int | str, str]:
        """Return the number and the type of an object of the program. Raises TypeError for any other value."""
        if isinstance(value, GeneratorType):
            value = self._generators.get(value)
        if not isinstance(value, RemoteObject):
            raise TypeError(
                f"an object of the program's was expected, but the answer is of type {type(value).__name__}"
            )
        return value._number, value._type

    def request(self, *request: Any) -> Any:
        """Send one request and return the answer as a plain value, or an object of remote.py.

        What the call has changed in its arguments is written into them. Raises the error that the program raised, as one of the
        same builtin class, with its ProgramError in `of_program`; or ProgramError if it did not answer, and NotPlain if it
        cannot be asked. These last two stay in `failure`.
        """
        try:
            return self._ask(*request)
        except (ProgramError, NotPlain) as e:
            self.failure = self.failure or e
            raise

    def _ask(self, *request: Any) -> Any:
        if isinstance(self.failure, ProgramError):  # a test that has caught it asks on
            raise self.failure
        handles = self._handles(request)
        kept = self._kept.of(handles)
        arguments = Arguments(self._own, self._known, [self._kept.objects[i] for i in kept])
        data = arguments.encode(request, self._kept.is_last_kept, kept)
        self._send(len(data).to_bytes(4, "big") + data)
        self._made: list[int] = []
        try:
            return self._decoded(self._receive(), arguments.given, request[0])
        finally:
            self._kept.add(arguments.given[len(kept) :], kept, [*handles, *self._made])

    def _handles(self, request: tuple[Any, ...]) -> list[int]:
        """Return the numbers of the program's objects that a request uses."""
        used = [*request[1:2], *([*request[2], *request[3].values()] if request[0] == "call" else request[2:])]
        return [number for number in map(self._known, used) if isinstance(number, int)]

    def _known(self, value: Any) -> int | str | None:
        """Return the number of an object of the program, or None for any other value."""
        if isinstance(value, GeneratorType):
            value = self._generators.get(value)
        return value._number if isinstance(value, RemoteObject) else None

    def _remote(self, tag: str, number: int, type_name: str) -> Any:
        """Return an object of the program's."""
        self._made.append(number)
        if (known := self._objects.get(number)) is not None:  # the same object is the same here
            return known
        kind = {"x": RemoteIterator, "w": RemoteCoroutine, "C": RemoteFunction, "A": RemoteAsyncIterator}.get(
            tag, RemoteObject
        )
        remote = kind(self, number, one_line(type_name))
        if tag != "G":
            self._objects[number] = remote
            return remote
        generator = remote_generator(remote)
        self._generators[generator] = remote
        return generator

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
        self._bytes_left -= max(length, MIN_ANSWER)
        if self._bytes_left < 0:
            raise ProgramError(
                "exception", f"all answers together must have at most {MAX_ANSWERS:,} bytes, but have more"
            )
        return self._read(length)

    def _read(self, count: int) -> bytes:
        pipe, pieces = self._answers.fileno(), []
        while count:
            self._wait([pipe], [])
            piece = os.read(pipe, count)
            if not piece:
                raise self._death()
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)

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

    def _decoded(self, data: bytes, given: list[Any], action: str) -> Any:
        """Decode an answer. Any form that the worker does not write was forged by the program, and is an error."""
        try:
            answer = json.loads(data.decode("ascii"), parse_constant=_refused)
            decoder = Answers(self._own, given, self._remote, len(data) > FEW_BYTES, self._watch.start)
            behind = answer.pop("changed", []), answer.pop("made", [])
            ((kind, content),) = answer.items()
            if kind == "ok":
                return decoder.decode(content, *behind)
            names, message, told = content
            if kind not in ("error", "unable") or not all(isinstance(text, str) for text in [*names, message]):
                raise ValueError(kind)
            told, name = decoder.decode(told, *behind), names[0]
            if type(told) is not tuple or type(told[1]) is not dict:  # an object of the program's would be asked now
                raise ValueError(kind)
            fields = {k: v for k, v in told[1].items() if k not in QUESTIONS and type(v) in FIELDS}
        except Exception as e:
            raise ProgramError("exception", f"the answer is malformed ({type(e).__name__})") from None
        known = {"MemoryError": "memory", "SyntaxError": "syntax", "IndentationError": "syntax", "TabError": "syntax"}
        error = ProgramError(known.get(name, "exception"), f"{name}: {message}" if message else name)
        if action == "load" or kind == "unable":  # not an error that the program raised in a call
            raise error
        # elsewhere a StopIteration would end the test's own loop in silence
        raised = awaited(error, names, message, told[0], self._own, fields)
        if isinstance(raised, (StopIteration, StopAsyncIteration)) and action not in ("next", "send", "anext"):
            raised = None
        raise error if raised is None else raised

    def _fail(self, kind: str, reason: str) -> None:
        """End what the test does now, and never let it pass."""
        self.failure = self.failure or ProgramError(kind, reason)
        raise self.failure

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
        self._watch.stop()
        self.failure = self.failure or ProgramError("exception", "the program was closed")
        self._kill()
        for pipe in (self._requests, self._answers, self._errors):
            pipe.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)  # does not follow links that the program may have made


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _start(mode: Mode, limits: Limits, slot: int) -> tuple[subprocess.Popen[bytes], str | None]:
    """Start the worker in its own process group; return the process, and its folder if it has one."""
    confined = mode == "bwrap"
    uid = bubblewrap.own_uid(slot) if confined else 0
    python = [bubblewrap.interpreter(), "-s", "-S", "-P", "-B", "-c", bootstrap.source()]
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

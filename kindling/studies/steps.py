"""The steps of a study, and the runner: the real scripts as child processes, in the study's folder.

    code = run_steps(steps, Path("studies/000"), "python study.py 000")

Each command is recorded before it starts, so a second start knows what is done, and resumes what was stopped. The output of a
step goes to logs/NAME.log. A step that fails stops only the steps that come after it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from kindling.errors import KindlingError
from kindling.files import locked, write_atomic
from kindling.paths import PROJECT

RECORDS, LOGS, LOCK = "steps.json", "logs", ".lock"
SIGHUP = getattr(signal, "SIGHUP", None)  # of a terminal that closes; Windows has none
LINE = 100  # columns of a line of progress


class StudyError(KindlingError):
    """A study that cannot be planned or run."""


@dataclass(frozen=True)
class Step:
    """One command of a study."""

    name: str
    """Unique in the study."""
    script: str
    """Such as "main.py", or a module for `python -m`."""
    arguments: tuple[str, ...]
    """Its flags, as a user would type them in the study's folder."""
    output: str
    """The file, relative to the study's folder, that is there once the step is done. `?` stands for any character."""
    after: tuple[str, ...] = ()
    """Names of steps that must have succeeded."""
    seconds: float = 0.0
    """How long it takes, as estimated."""
    about: str = ""
    """What it does, for the table of the plan: size and tokens."""
    reads: tuple[str, ...] = ()
    """Names of steps whose results it takes as far as they are there. It runs again after one of them."""

    def wrote(self, folder: Path) -> bool:
        """Return whether the output is there."""
        return any(folder.glob(self.output))

    @property
    def command(self) -> str:
        """The command as a user would type it."""
        return shlex.join(["python", *([] if self.script.endswith(".py") else ["-m"]), self.script, *self.arguments])


@dataclass
class Record:
    """What is known of a step that was started."""

    command: str
    seconds: float = 0.0
    """Time of all starts together."""
    code: int | None = None
    """The exit code of the newest start. None: it did not end, as after a kill."""


class Records:
    """What was started in a study's folder, by step; in RECORDS."""

    def __init__(self, folder: Path):
        """Read the records. Raises StudyError if they are damaged."""
        self.path = folder / RECORDS
        self.of: dict[str, Record] = {}
        if self.path.is_file():
            try:
                self.of = {name: Record(**found) for name, found in json.loads(self.path.read_text("utf-8")).items()}
            except (OSError, ValueError, TypeError, AttributeError) as e:
                raise StudyError(
                    f"{self.path} must be as study.py wrote it, but cannot be read ({e}); give another --out"
                ) from None

    def save(self) -> None:
        """Write the records. Raises StudyError if the disk is full or the folder cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(
                self.path, json.dumps({name: asdict(found) for name, found in self.of.items()}, indent=1) + "\n"
            )
        except OSError as e:
            raise StudyError(
                f"{self.path} must be writable, but is not ({e.strerror}); free some space or correct its permissions"
            ) from None

    def done(self, step: Step) -> bool:
        """Return whether a step is done: its command ended well, and its output is there."""
        known = self.of.get(step.name)
        same = known is not None and known.command == step.command and known.code == 0
        return same and step.wrote(self.path.parent)


def require_plan(steps: list[Step], folder: Path) -> None:
    """Raise StudyError if steps are not in order, or if the folder holds runs of another plan."""
    before: set[str] = set()
    for step in steps:
        if step.name in before or not set(step.after) <= before:
            raise StudyError(f"step {step.name} must be unique, and come after {', '.join(step.after)}, but is not")
        before.add(step.name)
    for step in steps:
        known = Records(folder).of.get(step.name)
        if known is not None and known.command != step.command:
            raise StudyError(
                f"{folder} must be empty or hold this plan, but its step {step.name} is of another one "
                f"({known.command[:120]}); give another --out, or the --minutes that it was planned with"
            )


class Child:
    """The child process that runs now, to which signals are passed on."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.signal: int | None = None

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """Note a signal and send it to the child, which saves and stops by itself. It knows SIGTERM, but not SIGHUP."""
        self.signal = number
        if number == SIGHUP:  # nobody reads any more, and writing would fail
            sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM if number == SIGHUP else number)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Pass SIGINT and SIGTERM on, and SIGHUP, which a closed terminal sends, unless it is ignored, as under nohup."""
        wanted = [signal.SIGINT, signal.SIGTERM]
        if SIGHUP is not None and signal.getsignal(SIGHUP) is not signal.SIG_IGN:
            wanted.append(SIGHUP)
        previous = {s: signal.signal(s, self.pass_on) for s in wanted}
        try:
            yield
        finally:
            for s, handler in previous.items():
                signal.signal(s, handler)


class Line:
    """One line of progress: on a terminal it is rewritten, elsewhere only its end is printed."""

    def __init__(self, head: str):
        self.head, self.live, self._shown = head, sys.stdout.isatty(), 0.0
        if not self.live:
            print(f"{head} ...", flush=True)

    def show(self, text: str) -> None:
        """Show what the child said last, five times a second at most."""
        if self.live and time.monotonic() - self._shown > 0.2:
            self._shown = time.monotonic()
            with contextlib.suppress(OSError):  # the terminal is gone; its signal is on the way
                print(f"\r\x1b[K{f'{self.head}: {text}'[: LINE - 1]}", end="", flush=True)

    def end(self, text: str) -> None:
        """Print how the step ended."""
        print(f"{chr(13)}\x1b[K{self.head}: {text}" if self.live else f"{self.head}: {text}", flush=True)


@contextmanager
def only_study(folder: Path) -> Iterator[None]:
    """Hold the lock of a study's folder. Raises StudyError if another study runs there, or if it cannot be written."""
    busy = StudyError(
        f"{folder} must be used by one study at a time, but another one runs there; wait for it, or give another --out"
    )

    def unwritable(e: OSError) -> StudyError:
        return StudyError(
            f"{folder} must be a folder that can be written, but is not ({e.strerror}); give another --out"
        )

    with locked(folder / LOCK, busy, unwritable):
        yield


def run_steps(steps: list[Step], folder: Path, resume: str = "the same command", scripts: Path = PROJECT) -> int:
    """Run the steps that are not done, in order; return 0, 1 if some failed, or 128 plus the number of a signal.

    `resume` is the command that goes on after a signal. Raises StudyError if the folder holds another plan.
    """
    require_plan(steps, folder)
    records, child = Records(folder), Child()
    ended: dict[str, bool] = {}
    fresh: set[str] = set()  # steps that ran now
    with child.signals():
        for number, step in enumerate(steps, 1):
            head = f"[{number}/{len(steps)}] {step.name}"
            if records.done(step) and fresh.isdisjoint(step.reads):
                ended[step.name] = True
                print(f"{head}: done before", flush=True)
                continue
            if failed := [name for name in step.after if not ended[name]]:
                ended[step.name] = False
                print(f"{head}: left out, as {', '.join(failed)} failed", flush=True)
                continue
            if child.signal is None:
                fresh.add(step.name)
                ended[step.name] = _run(step, folder, scripts, records, child, head)
            if child.signal is not None:
                print(f"stopped in step {step.name}; {resume} goes on from here", flush=True)
                return 128 + child.signal
    failed = [name for name, well in ended.items() if not well]
    if failed:
        print(f"{len(failed)} of {len(steps)} steps failed or were left out; {resume} tries them again", flush=True)
    return int(bool(failed))


def _run(step: Step, folder: Path, scripts: Path, records: Records, child: Child, head: str) -> bool:
    """Run one step; return whether it succeeded."""
    known = records.of.setdefault(step.name, Record(step.command))
    known.code = None
    records.save()
    line, started = Line(f"{head}, about {duration(step.seconds)}"), time.monotonic()
    log = folder / LOGS / f"{step.name}.log"
    try:
        log.parent.mkdir(exist_ok=True)
        with open(log, "ab", buffering=0) as file:
            last = _stream(step, folder, scripts, child, file, line)
    except OSError as e:
        last = f"{log} must be writable, but is not ({e.strerror}); free some space"
        _end(child)
    seconds = time.monotonic() - started
    code = -1 if child.process is None else child.process.wait()
    child.process = None
    known.seconds += seconds
    known.code = code
    if child.signal is not None and code != 0:
        known.code = None  # stopped, not failed
    well = code == 0 and step.wrote(folder)
    if well:
        line.end(f"done in {duration(seconds)}")
    elif known.code is None:
        line.end(f"stopped after {duration(seconds)}")
    else:
        why = f"it ended well, but wrote no {step.output}" if code == 0 else last or f"exit code {code}"
        line.end(f"FAILED after {duration(seconds)}: {why} (all in {log})")
    records.save()
    return well


def _stream(step: Step, folder: Path, scripts: Path, child: Child, log: Any, line: Line) -> str:
    """Start a step and write what it prints to the log, until it ends; return its last error, or its last line.

    The child is in a process group of its own: a Ctrl-C in the terminal reaches it once, from here.
    """
    log.write(f"$ {step.command}\n".encode())
    program = [str(scripts / step.script)] if step.script.endswith(".py") else ["-m", step.script]
    child.process = subprocess.Popen(
        [sys.executable, *program, *step.arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(scripts), os.environ.get("PYTHONPATH")]))},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        process_group=0,
    )
    assert child.process.stdout is not None
    rest, last, error = "", "", ""
    while chunk := os.read(child.process.stdout.fileno(), 1 << 16):
        log.write(chunk)
        *lines, rest = (rest + chunk.decode("utf-8", "replace")).replace("\r", "\n").split("\n")
        for text in filter(str.strip, lines):
            last = text.strip()
            error = last if last.startswith("error:") else error
        line.show(last)
    return error or rest.strip() or last


def _end(child: Child) -> None:
    """End a child whose output cannot be written, as a user would: it saves what it can. A second signal would end it at once."""
    if child.process is not None and child.process.poll() is None:
        if child.signal is None:
            child.process.send_signal(signal.SIGTERM)
        assert child.process.stdout is not None
        while os.read(child.process.stdout.fileno(), 1 << 16):
            pass


def duration(seconds: float) -> str:
    """Return a time for people: 40 s, 12.5 min, 3.2 h, 4.1 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.1f} days"

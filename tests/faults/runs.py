"""Runs of a second to do harm to: the real scripts with a tiny model, as whole processes and as forks of this one.

    child = Forked("main.py", flags, work)
    child.wait_for_step(5)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.saved                    # the steps whose checkpoints were acknowledged

A fork starts in a third of a second, as torch is imported already; it goes through the script's own `main` and `run_script`,
so that all but the interpreter's start is what a user has.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import select
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch._dynamo  # noqa: F401  # here, so that no fork has to: an optimiser's first step imports it
import torch.utils.tensorboard  # noqa: F401
from conftest import ROOT, tiny_flags

import main  # noqa: F401
from kindling import cli
from kindling.runs.checkpoint import RunDirectory, load_state, load_weights, verify, weights_sha256
from kindling.stopping import exit_on_sigterm
from kindling.training import (
    start_or_resume,  # noqa: F401
    trainer,
)
from model import build_model

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
LINE_BYTES = 512  # which a pipe takes whole
LAUNCHER = f"""
import runpy, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from faults.runs import tell_of_progress
tell_of_progress(int(sys.argv[1]))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def flags(corpus: Path, name: str, **train: object) -> list[str]:
    """The command line of a tiny run without samples: tiny_flags with a checkpoint of 0.4 MB, and `train` besides."""
    fixed = ["--model.bigram-rows", "64", "--data.decontaminate", "--train.sample-prompts", "--name", name]
    given = [word for key, value in train.items() for word in (f"--train.{key.replace('_', '-')}", str(value))]
    return [*tiny_flags(corpus), *fixed, *given]


def say(pipe: int, *what: object) -> None:
    """Tell the parent; a line is in the pipe as a whole or not at all, whenever the process is killed."""
    os.write(pipe, (" ".join(map(str, what)) + "\n").encode()[:LINE_BYTES])


def tell_of_progress(pipe: int) -> None:
    """Have this process tell its parent of each step begun, and of each checkpoint once its save has returned."""
    save, launch = RunDirectory.save, trainer.Trainer.launch_step

    def saved(run, *given, **named):
        folder = save(run, *given, **named)
        say(pipe, "saved", int(folder.name.removeprefix("step_")))
        return folder

    def launched(self):
        say(pipe, "step", self.state.step)
        return launch(self)

    RunDirectory.save, trainer.Trainer.launch_step = saved, launched


@dataclass
class Forked:
    """One of the project's scripts in a fork of this process, in the folder `work`.

    `harm` is called in the fork before the script, with the pipe's end to `say` things through. `whole`: a new interpreter
    instead, which cannot be harmed from within.
    """

    script: str
    argv: list[str]
    work: Path
    harm: Callable[[int], None] | None = None
    whole: bool = False
    lines: list[list[str]] = field(default_factory=list)  # what the fork said
    code: int | None = None  # 128 and the number of the signal that ended it, or its exit code
    started_s: float | None = None  # until its first step

    def __post_init__(self) -> None:
        # pipes, as a file of what is printed would be limited where files are
        (self._said, writer), (self._printed, out) = os.pipe(), os.pipe()
        self._rest, self._text = b"", b""
        self._began = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            self._be_the_script(writer, out)
        for end in (writer, out):
            os.close(end)

    def _be_the_script(self, writer: int, out: int) -> None:
        code = 70
        try:
            os.setpgid(0, 0)
            for end in (self._said, self._printed):
                os.close(end)
            for stream in (1, 2):
                os.dup2(out, stream)
            sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", buffering=1, closefd=False) for n in (1, 2))
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.chdir(self.work)
            if self.whole:
                os.set_inheritable(writer, True)
                os.execv(
                    sys.executable, [sys.executable, "-c", LAUNCHER, str(writer), str(ROOT / self.script), *self.argv]
                )
            sys.argv = [self.script, *self.argv]
            tell_of_progress(writer)
            if self.harm is not None:
                self.harm(writer)
            module = importlib.import_module(self.script.removesuffix(".py"))
            exit_on_sigterm()
            try:
                cli.run_script(lambda: module.main(self.argv))
            except SystemExit as e:
                code = e.code if isinstance(e.code, int) else int(bool(e.code))
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def _read(self, timeout_s: float) -> bool:
        """Take in what the fork said and printed; return False once it has closed its end of what it says."""
        ready = select.select([self._said, self._printed], [], [], timeout_s)[0]
        if self._printed in ready:
            self._text += os.read(self._printed, 65536)
        if self._said not in ready:
            return True
        raw = os.read(self._said, 65536)
        self._rest += raw
        *lines, self._rest = self._rest.split(b"\n")
        self.lines += [line.decode().split() for line in lines]
        if self.started_s is None and self.numbers("step"):
            self.started_s = time.monotonic() - self._began
        return bool(raw)

    def numbers(self, what: str) -> list[int]:
        """The numbers that the fork said after the word `what`."""
        return [int(line[1]) for line in self.lines if line[0] == what]

    @property
    def saved(self) -> list[int]:
        """The steps whose saves had returned."""
        return self.numbers("saved")

    def wait_for_step(self, step: int, timeout_s: float = 60) -> bool:
        """Wait until the fork begins a step of at least this number; return whether it does before it ends."""
        deadline = time.monotonic() + timeout_s
        while not any(n >= step for n in self.numbers("step")):
            assert time.monotonic() < deadline, self.text
            if not self._read(0.05):
                return False
        return True

    def wait(self, timeout_s: float = 100) -> int:
        """Wait for the end and return `code`; a fork that takes longer is killed and fails the test."""
        deadline = time.monotonic() + timeout_s
        while self._read(0.05) and time.monotonic() < deadline:
            pass
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                self.code = 128 - self.code if self.code < 0 else self.code
            elif time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"{self.script} took over {timeout_s} s:\n{self.text}")
            else:
                time.sleep(0.002)
        while select.select([self._printed], [], [], 0)[0] and (raw := os.read(self._printed, 65536)):
            self._text += raw
        for end in (self._said, self._printed):
            os.close(end)
        return self.code

    def kill_after(self, delay_s: float) -> bool:
        """Let it run this long, then kill it by SIGKILL; return False if it had ended before."""
        deadline = time.monotonic() + delay_s
        while (left := deadline - time.monotonic()) > 0:
            if not self._read(left):
                break
        os.kill(self.pid, signal.SIGKILL)  # a process that nobody waited for is still there
        return self.wait() == 128 + signal.SIGKILL

    @property
    def text(self) -> str:
        """What it printed, on both streams."""
        return self._text.decode("utf-8", errors="replace")

    @property
    def digest(self) -> str:
        """The sha256 of weights and optimiser that a run names when it ends."""
        return re.search(r"state sha256 (\w+)", self.text)[1]

    @property
    def error(self) -> str:
        """The one `error:` line that it ended with; fails the test if there is none, or more than that."""
        assert "Traceback" not in self.text, self.text
        errors = [line for line in self.text.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and self.code != 0, (self.code, self.text)
        return errors[0]


def completed(script: str, argv: list[str], work: Path, harm: Callable[[int], None] | None = None) -> Forked:
    """Run a script to its end, which must be a good one."""
    child = Forked(script, argv, work, harm)
    assert child.wait() == 0, child.text
    return child


def stopping_at(step: int) -> Callable[[int], None]:
    """Return what sends a process SIGTERM while the step with this number, from 1, is under way."""

    def harm(pipe: int) -> None:
        launch = trainer.Trainer.launch_step

        def launched(self):
            if self.state.step == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return launch(self)

        trainer.Trainer.launch_step = launched

    return harm


def unloadable(run: RunDirectory) -> list[str]:
    """Return what is wrong with the checkpoints that stand under a final name: all of them must verify and load."""
    problems = []
    for folder in run.checkpoints():
        try:
            verify(folder)
            load_weights(folder, build_model(run.config().model))
            if load_state(folder)["step"] != int(folder.name.removeprefix("step_")):
                problems.append(f"{folder.name} is of another step")
        except Exception as e:  # whatever it is, it is the finding
            problems.append(f"{folder.name}: {type(e).__name__}: {e}")
    return problems


def newest_step(run: RunDirectory) -> int:
    """Return the step of the newest whole checkpoint, 0 if there is none."""
    folder = run.newest()
    return 0 if folder is None else int(folder.name.removeprefix("step_"))


def final_weights(run: RunDirectory) -> str:
    """Return the sha256 of the newest weights."""
    return weights_sha256(run.newest())


def damage(raw: bytes, rng: random.Random) -> bytes:
    """Return the bytes with one bit flipped, or cut short: one in three."""
    if rng.randrange(3) == 0:
        return raw[: rng.randrange(len(raw))]
    changed = bytearray(raw)
    changed[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def same_json(raw: bytes, original: bytes) -> bool:
    """Return whether a file of JSON still says all that it said, but for the hash of that: white space, such as."""
    try:
        said, says = json.loads(original), json.loads(raw)
    except ValueError:
        return False
    return isinstance(says, dict) and all(says.get(key) == value for key, value in said.items() if key != "sha256")

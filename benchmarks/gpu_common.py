"""What the sections of gpu.py share: the settings of a run, its clock, and the processes that it starts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from child import Child, short

ROOT = Path(__file__).resolve().parent.parent
MANY_CORES = 8  # from here on, a section is prepared while the one before it runs


@dataclass
class Plan:
    """The settings of one run of gpu.py."""

    device: str
    toy: bool
    corpus: Path | None
    """A folder with source.jsonl.gz, instructions.jsonl.gz and starcoder2_tokenizer.json. None: this machine's Python."""
    out: Path
    work: Path
    """A temporary folder, for runs and caches."""
    ends: float
    """When all must be done, by time.perf_counter."""
    save: Callable[[], None] = lambda: None
    """Writes the results that there are so far."""
    found: dict[str, Any] = field(default_factory=dict)
    """The results, by section."""

    @property
    def left_s(self) -> float:
        """Seconds that are left for all sections."""
        return self.ends - time.perf_counter()


class Section(Protocol):
    """A part of gpu.py that stands alone."""

    name: str

    def prepare(self, plan: Plan) -> None:
        """Start, in the background, what is not measured."""

    def run(self, plan: Plan, limit_s: float) -> None:
        """Measure for at most `limit_s` seconds, and add what is found to `plan.found[self.name]` as it comes."""

    def close(self) -> None:
        """End what is still running."""


class Command:
    """A script that runs in the background, with its output in a file."""

    def __init__(self, argv: Sequence[str | Path], log: Path, cwd: Path, env: dict[str, str] | None = None):
        """Run `argv` with this Python, in `cwd`."""
        self.log, self.started, self.took_s = log, time.perf_counter(), 0.0
        with open(log, "w", encoding="utf-8") as out:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, argv)],
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path_of_modules(), **(env or {})},
                start_new_session=True,  # so that its processes end with it
            )

    def wait(self, limit_s: float) -> str:
        """Wait for its end; return "" if it succeeded, else the reason. After `limit_s` seconds it is killed."""
        try:
            code = self.process.wait(max(0.1, limit_s))
        except subprocess.TimeoutExpired:
            self.kill()
            return f"not finished after {time.perf_counter() - self.started:.0f} s"
        finally:
            self.took_s = time.perf_counter() - self.started
        return "" if code == 0 else f"exit code {code}: {self.last_line()}"

    def kill(self) -> None:
        """End it and its processes at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def output(self) -> str:
        """Return what it has printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def last_line(self) -> str:
        """Return its last error, or else the last line that it printed."""
        return short(self.output()) or "nothing was printed"


IN_TURN = """
import json, subprocess, sys
first, *others = json.loads(sys.argv[1])
code = subprocess.call([sys.executable, *first])
for argv in others if code == 0 else []:
    subprocess.call([sys.executable, *argv])
sys.exit(code)
"""


def in_turn(*commands: Sequence[str | Path]) -> list[str]:
    """Return the arguments of a Command that runs several, while the first succeeds. Only the first counts."""
    return ["-c", IN_TURN, json.dumps([[str(word) for word in command] for command in commands])]


def start_worker(script: str, arguments: list[Any], log: Path, **env: str) -> Child:
    """Start a file of this folder as a process that answers requests, with `arguments` as JSON."""
    path = os.pathsep.join([path_of_modules(), str(ROOT / "benchmarks")])
    return Child([sys.executable, script, json.dumps(arguments)], log, {**os.environ, "PYTHONPATH": path, **env})


def source_flags(corpus: Path | None, max_bytes: int | None) -> list[str]:
    """Return the flags of the data's source: source.jsonl.gz of the folder `corpus`, or this machine's Python."""
    if corpus is not None:
        flags = ["--data.sources.0.kind", "jsonl", "--data.sources.0.path", str(corpus / "source.jsonl.gz")]
    else:
        flags = ["--data.sources.0.kind", "local-python", "--data.sources.0.path", "None"]
    return flags + ([] if max_bytes is None else ["--data.sources.0.max-bytes", str(max_bytes)])


def logged_figures(run: Path) -> dict[str, Any]:
    """Return the speed, loss and tokens of a trained run from its metrics.jsonl; nothing if no step or no loss is in it."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "tokens_per_s" in line]
    evaluated = [line for line in lines if "val_loss" in line]
    if not steps or not evaluated:
        return {}
    return {
        "seconds": steps[-1]["elapsed_s"],
        "steps": steps[-1]["step"],
        "tokens": steps[-1]["tokens"],
        "tokens_per_s": sorted(line["tokens_per_s"] for line in steps)[len(steps) // 2],
        "skipped_steps": steps[-1]["skipped_steps"],
        "val_loss": evaluated[-1]["val_loss"],
        "bits_per_byte": evaluated[-1]["val_bits_per_byte"],
    }


def keep_logs(plan: Plan) -> None:
    """Pack what the processes have printed into logs.tar.gz, as the folder of the runs is removed at the end."""
    with tarfile.open(plan.out / "logs.tar.gz", "w:gz") as tar:
        for path in sorted(plan.work.glob("*.log")):
            tar.add(path, arcname=path.name)


def path_of_modules() -> str:
    """Return PYTHONPATH with the project first, so that a script finds it from any folder."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))


def say(text: str) -> None:
    """Print a line at once, with the time of day."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)

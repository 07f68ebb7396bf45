"""The frame of the fault suite: what a test records becomes a line of one table.

    def test_something(record):
        ...
        record("kill -9", tried=200, found=200, lost=0, seconds=80.0, note="")

Only a session that ran the whole suite, and in which nothing failed, writes faults.json and faults.md into
benchmarks/results/local/; any other prints its lines and leaves the files alone.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT, script

HERE = Path(__file__).resolve().parent
COLUMNS = ["fault", "tried", "as promised", "lost", "seconds"]
INTRODUCTION = (
    "As promised: the damage was found and said, or the state afterwards is whole, and the run ends in the bits of one that "
    "nothing disturbed. Lost: acknowledged checkpoints that were gone, and damage or differences that went unnoticed."
)


@pytest.fixture
def record(request):
    """Add a line to the table of faults: of `tried` faults `found` ended as promised, and `lost` lost or hid something."""

    def add(fault: str, tried: int, found: int, lost: int, seconds: float, note: str = "") -> None:
        line = {
            "fault": fault,
            "tried": tried,
            "found": found,
            "lost": lost,
            "seconds": round(seconds, 1),
            "note": note,
        }
        request.node.user_properties.append(("fault", line))  # which xdist carries to the process that reports

    return add


@pytest.fixture(scope="session")
def work(tmp_path_factory, corpus) -> Path:
    """A folder in which `main.py` has built the data and trained the run `base` of 12 steps, with checkpoints 4, 8 and 12.

    `base.digest` is what that run ended with.
    """
    from faults.runs import flags

    folder = tmp_path_factory.mktemp("faults")
    result = script("main.py", *flags(corpus, "base", save_every=4, keep_checkpoints=3), cwd=folder)
    assert result.returncode == 0, result.stderr
    digest = re.search(r"state sha256 (\w+)", result.stdout)[1]
    (folder / "base.digest").write_text(digest, encoding="utf-8")
    return folder


class Table:
    """Gathers the lines of a session."""

    def __init__(self, whole: bool):
        self.whole = whole
        self.lines: dict[str, list[dict]] = {}  # by the file of the tests
        self.failed = False

    def pytest_runtest_logreport(self, report) -> None:
        self.failed |= report.failed
        if report.when == "call":
            lines = [line for name, line in report.user_properties if name == "fault"]
            self.lines.setdefault(report.nodeid.partition("::")[0], []).extend(lines)

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if not any(self.lines.values()):
            return
        sys.path.insert(0, str(ROOT))
        from kindling.tables import Section, as_text

        lines = [line for file in sorted(self.lines) for line in self.lines[file]]
        section = Section("Faults", COLUMNS, [cells(line) for line in lines], notes(lines))
        terminalreporter.write_line(as_text([], [section]))
        missing = {p.name for p in HERE.glob("test_*.py")} - {Path(file).name for file in self.lines}
        if self.whole and not self.failed and not missing:
            terminalreporter.write_line(f"written to {write(lines)}")
        else:
            terminalreporter.write_line("not the whole suite, or not all of it passed: nothing was written")


def cells(line: dict) -> list[str]:
    """Return the cells of a line of the table."""
    numbers = [f"{line[name]:,}" for name in ("tried", "found", "lost")]
    return [line["fault"], *numbers, f"{line['seconds']:.0f}"]


def notes(lines: list[dict]) -> list[str]:
    """Return what is to be said to the lines."""
    return [f"{line['fault']}: {line['note']}" for line in lines if line["note"]]


def write(lines: list[dict]) -> Path:
    """Write the table for people and for the README; return its path."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from machine import Watch, phrase, results_file

    from kindling.tables import Section, as_markdown

    machine = Watch().describe()
    content = {"machine": machine, "faults": lines}
    results_file("faults.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    section = Section("The table", COLUMNS, [cells(line) for line in lines], notes(lines))
    text = as_markdown("Faults", [INTRODUCTION, f"Machine: {phrase(machine)}", "Command: make test-faults"], [section])
    path = results_file("faults.md")
    path.write_text(text.rstrip() + "\n", encoding="utf-8")
    return path


def pytest_configure(config) -> None:
    """Gather the lines, in the process that reports."""
    if hasattr(config, "workerinput"):
        return
    chosen = config.option.keyword or config.getoption("deselect", None) or config.getoption("lf", False)
    places = {(config.invocation_params.dir / arg).resolve() for arg in config.args}
    whole = not chosen and places <= {HERE, HERE.parent, ROOT} and config.option.markexpr == "faults"
    config.pluginmanager.register(Table(whole), "faults-table")

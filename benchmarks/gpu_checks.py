"""The section `right` of gpu.py: the tests of tests/gpu, in several processes at a time."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from gpu_common import ROOT, Command, Plan, say

PARTS = {  # by name: the file, and which of its tests
    "numbers, fp32": ("test_numbers.py", "fp32 and not compiled"),
    "numbers, fp32, compiled": ("test_numbers.py", "fp32 and compiled"),
    "numbers, bf16": ("test_numbers.py", "bf16 and not compiled"),
    "numbers, bf16, compiled": ("test_numbers.py", "bf16 and compiled"),
    "numbers, fp16": ("test_numbers.py", "fp16 and not compiled"),
    "numbers, fp16, compiled": ("test_numbers.py", "fp16 and compiled"),
    "attention and decoding": ("test_attention.py", ""),
    "steps": ("test_steps.py", ""),
    "stop and resume": ("test_runs.py", "stopped"),
    "whole runs": ("test_runs.py", "not stopped"),
}


class Checks:
    """Runs the tests, and counts what passed."""

    name = "right"

    def __init__(self) -> None:
        self.commands: dict[str, Command] = {}

    def prepare(self, plan: Plan) -> None:
        """Do nothing: tests are not timed."""

    def run(self, plan: Plan, limit_s: float) -> None:
        """Run all parts, some at a time."""
        found = plan.found[self.name] = {"parts": {}}
        at_once = 1 if plan.toy else max(1, min(len(PARTS), (os.cpu_count() or 1) // 2))
        waiting, left = list(PARTS), plan.left_s
        while waiting or self.commands:
            while waiting and len(self.commands) < at_once:
                part = waiting.pop(0)
                self.commands[part] = self.start(plan, part)
            part, command = next(
                ((p, c) for p, c in self.commands.items() if c.process.poll() is not None),
                next(iter(self.commands.items())),
            )
            reason = command.wait(limit_s - (left - plan.left_s))
            del self.commands[part]
            found["parts"][part] = counts(command.log.with_suffix(".xml"), reason) | {"seconds": command.took_s}
            say(f"right: {part}: {line_of(found['parts'][part])}")
            plan.save()

    def start(self, plan: Plan, part: str) -> Command:
        """Start the tests of one part."""
        file, chosen = PARTS[part]
        log = plan.work / f"right-{part.replace(',', '').replace(' ', '-')}.log"
        argv = ["-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-m", "gpu", f"tests/gpu/{file}"]
        argv += ["--gpu-device", plan.device, "--junitxml", str(log.with_suffix(".xml")), "--tb", "short"]
        argv += ["--basetemp", str(log.with_suffix(".tmp"))]
        return Command([*argv, *(["-k", chosen] if chosen else [])], log, ROOT)

    def close(self) -> None:
        """End the tests that are still running."""
        for command in self.commands.values():
            command.kill()


def counts(report: Path, reason: str) -> dict[str, Any]:
    """Return what a JUnit report says: counts, the failures with their reasons, and what tests have recorded.

    `reason` says why the process failed, or is empty.
    """
    try:
        cases = list(ElementTree.parse(report).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return {
            "failed": 1,
            "passed": 0,
            "skipped": 0,
            "failures": {"all": reason or "no report was written"},
            "said": {},
        }
    failures, said, skipped = {}, {}, 0
    for case in cases:
        name = case.get("name", "?")
        bad = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
        if bad is not None:
            failures[name] = " ".join((bad.get("message") or "?").split())[:300]
        skipped += case.find("skipped") is not None
        recorded = {p.get("name", "?"): p.get("value", "") for p in case.iter("property")}
        if recorded:
            said[name] = recorded
    if reason and not failures:  # it was killed, or pytest itself failed
        failures["all"] = reason
    passed = len(cases) - len(failures.keys() - {"all"}) - skipped
    return {"failed": len(failures), "passed": passed, "skipped": skipped, "failures": failures, "said": said}


def line_of(part: dict[str, Any]) -> str:
    """Return the counts of a part as a text."""
    return f"{part['passed']} passed, {part['failed']} failed, {part['skipped']} skipped"

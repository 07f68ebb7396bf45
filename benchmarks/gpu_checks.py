"""The section `right` of gpu.py: the tests of tests/gpu, in several processes at a time."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from child import short
from gpu_common import ROOT, Command, Plan, say

PARTS = {  # by name: the file, and which of its tests. The slowest begin first
    **{
        f"stop and resume, {precision}, {kernels}": ("test_runs.py", f"stopped and {precision}-{deterministic}")
        for precision in ("bf16", "fp16")
        for kernels, deterministic in (("deterministic", True), ("the usual kernels", False))
    },
    "from the GPU to the CPU and back": ("test_runs.py", "checkpoint and [gpu]"),
    "from the CPU to the GPU and back": ("test_runs.py", "checkpoint and [cpu]"),
    "fine-tuning and evaluation": ("test_runs.py", "not stopped and not checkpoint"),
    **{
        f"numbers, compiled, {precision}, shapes {part}": (
            "test_numbers.py",
            f"compiled and {precision} and ({chosen})",
        )
        for part, chosen in (("1", "demo or modern or tiny"), ("2", "code"), ("3", "auto or fineweb or grouped"))
        for precision in ("bf16", "fp16", "fp32")
    },
    "steps": ("test_steps.py", ""),
    "attention and decoding": ("test_attention.py", ""),
    "numbers, eager": ("test_numbers.py", "eager"),
}


class Checks:
    """Runs the tests, and counts what passed."""

    name = "right"

    def __init__(self) -> None:
        self.commands: dict[str, Command] = {}

    def prepare(self, plan: Plan) -> None:
        """Do nothing: tests are not timed."""

    def run(self, plan: Plan, limit_s: float) -> None:
        """Run all parts, some at a time. What is not done after `limit_s` seconds is ended, and its tests so far count."""
        found = plan.found[self.name] = {"parts": {}}
        at_once = 1 if plan.toy else max(1, (os.cpu_count() or 1) * 3 // 4)
        waiting, ends = list(PARTS), time.perf_counter() + limit_s
        while waiting or self.commands:
            late = time.perf_counter() > ends
            while waiting and len(self.commands) < at_once and not late:
                part = waiting.pop(0)
                self.commands[part] = self.start(plan, part)
            for part, command in list(self.commands.items()):
                if late or command.process.poll() is not None:
                    reason = command.wait(0.1)
                    del self.commands[part]
                    found["parts"][part] = counts(command.log.with_suffix(".jsonl"), reason) | {
                        "seconds": command.took_s
                    }
                    say(f"right: {part}: {line_of(found['parts'][part])}")
                    plan.save()
            if late:
                found["parts"] |= {
                    part: counts(Path(os.devnull), "no time was left for it") | {"seconds": 0.0} for part in waiting
                }
                break
            time.sleep(0.2)

    def start(self, plan: Plan, part: str) -> Command:
        """Start the tests of one part."""
        file, chosen = PARTS[part]
        log = plan.work / f"right-{part.replace(',', '').replace(' ', '-')}.log"
        argv = ["-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-m", "gpu", f"tests/gpu/{file}"]
        argv += ["--gpu-device", plan.device, "--results", str(log.with_suffix(".jsonl")), "--tb", "short"]
        argv += ["--basetemp", str(log.with_suffix(".tmp"))]
        return Command([*argv, *(["-k", chosen] if chosen else [])], log, ROOT)

    def close(self) -> None:
        """End the tests that are still running."""
        for command in self.commands.values():
            command.kill()


def counts(results: Path, reason: str) -> dict[str, Any]:
    """Return what a file of results says: counts, the failures with their reasons, and what tests have recorded.

    `reason` says why the process failed, or is empty.
    """
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()] if results.is_file() else []
    by = {
        outcome: [line for line in lines if line["outcome"] == outcome] for outcome in ("passed", "failed", "skipped")
    }
    failures = {line["test"]: short(line["message"]) for line in by["failed"]}
    if reason and not failures:  # it was killed, or pytest itself failed
        failures["all"] = reason
    said = {line["test"]: line["said"] for line in lines if line["said"]}
    found = {"passed": len(by["passed"]), "failed": len(failures), "skipped": len(by["skipped"])}
    return {**found, "failures": failures, "said": said}


def line_of(part: dict[str, Any]) -> str:
    """Return the counts of a part as a text."""
    return f"{part['passed']} passed, {part['failed']} failed, {part['skipped']} skipped"

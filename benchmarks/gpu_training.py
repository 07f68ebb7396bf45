"""The section `real` of gpu.py: two presets trained by the clock, one fine-tuned, all evaluated, by the project's own scripts.

`code-50m` and `modern-50m` train for the same minutes on the same documents, one after the other. Then `code-50m` is fine-tuned
on instructions, while both are evaluated: nothing of that is timed.
Generated code runs in the sandbox if it works here. Otherwise the samples are kept, and `python evaluate.py RUN --grade` runs
them elsewhere, from the runs that are packed into `runs.tar.gz` without their weights.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_common import MANY_CORES, ROOT, Command, Plan, in_turn, logged_figures, say, source_flags
from gpu_speed import tokens_of

NAMES = ("code-50m", "modern-50m")
TUNED = "code-50m-sft"
FULL_S = 240.0  # of each training, if there is time
LEAST_S = 30.0
STARTS_S = 20.0  # what a training takes beside its own minutes: imports, validation, samples
AFTER_S = 90.0  # for the fine-tuning, and all evaluations beside it
BUILD_S = 180.0
GRACE_S = 20.0  # what may be used beyond the end, so that something is not lost for a moment


class Training:
    """Builds the data, trains, fine-tunes and evaluates."""

    name = "real"

    def __init__(self) -> None:
        self.builds: dict[str, Command] = {}
        self.running: list[Command] = []

    def prepare(self, plan: Plan) -> None:
        """Start to build the data of both presets. With many cores, compile too: a run of one step leaves it in the cache."""
        for name in NAMES:
            if name in self.builds:
                continue
            commands = [[ROOT / "data_pipeline.py", *self.flags(plan, name)]]
            if not plan.toy and (os.cpu_count() or 1) >= MANY_CORES:
                flags = [*self.train_flags(plan, name), "--train.warmup-steps", "0", "--train.max-steps", "1"]
                commands.append([ROOT / "main.py", *flags, "--name", f"{name}-compiled"])
            self.builds[name] = self.start(plan, f"{name}-data", in_turn(*commands))

    def run(self, plan: Plan, limit_s: float) -> None:
        """Do all of it in about `limit_s` seconds."""
        ends = time.perf_counter() + limit_s
        self.train_all(plan, ends)
        self.evaluate_all(plan, ends)

    def train_all(self, plan: Plan, ends: float, after_s: float = AFTER_S) -> None:
        """Train both presets, what the study did first, so that `after_s` seconds are left at the end."""
        found = plan.found[self.name] = {"runs": {}, "sandbox": sandbox_of()}
        self.prepare(plan)
        for name in NAMES:
            reason = self.builds[name].wait(min(BUILD_S, max(1.0, ends - time.perf_counter())))
            if reason:
                found["runs"][name] = {"failed": f"building the data: {reason}"}
        train_s = (ends - time.perf_counter() - after_s) / len(NAMES) - STARTS_S
        train_s = 3.0 if plan.toy else max(LEAST_S, min(FULL_S, train_s))
        found["train_s"] = train_s
        for name in NAMES:
            if name in found["runs"]:
                continue
            found["runs"][name] = self.train(plan, name, train_s, ends)
            say(f"real: {name}: {found['runs'][name]}")
            plan.save()

    def evaluate_all(self, plan: Plan, ends: float) -> None:
        """Fine-tune the first run and evaluate all of them."""
        found = plan.found[self.name]
        evaluations = {name: self.evaluate(plan, name) for name in NAMES if "failed" not in found["runs"][name]}
        if NAMES[0] in evaluations:
            found["runs"][TUNED] = self.fine_tune(plan, ends)
            if "failed" not in found["runs"][TUNED]:
                evaluations[TUNED] = self.evaluate(plan, TUNED)
        for name, command in evaluations.items():
            reason = command.wait(max(1.0, ends + GRACE_S - time.perf_counter()))
            found["runs"][name] |= results_of(plan.work / "runs" / name, reason)
            say(f"real: {name} evaluated: {reason or 'done'}")
            found["packed"] = pack(plan)
            plan.save()

    def flags(self, plan: Plan, name: str) -> list[str]:
        """Return the flags of a preset: the corpus that is there, or this machine's Python."""
        few = plan.toy and plan.corpus is None  # documents
        held_out = ("0.1", "0.1") if few else ("0.002", "0.002") if plan.toy else ("0.01", "0.005")
        flags = ["--preset", name, "--data.val-fraction", held_out[0], "--data.test-fraction", held_out[1]]
        python_bytes = 4_000_000 if plan.toy else 200_000_000
        flags += source_flags(plan.corpus, None if plan.corpus is not None else python_bytes)
        if name == NAMES[0] and plan.corpus is not None:
            tokenizer = plan.corpus / "starcoder2_tokenizer.json"
            flags += ["--tokenizer.kind", "pretrained", "--tokenizer.path", str(tokenizer)]
        elif name == NAMES[0]:
            flags += ["--tokenizer.kind", "bpe"]
        if plan.toy:
            flags += ["--data.max-tokens", "500000"]
            flags += [
                "--model.n-layer",
                "2",
                "--model.n-head",
                "2",
                "--model.n-embd",
                "32",
                "--model.block-size",
                "256",
            ]
            if plan.corpus is None or name != NAMES[0]:
                flags += ["--model.vocab-size", "512"]
            flags += ["--model.bigram-rows", "1000"] if name != NAMES[0] else []
        return flags

    def command(self, plan: Plan, script: str, *flags: str) -> Command:
        """Start a script of the project in the folder of the runs."""
        return self.start(plan, script, [ROOT / script, *flags])

    def start(self, plan: Plan, name: str, argv: Sequence[str | Path]) -> Command:
        """Start a command in the folder of the runs."""
        log = plan.work / f"real-{len(self.running)}-{name}.log"
        self.running.append(Command(argv, log, plan.work, {"HF_HUB_OFFLINE": "1"}))
        return self.running[-1]

    def train_flags(self, plan: Plan, name: str) -> list[str]:
        """Return the flags of a training, without its end and its name."""
        rows = rows_of(plan, name)
        flags = [*self.flags(plan, name), "--train.device", plan.device]
        flags += ["--train.eval-every", "1000000", "--train.save-every", "1000000"]
        flags += ["--train.batch-size", str(max(32, rows)), "--train.micro-batch-size", str(rows)]
        # by itself a run of a minute is not compiled
        return [*flags, *([] if plan.toy else ["--train.compile", "on"])]

    def train(self, plan: Plan, name: str, train_s: float, ends: float) -> dict[str, Any]:
        """Train a preset for so many seconds; return its speed, loss and tokens."""
        flags = [*self.train_flags(plan, name), "--train.warmup-steps", "20" if plan.toy else "100"]
        flags += ["--name", name, "--train.max-minutes", f"{train_s / 60:.4f}"]
        command = self.command(plan, "main.py", *flags)
        patience_s = 240.0 if plan.toy else min(120.0, ends + GRACE_S - time.perf_counter() - train_s)
        reason = command.wait(train_s + max(10.0, patience_s))
        if reason:
            return {"failed": f"training: {reason}"}
        found = logged_figures(plan.work / "runs" / name)
        if not found:
            return {"failed": f"training: no step was logged ({command.last_line()})"}
        return found | {"micro_batch": rows_of(plan, name), "compiled": not plan.toy}

    def fine_tune(self, plan: Plan, ends: float) -> dict[str, Any]:
        """Fine-tune the first run on instructions; return the loss on responses before and after."""
        if plan.corpus is None:
            flags = ["--preset", "docstrings", "--data.sources.0.max-bytes", "2000000" if plan.toy else "30000000"]
        else:
            pairs = plan.corpus / "instructions.jsonl.gz"
            flags = ["--preset", "alpaca", "--data.sources.0.kind", "jsonl", "--data.sources.0.path", str(pairs)]
        flags += ["--name", TUNED, "--train.device", plan.device, "--train.held-out-answers", "5"]
        flags += (
            ["--train.max-steps", "10", "--data.val-fraction", "0.1", "--data.test-fraction", "0.1"] if plan.toy else []
        )
        command = self.command(plan, "sft_train.py", NAMES[0], *flags)
        reason = command.wait(max(20.0, ends - time.perf_counter()))
        losses = re.search(r"loss, nats a token +([\d.]+) +([\d.]+)", command.output())
        if reason or losses is None:
            return {"failed": f"fine-tuning: {reason or 'it printed no losses'}"}
        return {"val_loss_before": float(losses[1]), "val_loss": float(losses[2]), "seconds": command.took_s}

    def evaluate(self, plan: Plan, name: str) -> Command:
        """Start the evaluation of a run."""
        benchmarks = ["problems:1"] if plan.toy else ["problems:5", "humaneval:2"]
        flags = [name, "--device", plan.device, "--sandbox", plan.found[self.name]["sandbox"]]
        flags += ["--eval.benchmarks", *benchmarks, "--eval.batch-size", "128", "--eval.max-new-tokens", "200"]
        flags += ["--eval.contamination-tokens", "5000000"]
        flags += ["--eval.limit", "2", "--eval.signatures", "2"] if plan.toy else []
        return self.command(plan, "evaluate.py", *flags)

    def close(self) -> None:
        """End what is still running."""
        for command in self.running:
            if command.process.poll() is None:
                command.kill()


def rows_of(plan: Plan, name: str) -> int:
    """Return the rows of a step: those of section `fast`."""
    from kindling import device
    from presets import preset

    if plan.toy:
        return 8
    cfg = preset(name)
    return max(1, tokens_of(device.resolve(replace(cfg.train, device=plan.device))) // cfg.model.block_size)


def sandbox_of() -> str:
    """Return how code can be run here: in bubblewrap, or later and elsewhere."""
    from kindling.sandbox.bubblewrap import SandboxError
    from kindling.sandbox.self_test import self_test

    try:
        self_test("bwrap")
    except SandboxError:
        return "later"
    return "bwrap"


def results_of(run: Path, reason: str) -> dict[str, Any]:
    """Return the figures of a run's eval.json."""
    try:
        results = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    except OSError:
        return {"evaluation": reason or "no results were written"}
    syntax, functional = results.get("syntax", {}), results.get("functional", {})
    losses = results["language_modelling"]["all"]
    passed = {name: part["pass_at"] for name, part in functional.items() if "pass_at" in part}
    return {
        "evaluation": reason or "done",
        "perplexity": losses["perplexity"],
        "eval_bits_per_byte": losses["bits_per_byte"],
        "syntax": {name: syntax.get(name, 0) for name in ("samples", "passes", "non_trivial")},
        "pass_at": passed,
    }


def pack(plan: Plan) -> str:
    """Pack the runs without their weights and shards into runs.tar.gz; return its name."""
    target = plan.out / "runs.tar.gz"
    with tarfile.open(target, "w:gz") as tar:
        for run in sorted(path.parent for path in (plan.work / "runs").glob("*/config.yaml")):
            for path in sorted(run.iterdir()):
                if path.is_file() and os.path.getsize(path) < 2**23:
                    tar.add(path, arcname=f"{run.name}/{path.name}")
    return target.name

"""How long the steps of a study take: measured on this machine for each shape, and kept in the study's folder.

    clock = Clock(Path("studies/000"))
    clock.training(cfg)             # seconds of a whole training, with its start and its evaluations

What was measured is used again. A new plan does not use what is some minutes old, as the machine may have been busy then.

Limit: only training steps and the start of a script are measured. Evaluations are reckoned from them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from config import Config, TrainConfig
from kindling.files import sha256_text, write_atomic
from kindling.paths import PROJECT

SPEED = "speed.json"
FRESH_S = 600.0  # for so long, a new plan may use what was measured before
COLD_S = 8.0  # compiling takes longer where torch's cache is empty
LIMIT_S = 6.0  # of measuring one shape, beyond the first pass
EVALUATIONS = 0.15  # of a run's time: its validations, at most, as training/evaluations.py divides them
BYTES_PER_S = 2e6  # a slow reading, filtering and tokenising of one core
FORWARD = 1 / 3  # of a training step
DECODE_S = 4e-3  # a token of a batch of samples, for each layer: what one step of a small model costs in Python
GOLD_TOKENS = 150_000  # the reference solutions of all problems, with their prompts


def machine() -> dict[str, Any]:
    """Return what tells this machine from others, as far as speed is concerned."""
    import torch

    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": processor, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu,
            "torch": torch.__version__}  # fmt: skip


def machine_text(found: dict[str, Any]) -> str:
    """Return a machine in a line."""
    gpu = f", {found['gpu']}" if found.get("gpu") else ""
    return f"{found['processor']}, {found['cores']} cores, {found['threads']} threads{gpu}, torch {found['torch']}"


def measure_step(cfg: Config) -> tuple[float, float]:
    """Return the seconds of one optimiser step of `cfg` on random tokens, compiled where the run would be, and of compiling."""
    import torch

    from kindling import device
    from kindling.training.compilation import wants_compile
    from kindling.training.dry_run import seconds_of, trainer_of
    from kindling.training.start_or_resume import new_model

    runtime = device.resolve(cfg.train)
    model = new_model(cfg, runtime)
    model.train()
    trainer = trainer_of(cfg.train.micro_batch, cfg, model, runtime)
    torch.compiler.reset()  # or after some shapes it stops compiling
    compiled = wants_compile(cfg, model, runtime) and trainer.compile()
    compile_s = trainer.state.elapsed_s if compiled else 0.0
    if compile_s > COLD_S:  # the runs find the kernels in torch's cache
        model.disable_compile()
        torch.compiler.reset()
        trainer.compile()
        compile_s = trainer.state.elapsed_s - compile_s
    whole = seconds_of(trainer.train_step, runtime, time.perf_counter() + LIMIT_S)
    n_micro = cfg.train.batch_size // cfg.train.micro_batch
    if n_micro == 1:
        return whole, compile_s
    one = seconds_of(trainer.forward_backward, runtime, time.perf_counter() + LIMIT_S)
    return whole + (n_micro - 1) * one, compile_s


def measure_start() -> float:
    """Return the seconds that a script takes to import what training needs."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import kindling.training.stage"], cwd=PROJECT, check=True)
    return time.perf_counter() - started


class Clock:
    """The speed of this machine. What is measured is kept in SPEED of the study's folder."""

    def __init__(
        self,
        folder: Path,
        measure: Callable[[Config], tuple[float, float]] = measure_step,
        start: Callable[[], float] = measure_start,
        max_age_s: float = math.inf,
    ):
        """What was measured longer ago than `max_age_s` is measured again."""
        self.path, self._measure, self._start = folder / SPEED, measure, start
        self.machine = machine()
        self.measured: dict[str, list[float]] = {}
        self._at: dict[str, float] = {}  # when, in seconds since 1970
        self._old: dict[str, list[float]] = {}  # measured too long ago, but kept for others
        self.flops_per_s = 0.0  # of the newest measurement
        self.measuring = True  # False: shapes that were not measured are reckoned from the newest one
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if found["machine"] == self.machine:
                self._at = {key: float(at) for key, at in found.get("at", {}).items()}
                for key, value in found["measured"].items():
                    age_s = time.time() - self._at.get(key, 0.0)
                    (self.measured if age_s <= max_age_s else self._old)[key] = list(map(float, value))
        except (OSError, ValueError, KeyError, TypeError):
            pass  # measured again

    def save(self) -> None:
        """Write what was measured."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": self.machine, "measured": self._old | self.measured, "at": self._at}
        write_atomic(self.path, json.dumps(content, indent=1) + "\n")

    @property
    def start_s(self) -> float:
        """Seconds until a script begins its work."""
        if "start" not in self.measured:
            self._keep("start", [self._start()])
        return 1.3 * self.measured["start"][0] + 1

    def step_s(self, cfg: Config) -> float:
        """Return the seconds of an optimiser step; measured, or reckoned from the newest measurement."""
        key = self._key(cfg)
        if key not in self.measured and not self.measuring:
            return flops(cfg) / self.flops_per_s
        if key not in self.measured:
            self._keep(key, list(self._measure(cfg)))
        self.flops_per_s = flops(cfg) / self.measured[key][0]
        return self.measured[key][0]

    def _keep(self, key: str, seconds: list[float]) -> None:
        self.measured[key], self._at[key] = seconds, time.time()

    def compiles(self, train: TrainConfig, work: float) -> bool:
        """Return whether a run of so many floating-point operations is compiled here, where `train.compile` is auto."""
        from kindling import device

        kind = device.resolve(train).device.type
        return work >= device.COMPILE_FLOPS.get(kind, math.inf) and device.has_compiler(kind)

    def knows(self, cfg: Config) -> bool:
        """Return whether a shape was measured."""
        return self._key(cfg) in self.measured

    def _key(self, cfg: Config) -> str:
        train = {
            k: getattr(cfg.train, k) for k in ("batch_size", "micro_batch_size", "optimizer", "precision", "compile")
        }
        return sha256_text(json.dumps([dataclasses.asdict(cfg.model), train], sort_keys=True))[:16]

    def training(self, cfg: Config, steps: int | None = None) -> float:
        """Return the seconds of a whole training. `steps`, if its config does not say how many."""
        n = cfg.train.max_steps if steps is None else steps
        assert n is not None, "a run by epochs needs its steps"
        step_s = self.step_s(cfg)  # first: it measures compiling too
        compile_s = self.measured.get(self._key(cfg), [0.0, 0.0])[1]
        samples = self.generation(cfg, 1, 4 * 120)
        return self.start_s + compile_s + n * step_s * (1 + EVALUATIONS) + samples

    def reading(self, cfg: Config, n_tokens: float) -> float:
        """Return the seconds of predicting so many tokens."""
        return FORWARD * n_tokens * self.step_s(cfg) / (cfg.train.batch_size * cfg.model.block_size)

    def generation(self, cfg: Config, batches: float, new_tokens: int) -> float:
        """Return the seconds of so many batches of samples, each of so many new tokens."""
        return batches * new_tokens * cfg.model.n_layer * DECODE_S

    def building(self, n_bytes: float) -> float:
        """Return the seconds of building shards from so many bytes."""
        return self.start_s + n_bytes / BYTES_PER_S


def flops(cfg: Config) -> float:
    """Return the floating-point operations of an optimiser step: 6 for each parameter and token, and attention."""
    tokens = cfg.train.batch_size * cfg.model.block_size
    attention = 12 * cfg.model.n_layer * cfg.model.n_embd * cfg.model.block_size
    return float(tokens * (6 * cfg.model.n_parameters + attention))

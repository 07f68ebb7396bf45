"""One way to train one shape, in a process of its own that works when it is told to; train_throughput.py starts it.

    python benchmarks/throughput_worker.py '["demo", "ours", "fp32", true]'

When it is ready it says so in a line of JSON; then for every line of standard input, a number of seconds, it trains for about
so long and answers with the tokens, the seconds and its peak memory. What model FLOPs are is said at `step_flops`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

if TYPE_CHECKING:
    from torch import Tensor, nn

    from config import Config, ModelConfig
    from kindling.device import Runtime

BATCHES = {"demo": 8, "tinystories": 16, "autocomplete": 8}  # rows a step; of any other shape 4
PEAK_S = 0.1  # for each product of the peak


class Way(NamedTuple):
    """One way to train a shape, or with side "peak" to multiply matrices of its sizes."""

    side: str
    precision: str = "fp32"
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.side}, {self.precision}, {'compiled' if self.compiled else 'eager'}"


# -- what is counted --------------------------------------------------------------------------------------------------


def matrix_parameters(model: nn.Module) -> int:
    """Return the parameters of the matrices that multiply: of all linear layers and the head, not of embeddings."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D  # GPT-2's name for a linear layer

    return sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Linear, Conv1D)))


def step_flops(matrices: int, cfg: ModelConfig, tokens: int) -> float:
    """Return the model FLOPs of a step: 6 * matrices * tokens + 12 * n_layer * n_embd * block_size * tokens / 2.

    A matrix takes 2 FLOPs a parameter and token forward and 4 backward (Kaplan et al. 2020, section 2.1). Attention's two
    products take 4 * n_embd * block_size a layer and token forward and twice that backward, of which a causal mask leaves
    half. That is what the shape needs; what is computed once more, and elementwise work, does not count.
    """
    return 6.0 * matrices * tokens + 12.0 * cfg.n_layer * cfg.n_embd * cfg.block_size * tokens / 2


def configured(shape: str, precision: str) -> Config:
    """Return the preset as it is measured: one micro-batch a step, no dropout, on CUDA or else the CPU."""
    import torch

    from presets import preset

    cfg = preset(shape)
    rows, kind = BATCHES.get(shape, 4), "cuda" if torch.cuda.is_available() else "cpu"
    train = replace(cfg.train, batch_size=rows, micro_batch_size=None, precision=precision, device=kind, init_from=None)
    return replace(cfg, model=replace(cfg.model, dropout=0.0), train=train)


# -- a worker: one way of one shape -----------------------------------------------------------------------------------


class Training(NamedTuple):
    """A way that is ready: what does a step and returns its tokens, and what compiling took."""

    step: Callable[[], int]
    model: nn.Module
    compile_s: float | None


def our_training(cfg: Config, runtime: Runtime, compiled: bool) -> Training:
    """Return our trainer; exits if it must compile and cannot."""
    from kindling import device
    from kindling.runs.checkpoint import RunDirectory
    from kindling.training.dry_run import RandomRows
    from kindling.training.trainer import Trainer
    from model import build_model

    device.seed_all(0)
    model = build_model(cfg.model).to(runtime.device)
    trainer = Trainer(cfg, RunDirectory(Path(os.devnull)), model, RandomRows(cfg.model), None, runtime)
    model.train()
    compile_s = None
    if compiled:
        started = time.perf_counter()
        if not trainer.compile():
            sys.exit(f"{cfg.preset} must compile, but does not")
        device.synchronize(runtime)
        compile_s = time.perf_counter() - started

    def step() -> int:
        before = trainer.state.row_index
        trainer.train_step()
        return (trainer.state.row_index - before) * cfg.model.block_size

    step()  # the first one allocates
    return Training(step, model, compile_s)


def peer_training(cfg: Config, runtime: Runtime, compiled: bool) -> Training:
    """Return the peer's loop."""
    from peer import Peer

    from kindling import device
    from kindling.training.dry_run import RandomRows

    peer, noise, rows = Peer(cfg.model, runtime, 1e-3), RandomRows(cfg.model), cfg.train.batch_size
    first = itertools.count(0, rows)

    def step() -> int:
        peer.step(*peer.on_device(noise.rows(next(first), rows)), share=0.5)
        return rows * cfg.model.block_size

    def timed_step() -> float:
        started = time.perf_counter()
        step()
        device.synchronize(runtime)
        return time.perf_counter() - started

    compile_s = None
    if compiled:
        peer.compile()
        compile_s = timed_step()  # with a step in it, as ours has a pass forward and back
    step()
    return Training(step, peer.model, compile_s)


def products(cfg: Config, runtime: Runtime) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the products of which the fastest is the machine's peak: square ones, and those of the model's layers."""
    import torch

    from kindling.device import DTYPES

    C, V, rows = cfg.model.n_embd, cfg.model.vocab_size, cfg.train.batch_size * cfg.model.block_size
    squares = (1024, 2048, 4096, 8192) if runtime.device.type == "cuda" else (512, 1024, 2048)
    sizes = [(n, n, n) for n in squares]
    sizes += [(rows, C, 3 * C), (rows, C, 4 * C), (rows, 4 * C, C), (min(rows, 1024), C, V)]
    kind = {"device": runtime.device, "dtype": DTYPES[runtime.precision]}
    return [(torch.randn(m, k, **kind), torch.randn(k, n, **kind), torch.empty(m, n, **kind)) for m, k, n in sizes]


def best_product(pairs: list[tuple[Tensor, Tensor, Tensor]], runtime: Runtime) -> dict[str, Any]:
    """Return the FLOP/s of the fastest product and its sizes."""
    import torch

    from kindling import device

    best: dict[str, Any] = {"flops": 0.0}
    for a, b, out in pairs:
        ends = time.perf_counter() + PEAK_S
        while True:
            started = time.perf_counter()
            torch.mm(a, b, out=out)
            device.synchronize(runtime)
            seconds = time.perf_counter() - started
            rate = 2.0 * a.size(0) * a.size(1) * b.size(1) / seconds
            if rate > best["flops"]:
                best = {"flops": rate, "sizes": [a.size(0), a.size(1), b.size(1)]}
            if time.perf_counter() > ends:
                break
    return best


def peak_bytes(runtime: Runtime) -> int:
    """Return the most memory of this process: its own pages, not those of the process that started it, as ru_maxrss has."""
    from kindling import device

    if runtime.device.type == "cpu":
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    return device.peak_memory_bytes(runtime)


def work(shape: str, way: Way) -> None:
    """Get ready, say so, and take a turn for every line of standard input, which says how long it may take."""
    import torch

    from kindling import device

    cfg = configured(shape, way.precision)
    runtime = device.resolve(cfg.train)
    if way.side == "peak":
        if runtime.device.type == "cuda":  # as ours and the peer run
            torch.backends.cuda.matmul.allow_tf32 = True
        pairs = products(cfg, runtime)
        say({"device": runtime.device.type})
        for _ in sys.stdin:
            say(best_product(pairs, runtime))
        return
    make = our_training if way.side == "ours" else peer_training
    training = make(cfg, runtime, way.compiled)
    device.synchronize(runtime)
    parameters = sum(p.numel() for p in training.model.parameters())
    say({"compile_s": training.compile_s, "parameters": parameters, "matrices": matrix_parameters(training.model)})
    for line in sys.stdin:
        tokens, steps, started = 0, 0, time.perf_counter()
        while steps == 0 or time.perf_counter() - started < float(line) * steps / (steps + 1):
            tokens += training.step()
            steps += 1
            device.synchronize(runtime)
        seconds = time.perf_counter() - started
        say({"tokens": tokens, "steps": steps, "seconds": seconds, "peak_bytes": peak_bytes(runtime)})


def say(found: dict[str, Any]) -> None:
    """Answer the process that started this one."""
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    from kindling.openmp import limit_spinning

    limit_spinning()
    shape, *way = json.loads(sys.argv[1])
    work(shape, Way(*way))

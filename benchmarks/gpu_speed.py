"""The section `fast` of gpu.py: whole training steps of large shapes, ours and transformers', in turn.

Each shape and side is a process of its own, which compiles for some sizes of micro-batch while other sections run. Then they
take turns, one at a time. A step is one micro-batch: forward, backward, clipping, optimiser. The best size of each side counts.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from child import Child, ChildError
from gpu_common import ROOT, Plan, path_of_modules, say

if TYPE_CHECKING:
    from config import Config
    from kindling.data.shards import Batch
    from kindling.device import Runtime
    from kindling.training.trainer import LaunchedStep

SHAPES = ("code-50m", "code-150m", "code-225m", "smallcoder-1", "modern-50m", "modern-150m", "autocomplete")
WHOLE = ("code-50m", "modern-150m")  # also compiled as a whole, not block by block
TOY_SHAPES = ("code-50m", "smallcoder-1")
TOKENS = (16_384, 32_768, 65_536)  # of a micro-batch, tried in this order
TOY_TOKENS = (128, 256)
PROBE_S, TURN_S, TURNS = 0.7, 1.2, 3
READY_S = 240.0  # a process that is not ready by then is left out
PROFILED_STEPS = 4


# -- in the process of one shape and side ------------------------------------------------------------------------------


def configured(shape: str, device: str, toy: bool) -> Config:
    """Return a preset without dropout; at toy size, with two narrow layers."""
    from presets import preset

    cfg = preset(shape)
    model = replace(cfg.model, dropout=0.0)
    if toy:
        pairs = {"bigram_rows": 1000} if model.bigram_rows else {}
        model = replace(
            model, n_layer=2, n_head=2, n_kv_head=None, n_embd=32, d_ff=64, block_size=64, vocab_size=512, **pairs
        )
    return replace(cfg, model=model, train=replace(cfg.train, device=device, init_from=None, micro_batch_size=None))


class Side:
    """Ours, or the peer: does a step with any number of rows."""

    def __init__(self, cfg: Config, runtime: Runtime):
        from kindling.training.dry_run import RandomRows

        self.cfg, self.runtime, self.rows = cfg, runtime, RandomRows(cfg.model)

    def compile(self) -> None:
        """Compile for each size when it comes."""
        raise NotImplementedError

    def step(self, n_rows: int) -> None:
        """Do one step with so many rows."""
        raise NotImplementedError


class Ours(Side):
    """Our trainer. `whole`: compile all blocks together, not one by one."""

    def __init__(self, cfg: Config, runtime: Runtime, whole: bool):
        from kindling import device
        from kindling.training.dry_run import trainer_of
        from model import build_model

        super().__init__(cfg, runtime)
        device.seed_all(0)
        self.whole, self.model = whole, build_model(cfg.model).to(runtime.device).train()
        self.trainer = trainer_of(1, cfg, self.model, runtime)
        self.launched: LaunchedStep | None = None

    def compile(self) -> None:
        import torch

        from kindling import device

        device.skip_vector_isa_test()
        self.model.enable_compile()
        if self.whole:
            for block in self.model.modules_to_compile():
                block._compiled_call_impl = None
            self.model.hidden = torch.compile(self.model.hidden, dynamic=False)  # type: ignore[method-assign]

    def step(self, n_rows: int) -> None:
        trainer = self.trainer
        if trainer.micro_batch != n_rows:
            trainer.train = replace(trainer.train, batch_size=n_rows, micro_batch_size=None)
            trainer.cfg = replace(trainer.cfg, train=trainer.train)
            trainer.rows_per_rank = trainer.micro_batch = n_rows
        step = trainer.launch_step()
        if self.launched is not None:  # as in training, the step before is finished while this one is computed
            trainer.finish_step(self.launched)
        self.launched = step


class Theirs(Side):
    """transformers' model in a plain loop."""

    def __init__(self, cfg: Config, runtime: Runtime):
        from peer import Peer

        super().__init__(cfg, runtime)
        self.peer = Peer(cfg.model, runtime, 1e-3)
        self.model = self.peer.model
        self.batches: dict[int, Batch] = {}  # by rows: making random tokens is no part of a step

    def compile(self) -> None:
        self.peer.compile()

    def step(self, n_rows: int) -> None:
        if n_rows not in self.batches:
            self.batches[n_rows] = self.rows.rows(0, n_rows)
        self.peer.step(*self.peer.on_device(self.batches[n_rows]), share=0.5)


def worker(shape: str, name: str, device_kind: str, toy: bool) -> None:
    """Get ready, say so, and answer requests."""
    import torch
    from throughput_worker import best_product, matrix_parameters, products

    from kindling import device

    cfg = configured(shape, device_kind, toy)
    runtime = device.resolve(cfg.train)
    side: Side = Theirs(cfg, runtime) if name == "transformers" else Ours(cfg, runtime, name.endswith("whole"))
    compiles = not toy and device.has_compiler(device_kind)
    if compiles:
        side.compile()
    started, ready, notes = time.perf_counter(), [], []
    for tokens in TOY_TOKENS if toy else TOKENS:
        n_rows = tokens // cfg.model.block_size
        try:
            for _ in range(2):
                side.step(n_rows)
            device.synchronize(runtime)
            ready.append(n_rows)
        except RuntimeError as e:
            notes.append(f"{n_rows} rows: {str(e).splitlines()[0][:100]}")
            if not device.is_out_of_memory(e):
                break
        finally:
            device.release_memory(runtime)
        if (time.perf_counter() - started) * (1 + 1 / len(ready) if ready else 2) > READY_S:
            break
    about = {"rows": ready, "notes": notes, "compiled": compiles, "precision": runtime.precision}
    about |= {"ready_s": time.perf_counter() - started, "matrices": matrix_parameters(side.model)}
    about["parameters"] = sum(p.numel() for p in side.model.parameters())
    answer(about)
    for line in sys.stdin:
        request = json.loads(line)
        if "peak" in request:
            measured = replace(cfg, train=replace(cfg.train, batch_size=max(ready, default=1)))
            answer(best_product(products(measured, runtime), runtime))
        elif "profile" in request:
            answer(profiled(partial(side.step, request["profile"]), runtime))
        else:
            answer(turn(side, request["rows"], request["seconds"]))
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()  # the other processes need it


def turn(side: Side, n_rows: int, seconds: float) -> dict[str, Any]:
    """Do steps for about so many seconds, at least two."""
    from kindling import device

    device.reset_peak_memory(side.runtime)
    side.step(n_rows)  # gets its memory again
    device.synchronize(side.runtime)
    steps, started = 0, time.perf_counter()
    while steps < 2 or time.perf_counter() - started < seconds:
        side.step(n_rows)
        steps += 1
    device.synchronize(side.runtime)
    took = time.perf_counter() - started
    tokens = steps * n_rows * side.cfg.model.block_size
    return {"tokens_per_s": tokens / took, "step_s": took / steps, "peak_bytes": device.peak_memory_bytes(side.runtime)}


KINDS = {  # of kernels, by words in their names; the first that fits
    "products": (
        "gemm",
        "cutlass",
        "nvjet",
        "cublas",
        "xmma",
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "linear",
    ),
    "attention": ("flash", "fmha", "attention", "cudnn_sdpa"),
    "optimiser and gradients": ("adam", "multi_tensor", "foreach", "lerp", "norm_kernel", "clip"),
    "copies": ("memcpy", "memset", "copy_", "aten::to", "fill"),
    "compiled": ("triton", "graph"),
}


def kind_of(kernel: str) -> str:
    """Return what a kernel does, by its name."""
    name = kernel.lower()
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")


def profiled(step: Callable[[], None], runtime: Runtime) -> dict[str, Any]:
    """Return the share of time in which the device is idle during steps, and the shares of each kind of kernel."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    from kindling import device

    on_gpu = runtime.device.type == "cuda"
    step()
    device.synchronize(runtime)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as prof:
        for _ in range(PROFILED_STEPS):
            step()
        device.synchronize(runtime)
    if not on_gpu:
        times = {event.key: event.self_cpu_time_total for event in prof.key_averages()}
        return {"idle_share": None, "kinds": shares(times.items()), "slowest": slowest(times.items())}
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in prof.events()
        if event.device_type == DeviceType.CUDA
    )
    named = [(name, stop - start) for start, stop, name in spans]
    return {
        "idle_share": idle_share([(start, stop) for start, stop, _ in spans]),
        "kinds": shares(named),
        "slowest": slowest(named),
    }


def idle_share(spans: list[tuple[float, float]]) -> float | None:
    """Return the share of the time from the first start to the last end in which no span runs; None without spans."""
    if not spans:
        return None
    busy, reached = 0.0, spans[0][0]
    for start, stop in sorted(spans):
        busy += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return 1 - busy / max(1e-9, reached - min(start for start, _ in spans))


def shares(named: Any) -> dict[str, float]:
    """Return the share of each kind in pairs of a kernel's name and its time, the largest first."""
    sums: dict[str, float] = {}
    for name, time_us in named:
        sums[kind_of(name)] = sums.get(kind_of(name), 0.0) + time_us
    total = sum(sums.values()) or 1.0
    return {kind: value / total for kind, value in sorted(sums.items(), key=lambda item: -item[1])}


def slowest(named: Any, n: int = 12) -> dict[str, float]:
    """Return the share of the n slowest kernels, by name."""
    sums: dict[str, float] = {}
    for name, time_us in named:
        sums[name[:80]] = sums.get(name[:80], 0.0) + time_us
    total = sum(sums.values()) or 1.0
    return {name: value / total for name, value in sorted(sums.items(), key=lambda item: -item[1])[:n]}


def answer(found: dict[str, Any]) -> None:
    """Answer the process that started this one."""
    print(json.dumps(found), flush=True)


# -- in gpu.py ---------------------------------------------------------------------------------------------------------


def sides_of(shape: str, toy: bool) -> list[str]:
    """Return the ways to train a shape."""
    return ["ours", "transformers", *(["ours, whole"] if shape in WHOLE and not toy else [])]


class Speed:
    """Starts a process for each shape and side, and lets them take turns."""

    name = "fast"

    def __init__(self, shapes: tuple[str, ...] | None = None) -> None:
        self.chosen = shapes
        self.children: dict[tuple[str, str], Future[tuple[Child, dict[str, Any]]]] = {}
        self.started: list[Child] = []
        self.pool: ThreadPoolExecutor | None = None

    def prepare(self, plan: Plan) -> None:
        """Start the processes, some at a time, and let them compile."""
        if self.pool is not None:
            return
        self.pool = ThreadPoolExecutor(1 if plan.toy else max(1, (os.cpu_count() or 1) // 3))
        for shape in self.shapes(plan):
            for side in sides_of(shape, plan.toy):
                self.children[shape, side] = self.pool.submit(self.start, plan, shape, side)

    def shapes(self, plan: Plan) -> tuple[str, ...]:
        """Return the shapes to measure."""
        return self.chosen or (TOY_SHAPES if plan.toy else SHAPES)

    def start(self, plan: Plan, shape: str, side: str) -> tuple[Child, dict[str, Any]]:
        """Start the process of one shape and side; return it when it is ready, with what it says."""
        arguments = json.dumps([shape, side, plan.device, plan.toy])
        log = plan.work / f"fast-{shape}-{side.replace(', ', '-')}.log"
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([path_of_modules(), str(ROOT / "benchmarks")])}
        env["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # sizes change, so pieces would not fit
        child = Child([sys.executable, str(Path(__file__)), arguments], log, env)
        self.started.append(child)
        return child, child.answer(READY_S + 60)

    def run(self, plan: Plan, limit_s: float) -> None:
        """Let the processes of one shape after another take turns."""
        self.prepare(plan)
        ends = time.perf_counter() + limit_s
        found = plan.found[self.name] = {"shapes": {}, "compared_with": "transformers, bf16, compiled, fused AdamW"}
        for number, shape in enumerate(self.shapes(plan)):
            left = (ends - time.perf_counter()) / (len(self.shapes(plan)) - number)
            try:
                found["shapes"][shape] = self.measure(plan, shape, left)
                say(f"fast: {shape}: {line_of(found['shapes'][shape])}")
            except ChildError as e:
                found["shapes"][shape] = {"failed": str(e)}
                say(f"fast: {shape}: failed: {e}")
            plan.save()

    def measure(self, plan: Plan, shape: str, limit_s: float) -> dict[str, Any]:
        """Measure one shape; raises ChildError if ours or the peer cannot be measured."""
        from throughput_worker import step_flops

        cfg, started = configured(shape, plan.device, plan.toy), time.perf_counter()
        sides: dict[str, tuple[Child, dict[str, Any]]] = {}
        out: dict[str, Any] = {"sides": {}}
        for side in sides_of(shape, plan.toy):
            try:
                sides[side] = self.children[shape, side].result(
                    timeout=max(1.0, limit_s if side != "ours, whole" else 1.0)
                )
                out["sides"][side] = {"about": sides[side][1], "sizes": {}, "turns": []}
            except (ChildError, TimeoutError) as e:
                if side != "ours, whole":
                    raise ChildError(f"{side}: {e or 'it was not ready in time'}") from None
                out["sides"][side] = {"failed": str(e) or "it was not ready in time"}
        ask_s = 60 + 10 * TURN_S
        for side, (child, about) in sides.items():
            for n_rows in about["rows"]:
                sizes = out["sides"][side]["sizes"]
                with suppress(ChildError):  # a size that does not fit beside the other processes is left out
                    sizes[n_rows] = child.ask({"rows": n_rows, "seconds": PROBE_S}, ask_s)["tokens_per_s"]
            if not out["sides"][side]["sizes"]:
                raise ChildError(f"{side}: no micro-batch could be measured ({'; '.join(about['notes'])})")
        best = {
            side: max(found["sizes"], key=found["sizes"].get)
            for side, found in out["sides"].items()
            if "sizes" in found
        }
        for number in range(TURNS):
            for side in list(sides) if number % 2 == 0 else list(sides)[::-1]:
                request = {"rows": best[side], "seconds": TURN_S}
                out["sides"][side]["turns"].append(sides[side][0].ask(request, ask_s))
            if number and time.perf_counter() - started > limit_s:
                break
        out["peak"] = sides["ours"][0].ask({"peak": True}, ask_s)
        for side in sides:
            turns, about = out["sides"][side]["turns"], sides[side][1]
            rate = statistics.median(t["tokens_per_s"] for t in turns)
            flops = step_flops(about["matrices"], cfg.model, 1) * rate
            out["sides"][side] |= {
                "rows": best[side],
                "tokens_per_s": rate,
                "share_of_peak": flops / out["peak"]["flops"],
            }
            out["sides"][side]["peak_bytes"] = max(t["peak_bytes"] for t in turns)
        out["times"] = statistics.median(
            ours["tokens_per_s"] / theirs["tokens_per_s"]
            for ours, theirs in zip(out["sides"]["ours"]["turns"], out["sides"]["transformers"]["turns"])
        )
        out["profile"] = sides["ours"][0].ask({"profile": best["ours"]}, ask_s)
        return out

    def close(self) -> None:
        """End all processes."""
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
        for child in self.started:
            child.process.kill()
            child.close(1.0)


def line_of(found: dict[str, Any]) -> str:
    """Return the figures of one shape as a text."""
    ours, theirs = found["sides"]["ours"], found["sides"]["transformers"]
    return (
        f"{ours['tokens_per_s']:,.0f} tokens/s, {ours['share_of_peak']:.0%} of the peak, {found['times']:.2f} times "
        f"transformers' {theirs['tokens_per_s']:,.0f}"
    )


if __name__ == "__main__":
    worker(*json.loads(sys.argv[1]))

"""The section `fast` of gpu.py: whole training steps of large shapes, ours and transformers', in turn.

Each shape and side is a process of its own, which compiles while other sections run. Then they take turns, one at a time. A
step is one micro-batch: forward, backward, clipping, optimiser. The micro-batch is one that a GPU of this memory is busy with
(`tokens_of`), and half of it where that does not fit.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from child import Child, ChildError, short
from gpu_common import MANY_CORES, Plan, say, start_worker
from gpu_profile import profiled

from kindling.errors import says_out_of_memory

if TYPE_CHECKING:
    from config import Config
    from kindling.data.shards import Batch
    from kindling.device import Runtime
    from kindling.training.trainer import LaunchedStep

SHAPES = ("code-50m", "code-150m", "code-225m", "smallcoder-1", "modern-50m", "modern-150m", "autocomplete")
WHOLE = ("code-50m",)  # also compiled as a whole, not block by block
TOY_SHAPES = ("code-50m", "smallcoder-1")
LARGE = ("smallcoder-1",)  # half as many tokens
TOKENS_PER_GIB, MOST_TOKENS = 512, 32_768  # of a micro-batch: 80 GiB take 32,768
PROCESS_GIB = 20  # of the GPU's memory for each process that gets ready, and for those that are ready
TOY_TOKENS = 256
TURN_S, TURNS = 1.0, 3
TRIES, PAUSE_S = 10, 2.0  # of a size that does not fit while the other processes get ready
STARTS, RESTART_S = 3, 10.0  # of a process that has no memory to get ready in
READY_SHARE, ROUNDS = 0.55, 2  # of the time that is left, in which processes may still get ready
LATE = "it was not ready in time"
ASK_S = 90.0  # for one answer: a size that did not fit before may have to be compiled


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
    from throughput_worker import best_product, matrix_parameters, products

    from kindling import device

    cfg = configured(shape, device_kind, toy)
    runtime = device.resolve(cfg.train)
    compiles = not toy and device.has_compiler(device_kind)
    started = time.perf_counter()
    tokens = TOY_TOKENS if toy else tokens_of(runtime)
    whole = tokens // cfg.model.block_size // (2 if shape in LARGE else 1)
    try:
        side: Side = Theirs(cfg, runtime) if name == "transformers" else Ours(cfg, runtime, name.endswith("whole"))
        if compiles:
            side.compile()
        n_rows, reason = first_that_fits(side, [whole, max(1, whole // 2)])
    except RuntimeError as e:
        if not device.is_out_of_memory(e):
            raise
        raise SystemExit(short(f"{type(e).__name__}: {e}")) from None  # gpu.py starts a new process
    about = {"rows": n_rows, "smaller_because": reason, "compiled": compiles, "precision": runtime.precision}
    about |= {"ready_s": time.perf_counter() - started, "matrices": matrix_parameters(side.model)}
    answer(about)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "peak" in request:
                measured = replace(cfg, train=replace(cfg.train, batch_size=n_rows))
                answer(best_product(products(measured, runtime), runtime))
            elif "profile" in request:
                answer(profiled(partial(side.step, n_rows), runtime))
            else:
                answer(turn(side, n_rows, request["seconds"]))
        except RuntimeError as e:
            answer({"failed": short(str(e))})
        device.release_memory(runtime.device)  # the other processes need it


def tokens_of(runtime: Runtime) -> int:
    """Return the tokens of a micro-batch: a power of two that grows with the memory of the GPU, up to MOST_TOKENS."""
    from kindling import device

    gibibytes = (device.gpu_memory_bytes(runtime.device) or 2**33) / 2**30
    return min(MOST_TOKENS, 2 ** round(math.log2(gibibytes * TOKENS_PER_GIB)))


def first_that_fits(side: Side, sizes: list[int]) -> tuple[int, str]:
    """Compile and do two steps with the first of the `sizes` that fits, and return it, with why the ones before do not.

    After an AcceleratorError, CUDA may answer nothing more in this process, so it is not tried again here.
    """
    import torch

    from kindling import device

    reason = ""
    for n_rows in sizes:
        for _ in range(TRIES):  # there is more room when the other processes have got ready
            try:
                for _ in range(2):
                    side.step(n_rows)
                device.synchronize(side.runtime)
                device.release_memory(side.runtime.device)  # the other processes need it
                return n_rows, reason
            except RuntimeError as e:
                if not device.is_out_of_memory(e) or isinstance(e, torch.AcceleratorError):
                    raise
                reason = short(str(e))
            device.release_memory(side.runtime.device)
            time.sleep(PAUSE_S)
    raise SystemExit(f"no micro-batch fits: {reason}")


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


def answer(found: dict[str, Any]) -> None:
    """Answer the process that started this one."""
    print(json.dumps(found), flush=True)


# -- in gpu.py ---------------------------------------------------------------------------------------------------------


def sides_of(shape: str, toy: bool) -> list[str]:
    """Return the ways to train a shape."""
    return ["ours", "transformers", *(["ours, whole"] if shape in WHOLE and not toy else [])]


def at_once(device_kind: str) -> int:
    """Return how many processes may get ready at a time: as the cores allow, and the memory of the GPU."""
    import torch

    from kindling import device

    gibibytes = (device.gpu_memory_bytes(torch.device(device_kind)) or 2**33) / 2**30
    return max(1, min((os.cpu_count() or 1) // 2, round(gibibytes / PROCESS_GIB)))


class Speed:
    """Starts a process for each shape and side, and lets them take turns."""

    name = "fast"

    def __init__(self) -> None:
        self.ready: dict[tuple[str, str], Future[tuple[Child, dict[str, Any]]]] = {}
        self.children: dict[tuple[str, str], Child] = {}
        self.pool: ThreadPoolExecutor | None = None
        self.lock, self.closed = threading.Lock(), threading.Event()

    def prepare(self, plan: Plan) -> None:
        """Start the processes of all shapes."""
        self.get_ready(plan, self.shapes(plan))

    def get_ready(self, plan: Plan, shapes: Sequence[str]) -> None:
        """Start the processes of some shapes, some at a time, and let them compile."""
        self.pool = ThreadPoolExecutor(1 if plan.toy else at_once(plan.device))
        self.closed.clear()
        for shape in shapes:
            for side in sides_of(shape, plan.toy)[::-1]:  # a whole model takes longest to compile
                self.ready[shape, side] = self.pool.submit(self.start, plan, shape, side)

    def shapes(self, plan: Plan) -> tuple[str, ...]:
        """Return the shapes to measure."""
        return TOY_SHAPES if plan.toy else SHAPES

    def start(self, plan: Plan, shape: str, side: str) -> tuple[Child, dict[str, Any]]:
        """Start the process of one shape and side; return it when it is ready, with what it says.

        Where there was no memory, a new one is started a little later. Raises ChildError if none gets ready.
        """
        log = plan.work / f"fast-{shape}-{side.replace(', ', '-')}.log"
        env = {
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # sizes change, so pieces would not fit
            "TORCHINDUCTOR_COMPILE_THREADS": "2",  # several processes compile at a time
        }
        for number in range(STARTS):
            with self.lock:
                if self.closed.is_set():
                    raise ChildError(LATE)
                child = start_worker(__file__, [shape, side, plan.device, plan.toy], log, **env)
                self.children[shape, side] = child
            try:
                return child, child.answer()
            except ChildError as e:
                reason = e
            self.end(shape, side)
            if not says_out_of_memory(RuntimeError(str(reason))):
                break
            if number + 1 < STARTS:
                self.closed.wait(RESTART_S)
        raise ChildError(LATE) if self.closed.is_set() else reason

    def run(self, plan: Plan, limit_s: float) -> None:
        """Measure the shapes whose processes are ready, once no other gets ready; then let the others get ready again."""
        ends = time.perf_counter() + limit_s
        found = plan.found[self.name] = {"shapes": {}}
        left = list(self.shapes(plan))
        if self.pool is None and (os.cpu_count() or 1) < MANY_CORES:
            for number, shape in enumerate(left):
                self.get_ready(plan, [shape])  # only this shape's processes
                self.await_ready(ends)
                self.measure_shape(plan, shape, (ends - time.perf_counter()) / (len(left) - number))
            return
        for number in range(ROUNDS):
            if number or self.pool is None:
                self.get_ready(plan, left)
            self.await_ready(time.perf_counter() + READY_SHARE * (ends - time.perf_counter()))
            last = number + 1 == ROUNDS or time.perf_counter() > ends
            chosen = [shape for shape in left if last or self.is_ready(shape)]
            for place, shape in enumerate(chosen):
                self.measure_shape(plan, shape, (ends - time.perf_counter()) / (len(chosen) - place))
                left.remove(shape)
            for key in list(self.children):  # of a shape whose other side was late
                self.end(*key)
            if not left or time.perf_counter() > ends:
                break
        for shape in left:
            found["shapes"][shape] = {"failed": LATE}

    def is_ready(self, shape: str) -> bool:
        """Return whether neither ours nor the peer was late. A process that has failed is no reason to wait."""
        futures = [self.ready[shape, side] for side in ("ours", "transformers")]
        return not any(future.cancelled() or str(future.exception()) == LATE for future in futures)

    def await_ready(self, ends: float) -> None:
        """Wait for the processes that get ready; at the time `ends`, end those that are not."""
        wait(self.ready.values(), timeout=max(0.0, ends - time.perf_counter()))
        self.stop_preparing()
        wait(self.ready.values())

    def measure_shape(self, plan: Plan, shape: str, limit_s: float) -> None:
        """Measure one shape, and end its processes. What is found, or why nothing is, goes into the results."""
        measured: dict[str, Any] = {}
        plan.found[self.name]["shapes"][shape] = measured
        try:
            self.measure(plan, shape, limit_s, measured)
            say(f"fast: {shape}: {line_of(measured)}")
        except ChildError as e:
            measured["failed"] = short(str(e))
            say(f"fast: {shape}: failed: {measured['failed']}")
        for side in sides_of(shape, plan.toy):
            self.end(shape, side)
        plan.save()

    def stop_preparing(self) -> None:
        """End the processes that are not ready: they would disturb what is measured."""
        assert self.pool is not None
        with self.lock:
            self.closed.set()
        self.pool.shutdown(wait=False, cancel_futures=True)
        for key, future in self.ready.items():
            if not future.done():
                self.end(*key)

    def measure(self, plan: Plan, shape: str, limit_s: float, out: dict[str, Any]) -> None:
        """Measure one shape, and put what is found into `out` as it comes.

        Raises ChildError if ours or the peer cannot be measured.
        """
        from throughput_worker import step_flops

        cfg, started = configured(shape, plan.device, plan.toy), time.perf_counter()
        children: dict[str, Child] = {}
        sides = out["sides"] = {}
        for side in sides_of(shape, plan.toy):
            try:
                future = self.ready[shape, side]
                if not future.done() or future.cancelled():
                    raise ChildError(LATE)
                child, about = future.result()
                sides[side] = {"about": about, "rows": about["rows"], "turns": []}
                children[side] = child
            except ChildError as e:
                if side != "ours, whole":
                    raise ChildError(f"{side}: {e}") from None
                sides[side] = {"failed": str(e)}
        self.take_turns(children, sides, started + limit_s)
        out["times"] = statistics.median(
            ours["tokens_per_s"] / theirs["tokens_per_s"]
            for ours, theirs in zip(sides["ours"]["turns"], sides["transformers"]["turns"])
        )
        out["peak"] = children["ours"].ask({"peak": True}, ASK_S)
        for side in children:
            rate = statistics.median(turn["tokens_per_s"] for turn in sides[side]["turns"])
            flops = step_flops(sides[side]["about"]["matrices"], cfg.model, 1) * rate
            sides[side] |= {"tokens_per_s": rate, "share_of_peak": flops / out["peak"]["flops"]}
            sides[side]["peak_bytes"] = max(turn["peak_bytes"] for turn in sides[side]["turns"])
        try:
            out["profile"] = children["ours"].ask({"profile": True}, ASK_S)
        except ChildError as e:
            out["profile"] = {"failed": str(e)}

    def take_turns(self, children: dict[str, Child], sides: dict[str, Any], ends: float) -> None:
        """Let each side work, in turn, at least twice."""
        for number in range(TURNS):
            for side in list(children) if number % 2 == 0 else list(children)[::-1]:
                turn = children[side].ask({"seconds": TURN_S}, ASK_S)
                if "failed" in turn:
                    raise ChildError(f"{side}: {turn['failed']}")
                sides[side]["turns"].append(turn)
            if number and time.perf_counter() > ends:
                break

    def end(self, shape: str, side: str) -> None:
        """End one process."""
        child = self.children.pop((shape, side), None)
        if child is not None:
            child.kill()

    def close(self) -> None:
        """End all processes."""
        if self.pool is not None:
            self.stop_preparing()
        for key in list(self.children):
            self.end(*key)


def line_of(found: dict[str, Any]) -> str:
    """Return the figures of one shape as a text."""
    ours, theirs = found["sides"]["ours"], found["sides"]["transformers"]
    return (
        f"{ours['tokens_per_s']:,.0f} tokens/s, {ours['share_of_peak']:.0%} of the peak, {found['times']:.2f} times "
        f"transformers' {theirs['tokens_per_s']:,.0f}"
    )


if __name__ == "__main__":
    from kindling.openmp import limit_spinning

    limit_spinning()
    if hasattr(os, "nice"):
        os.nice(10)  # compiling gives way to what is measured meanwhile; nothing else runs when this is measured
    worker(*json.loads(sys.argv[1]))

"""Device, precision, compilation, random state and memory: everything that depends on the hardware.

No other file of the project asks which device it runs on.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import TrainConfig
from kindling.distributed import SINGLE_PROCESS, World
from kindling.errors import KindlingError, says_out_of_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# FLOP of a run from which compiling it pays: it takes some seconds to a minute, and saves up to half of the time
COMPILE_FLOPS = {"cpu": 2e13, "cuda": 1e15}


class DeviceError(KindlingError):
    """A device, a precision or a number of threads that this machine does not have."""


@dataclass(frozen=True)
class Runtime:
    """The device and precision of a model, and the group of processes that run it."""

    device: torch.device
    precision: str
    world: World = SINGLE_PROCESS

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context for forward passes: weights stay float32, matrix products run in `precision`."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.precision])

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Return the loss scaler; it does nothing unless the precision is fp16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    @property
    def matmul_dtype(self) -> torch.dtype:
        """The type of products outside autocast that may lose precision: bfloat16 if `precision` is bf16, else float32."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def prefers_blockwise_attention(self) -> bool:
        """Whether a compiled model computes attention faster by blocks (blockwise_attention.py) than torch's fused kernel."""
        return self.device.type == "cpu" and self.precision == "bf16" and has_bf16("cpu")

    @property
    def asynchronous(self) -> bool:
        """Whether work is queued, so that reading a result waits for the device."""
        return self.device.type != "cpu"

    @property
    def supports_found_inf(self) -> bool:
        """Whether fused AdamW supports `found_inf` here, which skips a step that is not finite without waiting for the device."""
        return self.device.type in ("cpu", "cuda")

    def describe(self) -> dict[str, Any]:
        """Return what the exact bits of a run depend on, besides its config."""
        return {
            "device": self.device.type,
            "precision": self.precision,
            "threads": torch.get_num_threads(),
            "world_size": self.world.size,
            "torch": str(torch.__version__),
        }


def to_device(rows: np.ndarray, runtime: Runtime) -> torch.Tensor:
    """Copy rows of token ids to the device; on CUDA without waiting for the copy."""
    tensor = torch.from_numpy(np.ascontiguousarray(rows))
    if runtime.device.type == "cuda":
        return tensor.pin_memory().to(runtime.device, non_blocking=True)
    return tensor.to(runtime.device)


def resolve(cfg: TrainConfig, world: World = SINGLE_PROCESS, flag: str = "--train.device") -> Runtime:
    """Choose device and precision from `cfg` and the hardware; raises DeviceError if the machine does not have them.

    `flag` is where the device was given, for the error. With several ranks on CUDA, each rank uses the GPU with its local rank.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind = next(k for k in ("cuda", "mps", "cpu") if available[k]) if cfg.device == "auto" else cfg.device
    if not available[kind]:
        there = ", ".join(k for k, yes in available.items() if yes)
        raise DeviceError(
            f"{flag} must be a device of this machine ({there}), but is {kind!r}; choose one of them, or {flag} auto"
        )
    if kind == "cuda":  # TensorFloat-32 for products that stay float32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.precision != "fp32"
        torch.backends.cuda.enable_cudnn_sdp(False)  # only for fixed shapes, see attention_of_fixed_shapes
    if kind == "cuda" and cfg.deterministic:  # cuBLAS reads it when it is first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    precision = cfg.precision
    if precision == "auto":
        precision = "bf16" if has_bf16(kind) else "fp16" if kind == "cuda" else "fp32"
    if world.size > 1 and kind == "mps":
        raise DeviceError(
            "several ranks must run on the cpu or on cuda, but the device is mps, which is only one; run without torchrun"
        )
    its_device = torch.device(kind, world.local_rank) if kind == "cuda" and world.size > 1 else torch.device(kind)
    return Runtime(its_device, precision, world)


def has_bf16(kind: str) -> bool:
    """Return whether the hardware multiplies bfloat16, without emulation."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def has_compiler(kind: str) -> bool:
    """Return whether torch.compile can work: with a C++ compiler on the CPU, with Triton on CUDA."""
    if kind == "cuda":
        from torch.utils._triton import has_triton

        return has_triton()
    names = [os.environ.get("CXX", ""), "g++", "clang++", "cl"]
    return kind == "cpu" and any(shutil.which(name) for name in names if name)


def skip_vector_isa_test() -> None:
    """Skip torch.compile's test builds of the CPU's vector instructions if the compiler is GCC 12 or newer, which has them all.

    The test builds take six seconds the first time, and one second at each start. Which instructions the CPU has is still
    read from the CPU. Other compilers are still tested, and TORCHINDUCTOR_VEC_ISA_OK is respected. Has no effect after the
    first use of torch.compile.
    """
    command = [os.environ.get("CXX", "g++"), "-dumpfullversion"]  # clang does not have this flag
    try:
        version = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return
    major = version.partition(".")[0]
    if major.isdecimal() and int(major) >= 12:
        import torch._inductor.config as inductor

        if inductor.cpp.vec_isa_ok is None:
            inductor.cpp.vec_isa_ok = True


@contextmanager
def attention_of_fixed_shapes(runtime: Runtime) -> Iterator[None]:
    """Allow cuDNN's attention, the fastest one of an H100: for rows that fill the context, as in pre-training.

    It prepares a plan for each new shape, which takes longer than many tokens of generated text. So `resolve` switches it off,
    and generation and padded rows do without it.
    """
    if runtime.device.type != "cuda":
        yield
        return
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def deterministic_kernels(wanted: bool, runtime: Runtime) -> Iterator[None]:
    """On a GPU, use only kernels that give the same bits each time, if `wanted`. A CPU's always do.

    torch raises RuntimeError for an operation that has no such kernel.
    """
    if not wanted or runtime.device.type == "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def set_threads(threads: int | None) -> None:
    """Use this many CPU threads, or torch's choice if None. Raises what `require_threads` raises."""
    require_threads(threads)
    if threads is not None:
        torch.set_num_threads(threads)


def require_threads(threads: int | None) -> None:
    """Raise DeviceError if there are fewer cores than `threads`."""
    cores = os.cpu_count() or 1
    if threads is not None and threads > cores:
        raise DeviceError(
            f"train.threads must be at most this machine's {cores} cores, but is {threads}; lower it, or use None"
        )


def seed_all(seed: int) -> None:
    """Seed torch's random generators on every device."""
    torch.manual_seed(seed)


def seed_rank(seed: int, step: int, rank: int) -> None:
    """Seed torch's random generators for one rank at `step`, differently for every rank and step."""
    seed_all(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))


def rng_state(runtime: Runtime) -> dict[str, torch.Tensor]:
    """Return the state of the random generators that training uses for dropout. The order of data needs no generator."""
    state = {"cpu": torch.get_rng_state()}
    if runtime.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state()
    elif runtime.device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Restore a state from `rng_state`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


def synchronize(runtime: Runtime) -> None:
    """Wait until the device has finished its work, so that a time measurement is right."""
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()
    elif runtime.device.type == "mps":
        torch.mps.synchronize()


def reset_peak_memory(runtime: Runtime) -> bool:
    """Return the process's free memory to the system, and reset the peak; return whether the system supports it.

    On the CPU this works on Linux only. Elsewhere the peak of a process never falls.
    """
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        ctypes.CDLL(None).malloc_trim(0)  # of glibc: memory that it keeps would hide what later work needs
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (OSError, AttributeError, TypeError):
        return False
    return True


def peak_memory_bytes(runtime: Runtime) -> int:
    """Return the peak of memory since the start or the last `reset_peak_memory`; 0 if unknown.

    On CUDA it is the memory allocated on the GPU, else the resident memory of this process.
    """
    if runtime.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:  # not Linux
        status = ""
    if mark := re.search(r"VmHWM:\s+(\d+) kB", status):
        return int(mark[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error says that a tensor did not fit into the memory of its device."""
    # MPS and the CPU's allocator raise a plain RuntimeError
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and says_out_of_memory(error))


def release_memory(device: torch.device) -> None:
    """Return memory that torch holds but does not use, after an error for lack of it."""
    gc.collect()  # the frames of an error may be in a cycle
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def gpu_memory_bytes(device: torch.device) -> int | None:
    """Return the memory of a GPU, or None for a CPU. Apple's GPUs share the machine's: it is what Metal advises to use."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return torch.mps.recommended_max_memory() if device.type == "mps" else None


def memory_of_others(device: torch.device) -> int:
    """Return the bytes of a GPU that other programs hold; 0 if that is under a tenth of it, or unknown, as on MPS."""
    if device.type != "cuda":
        return 0
    try:
        free, total = torch.cuda.mem_get_info(device)
        held = total - free - torch.cuda.memory_reserved(device)
    except RuntimeError:  # after some errors, CUDA answers nothing more
        return 0
    return held if held > total / 10 else 0  # CUDA itself takes half a GB in each process


def describe_memory(device: torch.device) -> str:
    """Return the name and size of the memory of a device as a text, such as "the GPU's 15.8 GB"."""
    if device.type != "cuda":
        return "this machine's memory"
    others = f", of which other programs hold {held / 1e9:.1f} GB" if (held := memory_of_others(device)) else ""
    return f"the GPU's {torch.cuda.get_device_properties(device).total_memory / 1e9:.1f} GB{others}"


def describe_out_of_memory(error: RuntimeError) -> str:
    """Return what did not fit into which memory and what helps, for an error that no code closer to it has explained."""
    where = torch.device("cuda" if "CUDA" in str(error) and torch.cuda.is_available() else "cpu")
    sentences = re.split(r"(?<=\.)\s", str(error).partition("\n")[0])
    said = " ".join(sentences[:2])[:120]  # what follows is a list of processes
    advice = "end the other programs, or " if memory_of_others(where) else ""
    return (
        f"the model and what it works on must fit into {describe_memory(where)}, but do not ({said.rstrip('.')}); {advice}use "
        f"a smaller batch, --train.precision bf16, or --device cpu"
    )


def rows_at_once(device: torch.device, row_bytes: int, least: int) -> int:
    """Return how many rows of `row_bytes` bytes to compute together: `least`, or more on a GPU with much memory.

    On CUDA it is the largest power of two whose rows take a 32nd of the memory, since few large products keep a GPU busier
    than many small ones. Elsewhere it is always `least`, because sums of float32 depend on it, and so the bits of a run.
    """
    if device.type != "cuda":
        return least
    fitting = torch.cuda.get_device_properties(device).total_memory // 32 // row_bytes
    return max(least, 2 ** (max(1, fitting).bit_length() - 1))


def has_float64(device: torch.device) -> bool:
    """Return whether the device computes in float64; Apple's GPUs do not."""
    return device.type != "mps"


def available_memory_bytes(runtime: Runtime) -> float | None:
    """Return how much more memory this process can use before it swaps or is killed; None if unknown.

    On Linux it is the least of what the machine and the process's control groups have left. On CUDA it is infinite, because
    there too much memory is an error that can be caught.
    """
    if runtime.device.type == "cuda":
        return math.inf
    try:
        machine = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    except OSError:
        return None
    return None if machine is None else min(int(machine[1]) * 1024, *cgroup_rooms(Path("/proc/self/cgroup")))


def cgroup_rooms(groups: Path, mount: Path = Path("/sys/fs/cgroup")) -> list[float]:
    """Return the bytes left under the memory limit of each control group in `groups`, and of each group above it.

    The first entry is infinity, for a process without groups. The page cache counts as free, because the kernel frees it
    first.
    """
    rooms = [math.inf]
    for line in groups.read_text(encoding="utf-8").splitlines() if groups.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, limit, usage, cache = (
            (mount, "memory.max", "memory.current", "inactive_file")
            if controllers == ""
            else (mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )
        inside = root / path.lstrip("/")
        for folder in (inside, *inside.parents):
            if not folder.is_relative_to(root):
                break
            try:
                most, used = (int((folder / name).read_text(encoding="ascii")) for name in (limit, usage))
                stat = (folder / "memory.stat").read_text(encoding="ascii")
            except (OSError, ValueError):  # the group is not visible from here, or its limit is "max"
                continue
            reclaimable = re.search(rf"^{cache} (\d+)$", stat, re.MULTILINE)
            rooms.append(most - used + (int(reclaimable[1]) if reclaimable else 0))
    return rooms

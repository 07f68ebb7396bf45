"""What a GPU does during training steps, by torch's profiler: for the section `fast` of gpu.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kindling.device import Runtime

PROFILED_STEPS = 4

KINDS = {  # of kernels, by words in their names; the first that fits
    "compiled": ("triton", "compiledfx", "graph_"),
    "attention": ("flash", "fmha", "attention", "cudnn_generated", "sdpa"),
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
        "splitk",
    ),
    "optimiser and gradients": ("adam", "multi_tensor", "foreach"),
    "copies": ("memcpy", "memset", "copy_kernel", "aten::copy_", "aten::fill_", "aten::_to_copy"),
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
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as prof:
        for _ in range(PROFILED_STEPS):
            step()
        device.synchronize(runtime)
    if not on_gpu:
        times = {event.key: event.self_cpu_time_total for event in prof.key_averages()}
        return {"idle_share": None, "kinds": shares(times.items()), "slowest": slowest(times.items())}
    spans = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in prof.events()
        # annotations, such as that of a whole optimiser step, span the gaps between kernels
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    named = [(name, stop - start) for start, stop, name in spans]
    idle = idle_share([(start, stop) for start, stop, _ in spans])
    return {"idle_share": idle, "kinds": shares(named), "slowest": slowest(named)}


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

"""What machine a benchmark ran on, and what else went on there meanwhile.

    watch = Watch()
    ...
    results["machine"] = watch.describe()
    phrase(results["machine"])              # "2 cores with avx512f, torch 2.13.0+cpu"

Results go to RESULTS, a folder that git ignores: benchmarks/results/ has one folder more for each machine whose results are
kept. Limit: instructions, load and stolen time are told where /proc or the system's load average is there, as on Linux.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "local"  # what this machine measures
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "bf16", "sve")


def results_file(name: str) -> Path:
    """Return the path of a file of results, in a folder that exists."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    return RESULTS / name


class Watch:
    """Notes the state of the machine when a measurement begins, and describes the machine when it has ended."""

    def __init__(self) -> None:
        from kindling.training.slowdown import cpu_times

        self._times = cpu_times()
        self._load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None

    def describe(self) -> dict[str, Any]:
        """Return what a figure depends on besides the code; None for what this system does not tell."""
        import torch

        from kindling.training.slowdown import cpu_times

        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        return {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "processor": _of_cpuinfo("model name") or platform.processor() or platform.machine(),
            "instructions": instructions(),
            "gpu": gpu,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "load_before": self._load,
            "stolen_share": stolen_share(self._times, cpu_times()),
        }


def stolen_share(before: list[int], after: list[int]) -> float | None:
    """Return the share of the CPU time between two readings that the host gave to other machines; None if unknown."""
    from kindling.training.slowdown import STEAL

    if len(before) <= STEAL or len(after) <= STEAL:
        return None
    spent = [b - a for a, b in zip(before[: STEAL + 1], after)]
    return spent[STEAL] / max(1, sum(spent))


def instructions() -> list[str]:
    """Return which of INSTRUCTIONS the processor has."""
    flags = (_of_cpuinfo("flags") or _of_cpuinfo("Features") or "").split()
    return [name for name in INSTRUCTIONS if name in flags]


def _of_cpuinfo(field: str) -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(rf"^{field}\s*: (.*)$", text, re.MULTILINE)
    return found[1] if found else None


def phrase(machine: dict[str, Any] | str) -> str:
    """Return a machine in a few words, for the cell of a table; older results have those words only."""
    if isinstance(machine, str):
        return machine
    if machine["gpu"]:
        return f"{machine['gpu']}, torch {machine['torch']}"
    told = [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd") if name in machine["instructions"]]
    widest = f" with {told[0]}" if told else ""
    stolen = machine["stolen_share"]
    lost = f", {stolen:.0%} of the CPU time stolen" if stolen is not None and stolen >= 0.01 else ""
    return f"{machine['threads']} threads on {machine['cores']} cores{widest}, torch {machine['torch']}{lost}"

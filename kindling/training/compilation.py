"""Decides whether a run is long enough for torch.compile to pay.

torch keeps compiled kernels in a cache on disk. So compiling takes a quarter of a minute the first time, and some seconds when a
model of the same shape is compiled again. A mark beside the kernels says that this was done, and goes when they go.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from config import Config
from kindling import device
from kindling.device import Runtime
from kindling.files import sha256_file, sha256_text
from kindling.paths import PROJECT
from model import LanguageModel

COMPILE_MINUTES = 1.5
COMPILE_AGAIN_MINUTES = 0.5  # where the kernels are in the cache
CODE = (
    "model",
    "kindling/norm",
    "kindling/positions",
    "kindling/gpt2_backbone",
    "kindling/blockwise_attention",
    "kindling/loss",
)


def wants_compile(cfg: Config, model: LanguageModel, runtime: Runtime, elapsed_s: float = 0.0) -> bool:
    """Return whether to compile the model: as `train.compile` says, or with "auto" if it pays and there is a compiler.

    `elapsed_s` is the training time so far. Warns if compiling would pay but there is no compiler.
    """
    if cfg.train.compile != "auto":
        return cfg.train.compile == "on"
    if cfg.train.max_minutes is not None:
        minutes = cfg.train.max_minutes - elapsed_s / 60
        pays = minutes >= COMPILE_MINUTES or (minutes >= COMPILE_AGAIN_MINUTES and is_marked(cfg, runtime))
    else:  # the cache must not decide here: the same command gives the same bits
        pays = 6 * model.n_matmul_parameters() * cfg.tokens >= device.COMPILE_FLOPS.get(runtime.device.type, math.inf)
    if not pays:
        return False
    if not device.has_compiler(runtime.device.type):
        if runtime.world.main:
            print(
                f"warning: no compiler for {runtime.device.type} was found, so training goes on uncompiled, which is slower"
                + ("; install g++" if runtime.device.type == "cpu" else ""),
                file=sys.stderr,
            )
        return False
    return True


def mark_compiled(cfg: Config, runtime: Runtime) -> None:
    """Note that a model of this shape was compiled here. Where the cache cannot be written, nothing is noted."""
    with contextlib.suppress(OSError):
        path = _mark(cfg, runtime)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def is_marked(cfg: Config, runtime: Runtime) -> bool:
    """Return whether `mark_compiled` has noted such a model, and the kernels were not deleted since."""
    try:
        return _mark(cfg, runtime).is_file()
    except OSError:
        return False


def _mark(cfg: Config, runtime: Runtime) -> Path:
    """Return the file that is there if the kernels of such a training step are in torch's cache. Raises OSError without one."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # a second to import, and only short runs ask

    train = cfg.train
    shape = [asdict(cfg.model), train.micro_batch, cfg.data.instructions, train.packing]
    how = [runtime.precision, train.activation_checkpointing, train.deterministic, runtime.world.size, train.parallel]
    chip = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else runtime.device.type
    machine = [torch.__version__, chip, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    code = [sha256_file(PROJECT / f"{name}.py") for name in CODE]  # all that is compiled
    return Path(cache_dir()) / "kindling" / sha256_text(json.dumps([shape, how, machine, code]))[:16]

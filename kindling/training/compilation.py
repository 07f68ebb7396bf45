"""Decides whether a run is long enough for torch.compile to pay."""

from __future__ import annotations

import math
import sys

from config import Config
from kindling import device
from kindling.device import Runtime
from model import LanguageModel

COMPILE_MINUTES = 1.5


def wants_compile(cfg: Config, model: LanguageModel, runtime: Runtime, elapsed_s: float = 0.0) -> bool:
    """Return whether to compile the model: as `train.compile` says, or with "auto" if it pays and there is a compiler.

    `elapsed_s` is the training time so far. Warns if compiling would pay but there is no compiler.
    """
    if cfg.train.compile != "auto":
        return cfg.train.compile == "on"
    if cfg.train.max_minutes is not None:
        pays = cfg.train.max_minutes - elapsed_s / 60 >= COMPILE_MINUTES
    else:
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

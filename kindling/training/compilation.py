"""Whether torch.compile pays for a run."""

from __future__ import annotations

import sys

from config import Config
from kindling import device
from kindling.device import Runtime
from model import LanguageModel

COMPILE_FLOPS = 2e13  # about a minute and a half of a small CPU: a shorter run ends before compiling has paid
COMPILE_MINUTES = 1.5


def wants_compile(cfg: Config, model: LanguageModel, runtime: Runtime, elapsed_s: float = 0.0) -> bool:
    """Return whether the model should be compiled: because the config says so, or because it pays and a compiler is there.

    `elapsed_s` is the time that the run has behind it. Warns if compiling would pay, but no compiler is there.
    """
    if cfg.train.compile != "auto":
        return cfg.train.compile == "on"
    if cfg.train.max_minutes is not None:
        pays = cfg.train.max_minutes - elapsed_s / 60 >= COMPILE_MINUTES
    else:
        pays = 6 * model.n_multiplied() * cfg.tokens >= COMPILE_FLOPS
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

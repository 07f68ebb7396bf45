"""How much of a run is done, by steps or by the clock, and the learning rate that follows from it."""

from __future__ import annotations

import math

from config import TrainConfig

LONGEST_WARMUP = 0.1  # of a run by the clock


def share_done(step: int, elapsed_s: float, cfg: TrainConfig) -> float:
    """Return which share of the run is done, 0 to 1: of its minutes where `max_minutes` is set, else of its steps."""
    if cfg.max_minutes is not None:
        return min(1.0, elapsed_s / (60 * cfg.max_minutes))
    assert cfg.max_steps is not None, "Config.with_steps sets it"
    return min(1.0, step / cfg.max_steps)


def learning_rate_scale(step: int, elapsed_s: float, cfg: TrainConfig) -> float:
    """Return the factor on the peak learning rate at `step` (from 0): linear warmup, then decay to `min_lr_ratio`.

    The decay takes the last `decay_share` of what follows the warmup, and before it the rate stays at its peak. By the clock it
    takes that share of the whole time, and the warmup at most a tenth of it, so that few slow steps end annealed too.
    """
    warmup = min(1.0, (step + 1) / cfg.warmup_steps) if cfg.warmup_steps else 1.0
    if cfg.max_minutes is not None:
        progress = share_done(step, elapsed_s, cfg)
        return min(max(warmup, min(1.0, progress / LONGEST_WARMUP)), _decay(progress, cfg))
    if step < cfg.warmup_steps:
        return warmup
    return _decay(min(1.0, (step - cfg.warmup_steps + 1) / max(1, cfg.max_steps - cfg.warmup_steps)), cfg)


def _decay(progress: float, cfg: TrainConfig) -> float:
    """Return the factor after the warmup, of which the share `progress` is done."""
    progress = max(0.0, 1 - (1 - progress) / cfg.decay_share)
    if cfg.schedule == "cosine":
        decay = 0.5 * (1 + math.cos(math.pi * progress))
    elif cfg.schedule == "linear":
        decay = 1 - progress
    else:
        return 1.0
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * decay

"""The learning-rate schedule, and the fraction of a run that is done, by steps or by time."""

from __future__ import annotations

import math

from config import TrainConfig

LONGEST_WARMUP = 0.1  # as a fraction of `max_minutes`


def fraction_done(step: int, elapsed_s: float, cfg: TrainConfig) -> float:
    """Return the fraction of the run that is done, 0 to 1: of its minutes if `max_minutes` is set, else of its steps."""
    if cfg.max_minutes is not None:
        return min(1.0, elapsed_s / (60 * cfg.max_minutes))
    assert cfg.max_steps is not None, "Config.with_steps sets it"
    return min(1.0, step / cfg.max_steps)


def learning_rate_scale(step: int, elapsed_s: float, cfg: TrainConfig) -> float:
    """Return the factor on the peak learning rate at `step` (from 0): linear warmup, then decay to `min_lr_ratio`.

    The decay takes the last `decay_fraction` of the steps after the warmup. Until then the rate stays at its peak. In a run of
    `max_minutes` the decay takes this share of the whole time, and the warmup at most a tenth of it. So a run of few slow
    steps, too, ends with a low rate.
    """
    warmup = min(1.0, (step + 1) / cfg.warmup_steps) if cfg.warmup_steps else 1.0
    if cfg.max_minutes is not None:
        progress = fraction_done(step, elapsed_s, cfg)
        return min(max(warmup, min(1.0, progress / LONGEST_WARMUP)), _decay(progress, cfg))
    if step < cfg.warmup_steps:
        return warmup
    assert cfg.max_steps is not None, "Config.with_steps sets it"
    return _decay(min(1.0, (step - cfg.warmup_steps + 1) / max(1, cfg.max_steps - cfg.warmup_steps)), cfg)


def _decay(progress: float, cfg: TrainConfig) -> float:
    """Return the factor of the decay. `progress` is the fraction done, 0 to 1, of the part after the warmup."""
    progress = max(0.0, 1 - (1 - progress) / cfg.decay_fraction)
    if cfg.schedule == "cosine":
        decay = 0.5 * (1 + math.cos(math.pi * progress))
    elif cfg.schedule == "linear":
        decay = 1 - progress
    else:
        return 1.0
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * decay

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
        warmup = max(warmup, min(1.0, fraction_done(step, elapsed_s, cfg) / LONGEST_WARMUP))
    return min(warmup, decay_scale(step, elapsed_s, cfg))


def has_stable_part(cfg: TrainConfig) -> bool:
    """Return whether the learning rate stays at its peak between the warmup and the decay."""
    return cfg.schedule == "constant" or cfg.decay_fraction < 1


def decay_scale(step: int, elapsed_s: float, cfg: TrainConfig) -> float:
    """Return the factor of the decay alone on the peak learning rate at `step` (from 0): 1 before the decay begins."""
    if cfg.max_minutes is not None:
        progress = fraction_done(step, elapsed_s, cfg)  # of the whole time
    else:
        assert cfg.max_steps is not None, "Config.with_steps sets it"
        after_warmup = max(0, step - cfg.warmup_steps + 1)
        progress = min(1.0, after_warmup / max(1, cfg.max_steps - cfg.warmup_steps))
    progress = max(0.0, 1 - (1 - progress) / cfg.decay_fraction)
    if cfg.schedule == "cosine":
        decay = 0.5 * (1 + math.cos(math.pi * progress))
    elif cfg.schedule == "linear":
        decay = 1 - progress
    else:
        return 1.0
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * decay

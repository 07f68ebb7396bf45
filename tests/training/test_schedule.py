"""schedule.py: the fraction of a run that is done, and the learning rate."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import TrainConfig
from kindling.training.schedule import fraction_done, learning_rate_scale

CFG = TrainConfig(max_steps=100, warmup_steps=10, min_lr_ratio=0.1)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_learning_rate_warms_up_from_zero_and_ends_at_its_floor(schedule):
    cfg = replace(CFG, schedule=schedule)
    rates = [learning_rate_scale(s, 0.0, cfg) for s in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    middle = 0.1 + 0.9 * (0.5 * (1 + math.cos(math.pi * 45 / 90)) if schedule == "cosine" else 0.5)
    assert rates[10 + 44] == pytest.approx(middle)


def test_a_decay_fraction_keeps_the_peak_until_that_share_is_left():
    rates = [learning_rate_scale(s, 0.0, replace(CFG, schedule="linear", decay_fraction=0.5)) for s in range(100)]
    assert set(rates[10:54]) == {1.0} and rates[99] == pytest.approx(0.1)
    assert rates[77] == pytest.approx(1 - 0.9 * 23 / 45)  # 23 of the last 45 steps


@given(st.integers(10, 10_000), st.floats(0, 400))
def test_by_the_clock_the_rate_follows_the_elapsed_share_and_the_steps_do_not_count(step, elapsed_s):
    cfg = replace(CFG, schedule="linear", max_minutes=5, min_lr_ratio=0.0)
    assert learning_rate_scale(step, elapsed_s, cfg) == pytest.approx(max(0.0, 1 - elapsed_s / 300))


def test_a_run_is_done_by_its_minutes_where_they_are_set_and_else_by_its_steps():
    timed = replace(CFG, max_minutes=2)
    assert [fraction_done(10**6, s, timed) for s in (0, 60, 120, 121)] == [0, 0.5, 1, 1]
    assert [fraction_done(s, 10**6, CFG) for s in (0, 25, 100, 101)] == [0, 0.25, 1, 1]

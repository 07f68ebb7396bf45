"""guard.py: gradient norms that are outliers."""

from __future__ import annotations

import io
import math
from statistics import median

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kindling.training.guard import LAG, WARM, WINDOW, SpikeGuard

DEMO_NORMS = """
2.84 1.50 1.05 1.19 1.25 1.16 0.96 0.99 1.01 1.19 0.97 1.10 1.11 0.80 0.89 0.89 0.80 0.72 0.80 0.70 0.68 0.72 0.63
0.73 0.79 0.77 0.61 0.61 0.71 0.71 0.65 0.61 0.59 0.71 0.63 0.65 0.61 0.59 0.61 0.59 0.62 0.56 0.69 0.64 0.60 0.60
0.61 0.64 0.59 0.58 0.63 0.67 0.72 0.65 1.01 0.68 0.55 0.68 0.64 0.72 0.59 0.58 0.60 0.63 0.61 0.58 0.59 0.62 0.56
0.67 0.61 0.63 0.59 0.63 0.71 0.59 0.64 0.57 0.76 0.62 0.60 0.59 0.58 0.60 0.58 0.54 0.52 0.61 0.60 0.57 0.67 0.58
0.58 0.64 0.59 0.57 0.54 0.59 0.59 0.59 0.54 0.58 0.56 0.54 0.58 0.56 0.54 0.61 0.63 0.60
"""
NORMS = st.lists(st.floats(2**-10, 2**10, width=32), min_size=WARM, max_size=3 * WINDOW)
BAD = st.sampled_from([math.nan, math.inf, -math.inf, 1e30, 0.0])


def judge(guard: SpikeGuard, norms: list[float], first: int = 0) -> list[bool]:
    """Give a series of norms to a guard as the trainer does. Return for each step whether it was good."""
    out = []
    for step, norm in enumerate(norms, first):
        out.append(norm <= guard.limit(step))
        guard.add(step, norm, out[-1])
    return out


def fed(norms: list[float], ratio: float = 10, first: int = 0) -> SpikeGuard:
    """Return a guard that was given these norms as good ones."""
    guard = SpikeGuard(ratio)
    for step, norm in enumerate(norms, first):
        guard.add(step, norm, True)
    return guard


def wave(n: int) -> list[float]:
    """Return n norms between 0.5 and 1.5."""
    return [1 + 0.5 * math.sin(i) for i in range(n)]


def test_the_limit_is_the_ratio_times_the_median_of_the_window():
    norms = wave(2 * WINDOW)
    guard = fed(norms, ratio=7)
    assert guard.limit(len(norms) - 1 + LAG) == 7 * median(norms[-WINDOW:])


def test_the_window_is_full_for_the_step_after_the_newest_too():
    norms = wave(2 * WINDOW)
    assert fed(norms).limit(len(norms)) == 10 * median(norms[-WINDOW - 1 : -1])


def test_nothing_is_an_outlier_before_the_window_is_warm():
    guard = SpikeGuard(10)
    assert all(judge(guard, [1.0] * (WARM - 1) + [1e6, 1e6]))  # for the second, too, only WARM - 1 good norms count
    guard = fed([1.0] * WARM)
    assert guard.limit(WARM - 1 + LAG) == 10 and guard.limit(WARM - 2 + LAG) == math.inf


def test_a_ratio_of_zero_lets_every_norm_pass_but_goes_on_counting_them():
    off = fed(wave(WINDOW), ratio=0)
    assert off.limit(WINDOW + LAG) == math.inf
    on = SpikeGuard(10)
    on.load_state_dict(off.state_dict())
    assert on.limit(WINDOW + LAG) == 10 * median(wave(WINDOW))


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, 1e4])
@pytest.mark.parametrize("at", [WARM + LAG, WINDOW + 1, 400])
def test_one_bad_norm_is_one_bad_step(rubbish, at):
    """OLMo-core adds the NaN to its window, and so skips the 128 steps after it as well."""
    norms = wave(600)
    norms[at] = rubbish
    good = judge(SpikeGuard(10), norms)
    assert [i for i, ok in enumerate(good) if not ok] == [at]


def test_the_step_after_a_bad_one_has_the_limit_that_it_would_have_had():
    norms = wave(300)
    spoilt, clean = SpikeGuard(10), SpikeGuard(10)
    judge(spoilt, [*norms[:200], math.nan])
    judge(clean, norms[:200])
    assert spoilt.limit(200 + LAG) == clean.limit(200 - 1 + LAG)
    assert judge(spoilt, norms[200:], first=202) == judge(clean, norms[200:], first=201) == [True] * 100


@given(NORMS, st.integers(-20, 20))
def test_the_limit_scales_with_the_norms(norms, power):
    step = len(norms) + LAG
    scaled = [norm * 2.0**power for norm in norms]
    assert fed(scaled).limit(step) == 2.0**power * fed(norms).limit(step)


@given(NORMS, st.lists(st.tuples(st.integers(0, 3 * WINDOW), BAD), max_size=50))
def test_bad_values_anywhere_in_a_stream_leave_its_limits_as_they_were(norms, bad):
    stream = [(norm, True) for norm in norms]
    for place, value in bad:
        stream.insert(place, (value, False))
    poisoned, clean = SpikeGuard(10), SpikeGuard(10)
    n_good = 0
    for step, (norm, good) in enumerate(stream):
        poisoned.add(step, norm, good)
        if good:
            clean.add(n_good, norm, good)
            n_good += 1
        assert poisoned.limit(step + LAG) == clean.limit(n_good - 1 + LAG)


@given(st.lists(BAD.filter(lambda x: x != 1e30), min_size=1, max_size=2 * WINDOW))
def test_what_has_no_size_does_not_enter_the_window_even_if_it_is_called_good(values):
    guard = fed(wave(WINDOW))
    before = guard.limit(WINDOW - 1 + LAG)
    for step, value in enumerate(values, WINDOW):
        guard.add(step, value, True)
    assert guard.limit(WINDOW + len(values) + LAG) == before


@given(NORMS)
def test_it_does_not_matter_whether_the_newest_norm_was_read_before_the_next_step_is_launched(norms):
    prompt, late = SpikeGuard(10), SpikeGuard(10)
    for step, norm in enumerate(norms):
        assert prompt.limit(step) == late.limit(step)
        prompt.add(step, norm, True)
        if step:
            late.add(step - 1, norms[step - 1], True)


@given(NORMS, st.data())
def test_a_run_that_is_resumed_anywhere_is_judged_as_one_that_was_not(norms, data):
    at = data.draw(st.integers(0, len(norms)))
    spiky = [norm * (100 if i % 7 == 3 else 1) for i, norm in enumerate(norms)]
    whole, first, second = SpikeGuard(10), SpikeGuard(10), SpikeGuard(10)
    good = judge(whole, spiky)
    assert judge(first, spiky[:at]) == good[:at]
    second.add(10**6, 3.0, True)  # a norm of its own, which loading removes
    second.load_state_dict(first.state_dict())
    assert judge(second, spiky[at:], first=at) == good[at:]
    assert second.state_dict() == whole.state_dict()


def test_the_state_is_plain_values_that_load_with_weights_only():
    state = fed(wave(300)).state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == state


def test_norms_that_grow_slowly_are_never_outliers():
    assert all(judge(SpikeGuard(10), [1.01**i for i in range(1500)]))  # to three million times the first


def test_norms_that_jump_for_good_are_skipped_until_someone_rolls_back():
    guard = SpikeGuard(10)
    good = judge(guard, [1.0] * 200 + [11.0] * 300)
    assert all(good[:200]) and not any(good[200:])


def test_a_real_run_has_no_outlier():
    """Every tenth gradient norm of a run of the demo preset. The largest is 1.6 times the median."""
    norms = [float(norm) for norm in DEMO_NORMS.split()]
    good = [judge(SpikeGuard(ratio), norms) for ratio in (10, 2)]
    assert all(map(all, good))


def test_a_new_level_is_accepted_only_if_every_bad_step_was_finite():
    guard = fed([1.0] * WARM)
    for step in range(WARM, WARM + 3):
        guard.add(step, 50.0, good=False, finite=step != WARM + 1)
    again = SpikeGuard(10)
    again.load_state_dict(guard.state_dict())
    assert not guard.accept_new_level() and not again.accept_new_level()
    assert guard.limit(WARM + 9) == again.limit(WARM + 9) == 10.0
    guard.add(WARM + 3, 1.0, good=True)  # the next bad steps are others
    guard.add(WARM + 4, 50.0, good=False)
    assert guard.accept_new_level() and guard.limit(WARM + 9) == math.inf
    assert [guard.accept_new_level() for _ in range(3)] == [True, True, False]  # at most three times

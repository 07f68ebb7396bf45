"""A run that becomes slow says so once. Times are given, no clock is read."""

import pytest

from kindling.training import slowdown
from kindling.training.slowdown import Clocks, Slowdown, share_of_others


def notes_of(speeds, clocks=lambda: None, load=lambda: None, step_s=0.5):
    """Return the notes of a run with so many tokens in each step, by the number of the step."""
    watch = Slowdown(clocks, load)
    return {number: note for number, tokens in enumerate(speeds, 1) if (note := watch.add(tokens, step_s))}


def test_half_a_minute_under_half_of_the_median_is_said_once_and_nothing_after_it():
    found = notes_of([500] * 40 + [200] * 60 + [200] * 200)
    assert list(found) == [100]  # 20 s as usual, then 30 s slow
    assert found[100] == ("note: training has slowed down: 400 tokens/s in the last 30 s, 1,000 before; it goes on")


@pytest.mark.parametrize(
    "speeds",
    [
        [500] * 40 + [200] * 58 + [500] * 40,  # 29 s
        [500] * 40 + [260] * 200,  # slower, but not by half
        ([500] * 40 + [100] * 40) * 5,  # breaks of 20 s
        [10] * 12 + [500] * 100,  # a slow start
        [500] * 8 + [100] * 300,  # 4 s say too little about what is usual
    ],
)
def test_what_is_not_slow_for_so_long_is_not_said(speeds):
    assert notes_of(speeds) == {}


def test_single_slow_steps_among_fast_ones_are_not_a_slow_run():
    assert notes_of([500] * 40 + [900, 20] * 200) == {}


def test_steps_of_many_seconds_are_seen_too():
    assert list(notes_of([500] * 12 + [100] * 5, step_s=10.0)) == [15]


def test_the_note_says_what_else_runs():
    readings = iter([Clocks(100.0, 150.0, 1000.0), Clocks(106.0, 208.0, 1060.0)])
    (note,) = notes_of([500] * 40 + [200] * 60, lambda: next(readings), lambda: 4.25).values()
    assert "(the load average is 4.2 on " in note and "cores, other processes use 87% of the CPU)" in note


def test_the_share_of_others_is_between_none_and_all():
    a = Clocks(10.0, 20.0, 100.0)
    assert share_of_others(a, Clocks(14.0, 30.0, 120.0)) == pytest.approx(0.3)
    assert share_of_others(a, Clocks(25.0, 30.0, 120.0)) == 0.0  # the two are not read at the same moment
    assert share_of_others(a, a) is None and share_of_others(None, a) is None and share_of_others(a, None) is None


def test_the_columns_of_proc_stat_are_busy_or_idle(monkeypatch):
    monkeypatch.setattr(slowdown, "cpu_times", lambda: [100, 10, 50, 700, 30, 1, 2, 7, 99, 99])
    monkeypatch.setattr(slowdown.os, "sysconf", lambda name: 100)
    found = slowdown.read_clocks()
    assert (found.busy_s, found.total_s) == pytest.approx((1.7, 9.0))


def test_where_proc_is_missing_nothing_is_claimed(monkeypatch):
    monkeypatch.setattr(slowdown, "Path", lambda name: __import__("pathlib").Path("/none/of/this"))
    assert slowdown.cpu_times() == [] and slowdown.read_clocks() is None

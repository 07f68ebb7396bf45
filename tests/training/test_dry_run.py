import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_config
from hypothesis import given
from hypothesis import strategies as st

from kindling import device
from kindling.cli import parse_cli
from kindling.training import dry_run as module
from kindling.training.dry_run import (
    NO_MEMORY,
    NO_TIME,
    UNKNOWN,
    DryRunError,
    Measurement,
    Pace,
    Sweep,
    advice,
    dry_run,
    grow,
    length_of,
)
from main import Flags
from model import build_model

SIZES = [2, 4, 8, 16]
NEVER = float("inf")  # a deadline


@pytest.fixture(scope="module")
def cfg(corpus):
    return tiny_config(corpus, batch_size=6, max_steps=100)


def measured_dry(cfg, limit_s=1.0) -> str:
    runtime = device.resolve(cfg.train)
    return dry_run(cfg, build_model(cfg.model), runtime, limit_s=limit_s)


def linear(per_row: int, pass_s: float = 0.0):
    """Measure a model whose passes take 1000 bytes, plus `per_row` for each row."""
    return lambda size: Measurement(size, pass_s * size, 1000 + per_row * size)


def sizes_of(measured):
    return [m.micro_batch for m in measured]


def test_every_divisor_of_the_batch_is_measured_and_nothing_is_written(cfg, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = measured_dry(cfg, limit_s=20)
    rows = re.findall(r"^ +(\d+) +([\d,]+) +\d\.\d\d(  this run's)?$", text, re.MULTILINE)
    assert [int(size) for size, _, _ in rows] == [1, 2, 3, 6]
    assert [bool(own) for _, _, own in rows] == [False, False, False, True]
    assert "not tried" not in text
    assert not list(tmp_path.iterdir())


def test_of_a_run_by_minutes_it_says_what_fits_into_them(cfg):
    text = measured_dry(replace(cfg, train=replace(cfg.train, max_minutes=2.0)))
    steps, tokens = re.search(
        r"^time +about ([\d,]+) steps, ([\d,]+) tokens, in 2 minutes$", text, re.MULTILINE
    ).groups()
    assert int(tokens.replace(",", "")) == int(steps.replace(",", "")) * 6 * 32
    assert "time left" not in text


def test_the_time_that_compiling_takes_is_no_time_for_steps(cfg):
    cfg = replace(cfg, train=replace(cfg.train, max_minutes=2.0))
    assert "about 100 steps" in length_of(cfg, Pace(1, step_s=1.0, compile_s=20.0, compiled=True), 0)


def test_a_resumed_run_has_only_its_other_steps_left(cfg):
    assert length_of(cfg, Pace(1, 6.0, 0.0, False), done=40) == "6.0 minutes for 60 steps, 40 are done"


@given(st.integers(0, 10**6), st.integers(1, 10**6), st.sampled_from([1, *SIZES]))
def test_no_size_is_measured_that_needs_more_memory_than_there_is(per_row, room, own):
    measure = linear(per_row)
    measured, untried = grow(measure(1), SIZES, own, measure, 1000, lambda: room, NEVER)
    assert all(m.peak_bytes <= room for m in measured[1:])
    assert all(measure(size).peak_bytes > room for size in untried)
    assert set(untried.values()) <= {NO_MEMORY} and len(measured) + len(untried) == 5


def test_a_gpu_that_is_out_of_memory_ends_the_growth(cfg):
    def measure(size):
        if size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return linear(1)(size)

    measured, untried = grow(measure(1), SIZES, 1, measure, 1000, lambda: NEVER, NEVER)
    assert sizes_of(measured) == [1, 2, 4] and untried == {8: NO_MEMORY, 16: NO_MEMORY}


def test_where_memory_cannot_be_known_no_size_beyond_the_runs_own_is_tried():
    measured, untried = grow(linear(1)(1), SIZES, 4, linear(1), 1000, lambda: None, NEVER)
    assert sizes_of(measured) == [1, 2, 4] and untried == {8: UNKNOWN, 16: UNKNOWN}


def test_what_would_take_too_long_is_left_out_but_never_the_runs_own_size(monkeypatch):
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    slow = linear(1, pass_s=1.0)
    measured, untried = grow(slow(1), SIZES, 8, slow, 1000, lambda: NEVER, 5.0)
    assert sizes_of(measured) == [1, 2, 8] and untried == {4: NO_TIME, 16: NO_TIME}


def swept(*seconds: float) -> Sweep:
    """Sizes 1, 2, 3 and 6 of a batch of 6, by the time of a pass."""
    measured = [Measurement(n, s, 10**9) for n, s in zip((1, 2, 3, 6), seconds)]
    return Sweep(6, measured, {}, update_s=0.0, update_bytes=0)


def test_the_fastest_size_is_named_as_a_flag_that_the_script_takes(cfg):
    given = swept(1.0, 1.0, 2.0, 6.0)  # a step: 6, 3, 4 and 6 seconds
    text = advice(cfg, given, Pace(6, 6.0, 0.0, False), done=0)
    flag = re.search(r"--train\.micro-batch-size \d+", text)[0].split()
    flags = parse_cli(Flags, "", ["--train.batch-size", "6", *flag])
    assert flags.config.train.micro_batch == 2
    assert "5.0 minutes for 100 steps" in text  # 3 s each


def test_noise_is_no_reason_to_change_the_micro_batch(cfg):
    text = advice(cfg, swept(1.0, 1.0, 1.5, 3.05), Pace(6, 3.05, 0.0, False), done=0)
    assert "none is faster" in text and "--train" not in text


def test_a_run_whose_own_size_does_not_fit_is_told_one_that_does(cfg):
    given = replace(swept(1.0, 1.9), untried={3: NO_MEMORY, 6: NO_MEMORY})
    assert "--train.micro-batch-size 2" in advice(cfg, given, Pace(2, 5.7, 0.0, False), done=0)


def test_a_model_that_does_not_fit_at_all_is_refused_in_one_line(cfg, monkeypatch):
    monkeypatch.setattr(device, "available_memory_bytes", lambda _: 1000)
    with pytest.raises(DryRunError, match="choose a smaller model") as error:
        measured_dry(cfg)
    assert "\n" not in str(error.value)


def test_a_cpu_compares_the_sizes_uncompiled_and_says_so(cfg, monkeypatch):
    monkeypatch.setattr(module, "wants_compile", lambda *_: True)
    monkeypatch.setattr(module.Trainer, "compile", lambda self: True)
    text = measured_dry(cfg)
    assert ", compiled" in text and "compared uncompiled" in text

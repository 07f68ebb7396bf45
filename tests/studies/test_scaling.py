"""The scaling study: a plan that fits the time, runs read from their folders, a prediction made first, and advice."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from kindling import device
from kindling.cli import parse_cli
from kindling.config_io import to_yaml
from kindling.studies import scaling_results
from kindling.studies.plan import PLAN, write_plan
from kindling.studies.plan import Plan as StudyPlan
from kindling.studies.plan import read_plan as study_plan
from kindling.studies.scaling import (
    EARLIER,
    ENTRY,
    FEWEST_STEPS,
    LADDERS,
    PREDICTION,
    RESULT,
    RUNS,
    TOKENS_PER_PARAMETER,
    Plan,
    bytes_to_read,
    matmul_parameters,
    pace_of,
    plan_scaling,
    read_plan,
    run_name,
    scaling_steps,
)
from kindling.studies.scaling_advice import advise, seconds_of_text
from kindling.studies.scaling_law import Law, ScalingError
from kindling.studies.scaling_results import (
    pictures_of,
    predict_held_out,
    read_study,
    sections,
    sections_of,
    write_result,
)
from kindling.studies.scaling_runs import read_run
from kindling.studies.speed import Clock, flops
from kindling.studies.steps import require_plan
from kindling.tables import as_markdown
from main import Flags
from model import build_model
from presets import PRESETS

OURS = Law(0.6, 20.0, 400.0, 0.30, 0.45)
TOY = Plan(12, "modern-5m", LADDERS[0], (100, 215, 464, 1000), 64, 4, 4_000_000)


def clock(flop_per_s: float, least_s: float = 1e-4) -> Clock:
    """A machine of this speed. Nothing is measured."""

    def measured(cfg) -> tuple[float, float]:
        tokens = cfg.train.batch_size * cfg.model.block_size
        return 6 * matmul_parameters(cfg.model) * tokens / flop_per_s + least_s, 0.0

    return Clock(Path("/nowhere"), measured, lambda: 5.0)


def train(folder: Path, plan: Plan, depth: int, steps: int, off: float = 0.0) -> None:
    """Write what a finished run of the study leaves, with the loss of the law."""
    cfg = plan.config(depth, steps)
    run = folder / RUNS / run_name(depth, steps)
    (run / "data").mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(cfg), encoding="utf-8")
    (run / "data" / "manifest.json").write_text(
        json.dumps({"splits": {"train": {"tokens": 200_000}}}), encoding="utf-8"
    )
    loss = OURS.loss(plan.parameters(depth), plan.tokens(steps)) * (1 + off)
    lines = [
        {"step": 0, "val_bits_per_byte": 8.0},
        {"step": steps, "elapsed_s": plan.tokens(steps) * plan.parameters(depth) / 1e9},
        {"step": steps, "val_bits_per_byte": loss + 0.3},  # of a part of the split
        {"step": steps, "val_bits_per_byte": loss},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture
def few_resamples(monkeypatch) -> None:
    monkeypatch.setattr(scaling_results, "fit_law", lambda *columns, fit=scaling_results.fit_law: fit(*columns, n=20))


@pytest.fixture
def study(tmp_path, few_resamples) -> Path:
    """A study whose runs to fit are there."""
    (tmp_path / PLAN).write_text(json.dumps({"minutes": TOY.minutes, ENTRY: asdict(TOY)}), encoding="utf-8")
    for number, run in enumerate(TOY.fitted):
        train(tmp_path, TOY, *run, off=0.002 * (-1) ** number)
    return tmp_path


# -- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ladder", LADDERS)
def test_each_ladder_spans_a_factor_of_thirty_and_holds_out_a_larger_size(ladder):
    sizes = [TOY.parameters(depth) for depth in ladder]
    assert sizes == sorted(sizes) and sizes[-2] >= 30 * sizes[0] and sizes[-1] > 1.5 * sizes[-2]


def test_the_parameters_of_the_law_are_those_that_a_token_is_multiplied_with():
    for name in ("demo", "modern-5m", "portable-5m", "tinystories"):  # untied and tied, with pairs and positions
        cfg = PRESETS[name]().model
        assert matmul_parameters(cfg) == build_model(cfg).n_matmul_parameters(), name


@pytest.mark.parametrize(("minutes", "flop_per_s"), [(90, 3e10), (30, 3e11), (600, 3e10)])
def test_a_plan_fits_its_time_and_spans_a_factor_of_ten_in_tokens(minutes, flop_per_s):
    time = clock(flop_per_s)
    plan = plan_scaling(minutes, time)
    assert 0.85 * 60 * minutes < plan.seconds(time) <= 60 * minutes
    assert plan.steps_of[0] >= FEWEST_STEPS and plan.steps_of[-1] == 10 * plan.steps_of[0]
    assert plan.parameters(plan.depths[-2]) >= 30 * plan.parameters(plan.depths[0])


def test_a_fast_machine_trains_larger_models_on_the_hub_and_none_repeats_local_files_much():
    fast = clock(1e14, 0.01)
    with_hub, local = plan_scaling(180, fast, hub=True), plan_scaling(180, fast)
    assert with_hub.depths != LADDERS[0] and with_hub.base == "modern-50m"
    assert with_hub.tokens_per_parameter >= TOKENS_PER_PARAMETER
    assert local.base == "modern-5m" and local.tokens(local.steps_of[-1]) <= 200e6


def test_the_held_out_run_is_the_largest_but_not_the_longest():
    plan = plan_scaling(90, clock(3e10))
    assert plan.held_out == (plan.depths[-1], plan.steps_of[-2]) and plan.before(*plan.held_out) is None


def test_a_plan_of_an_earlier_version_goes_on_with_the_commands_that_it_had():
    first, second, *_, held_out, _ = TOY.steps(clock(3e10))
    assert TOY.held_out == (TOY.depths[-1], TOY.steps_of[-1]) and held_out.output.endswith("step_001000/manifest.json")
    assert first.command.endswith(" --train.eval-every 100 --train.save-every 100")
    assert second.command == (
        "python main.py --train.extend runs/scaling-d1-100 --name scaling-d1-215 --train.max-steps 215 --train.eval-every 215 "
        "--train.save-every 215"
    )


def test_a_run_that_is_killed_has_a_checkpoint_on_the_way():
    plan = replace(TOY, held_out_steps=464)
    for step in plan.steps(clock(3e10)):
        if step.script == "main.py" and "--train.extend" in step.arguments:
            steps, saved = (
                int(step.arguments[step.arguments.index(f"--train.{flag}") + 1]) for flag in ("max-steps", "save-every")
            )
            assert 25 <= saved <= max(25, steps / 8)
    assert plan.config(5, 464).train.save_every == 58


def test_too_little_time_is_refused_with_the_time_that_fits():
    slow = clock(1e9)
    with pytest.raises(ScalingError, match="--minutes must be at least") as error:
        plan_scaling(5, slow)
    assert "\n" not in str(error.value)
    needed = float(str(error.value).split("at least ")[1].split()[0])
    assert plan_scaling(needed, slow).steps_of[0] >= FEWEST_STEPS


def test_the_steps_train_what_the_plan_says_and_predict_before_the_held_out_run():
    steps = TOY.steps(clock(3e10))
    require_plan(steps, Path("/nowhere"))
    names = [step.name for step in steps]
    assert names[-3:] == ["prediction", run_name(*TOY.held_out), "law"] and len(names) == 19
    assert steps[-2].after == ("prediction",)
    for step, (depth, n_steps) in zip(steps, TOY.fitted):
        assert step.output == f"runs/{step.name}/step_{n_steps:06d}/manifest.json"
        if n_steps == TOY.steps_of[0]:
            cfg = parse_cli(Flags, "", list(step.arguments)).config
            assert cfg == TOY.config(depth, n_steps)
            assert cfg.train.lr == pytest.approx(9e-3 / cfg.model.n_layer)  # by the dial
            assert not step.after


def test_longer_runs_of_a_size_go_on_from_the_trunk_of_the_one_before():
    time = clock(3e10)
    steps = {step.name: step for step in TOY.steps(time)}
    second = steps[run_name(2, 215)]
    assert second.after == (run_name(2, 100),)
    assert " ".join(second.arguments).startswith("--train.extend runs/scaling-d2-100 --name scaling-d2-215 ")
    assert "--train.max-steps 215" in " ".join(second.arguments)
    assert TOY.trunk(2, 215) == 20 + 0.8 * 80 and TOY.trunk(2, 100) == TOY.trunk(*TOY.held_out) == 0
    assert "--train.extend" not in steps[run_name(*TOY.held_out)].arguments
    more = TOY.run_seconds(time, 2, 464) - TOY.run_seconds(time, 2, 215)
    trained = (464 - TOY.trunk(2, 464)) - (215 - TOY.trunk(2, 215))
    assert more == pytest.approx(trained * pace_of(time, "modern-5m", 2, 64, 4).step_s)


def test_a_study_that_goes_on_keeps_its_plan(tmp_path):
    first = scaling_steps(tmp_path, 90, clock(3e10))
    kept, data = read_plan(tmp_path), {"hub": False}
    write_plan(tmp_path, StudyPlan(90.0, 1.0, (), data))  # as study.py does, into the same file
    assert read_plan(tmp_path) == kept and not (tmp_path / EARLIER).exists()
    assert study_plan(tmp_path, None, data) == StudyPlan(90.0, 1.0, (), data)
    assert scaling_steps(tmp_path, 90, clock(9e10))[0].arguments == first[0].arguments
    with pytest.raises(ScalingError, match="--minutes must be 90"):
        scaling_steps(tmp_path, 60, clock(3e10))
    (tmp_path / EARLIER).write_text(json.dumps(asdict(TOY)), encoding="utf-8")  # of an earlier version
    (tmp_path / PLAN).write_text(json.dumps({"minutes": TOY.minutes}), encoding="utf-8")
    assert read_plan(tmp_path) == TOY
    (tmp_path / PLAN).write_text("{", encoding="utf-8")
    with pytest.raises(ScalingError, match="must be the folder of a scaling study"):
        read_plan(tmp_path)


# -- the results ------------------------------------------------------------------------------------------------------


def test_a_run_counts_with_its_last_loss_once_it_is_finished(study):
    depth, steps = TOY.fitted[-1]
    run = study / RUNS / run_name(depth, steps)
    found = read_run(run)
    assert found.bits_per_byte == pytest.approx(OURS.loss(TOY.parameters(depth), TOY.tokens(steps)) * 0.998)
    assert found.passes == TOY.tokens(steps) / 200_000
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:2]), encoding="utf-8")
    assert read_run(run) is None and read_run(study / "none") is None


def test_the_held_out_run_is_predicted_once_and_before_it_is_there(study):
    made = predict_held_out(study)
    depth, steps = TOY.held_out
    assert made["bits_per_byte"] == pytest.approx(OURS.loss(TOY.parameters(depth), TOY.tokens(steps)), abs=0.02)
    assert made["interval"][0] < made["bits_per_byte"] < made["interval"][1]
    train(study, TOY, *TOY.held_out)
    assert predict_held_out(study) == made  # what was predicted stays
    (study / PREDICTION).unlink()
    with pytest.raises(ScalingError, match="must be predicted before it is trained"):
        predict_held_out(study)


def test_the_table_says_by_how_much_the_prediction_was_off(study):
    made = predict_held_out(study)
    train(study, TOY, *TOY.held_out, off=0.2)
    found = write_result(study)
    miss = found.held_out.bits_per_byte - made["bits_per_byte"]
    table = (study / "table.md").read_text(encoding="utf-8")
    assert f"{miss:+.4f}" in table and "outside the interval" in table
    assert (study / "scaling.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((study / RESULT).read_text(encoding="utf-8"))
    assert result["held_out"]["bits_per_byte"] == found.held_out.bits_per_byte and len(result["runs"]) == 16
    assert set(result["law"]) == set(result["intervals"]) == {"E", "A", "B", "a", "b"}


def test_runs_that_are_missing_are_named_and_too_few_are_refused(study):
    for number, run in enumerate(TOY.fitted):
        if number == 0:
            (study / RUNS / run_name(*run) / "metrics.jsonl").unlink()
    text = as_markdown("t", [], sections(read_study(study)))
    assert f"without runs that are missing or have no loss: {run_name(*TOY.fitted[0])}" in text
    for run in TOY.fitted[3:]:
        (study / RUNS / run_name(*run) / "metrics.jsonl").unlink()
    with pytest.raises(ScalingError, match="must be fitted to at least"):
        read_study(study)
    law, runs = sections_of(study)  # the page of the study shows what there is
    assert law.warnings[0].startswith("No law: ") and run_name(*TOY.fitted[5]) in law.warnings[1]
    assert [row[0] for row in runs.rows] == [run_name(*run) for run in TOY.fitted[1:3]] and pictures_of(study) == []
    assert all(row[-2:] == ["-", f"runs/{row[0]}/metrics.jsonl"] for row in runs.rows)


# -- the advice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"), [("3h", 10800), ("90m", 5400), ("1h30m", 5400), ("0.5d", 43200), ("40 s", 40)]
)
def test_a_time_is_read(text, seconds):
    assert seconds_of_text(text) == seconds


@pytest.mark.parametrize("text", ["3", "h", "3 hours", "-1h", "0h", "1.2.3h", ""])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ScalingError, match="--predict must be a time"):
        seconds_of_text(text)


def test_the_preset_with_the_lowest_predicted_loss_is_advised(study):
    (study / RESULT).write_text("{}", encoding="utf-8")
    slow, fast = (advise(study, 3 * 3600, clock(speed)) for speed in (1e11, 1e15))
    assert [row[0] for row in slow.rows] == ["modern-5m", "modern-50m", "modern-150m"]
    assert "Train modern-5m:" in slow.notes[0] and "Train modern-150m:" in fast.notes[0]
    assert "--model.block-size 64" in slow.notes[0] and "--train.max-steps" in slow.notes[0]
    assert "N x" in slow.rows[-1][-1] and "portable" in slow.notes[3]
    command = slow.notes[0].split("main.py ")[1].split()
    cfg = parse_cli(Flags, "", command).config
    assert cfg.data.sources[0].max_bytes == bytes_to_read(cfg.tokens)
    large = parse_cli(Flags, "", fast.notes[0].split("main.py ")[1].split()).config  # its own data is on the hub
    assert replace(large.data.sources[0], max_bytes=None) == replace(
        PRESETS["modern-5m"]().data.sources[0], max_bytes=None
    )
    assert "The prediction is for new text" in fast.notes[-1] and len(fast.notes) == len(slow.notes) + 1
    assert cfg.model.n_layer == 3 and 6 * matmul_parameters(cfg.model) * cfg.tokens / 1e11 < 3 * 3600


def test_without_a_finished_study_or_time_there_is_no_advice(study):
    with pytest.raises(ScalingError, match="must hold a finished scaling study"):
        advise(study, 3600, clock(1e10))
    (study / RESULT).write_text("{}", encoding="utf-8")
    with pytest.raises(ScalingError, match="--predict must give the smallest preset time"):
        advise(study, 30, clock(1e9))


def test_an_optimum_beyond_the_runs_still_makes_a_table_and_a_picture(study):
    found = read_study(study)
    steep = replace(found, fit=replace(found.fit, law=Law(0.6, 20.0, 400.0, 0.01, 0.45)))
    assert scaling_results.picture(steep).startswith(b"\x89PNG")
    assert math.isfinite(steep.fit.law.optimum(1e12)[0]) and sections(steep)


def test_long_runs_are_planned_at_the_speed_of_a_compiled_step(monkeypatch):
    monkeypatch.setattr(device, "has_compiler", lambda kind: True)
    monkeypatch.setattr(device, "COMPILE_FLOPS", dict.fromkeys(("cpu", "cuda", "mps"), 2e13))
    asked: set[str] = set()

    def measured(cfg) -> tuple[float, float]:
        asked.add(cfg.train.compile)
        return flops(cfg) / 3e10 / (2 if cfg.train.compile == "on" else 1), 0.0

    twice = Clock(Path("/nowhere"), measured, lambda: 5.0)
    toy = replace(TOY, compiled=True)
    long = replace(toy, steps_of=(200_000, 430_000, 930_000, 2_000_000), held_out_steps=930_000)
    train = TOY.config(2, 100).train
    ends = [twice.compiles(train, 6 * plan.parameters(2) * plan.tokens(plan.steps_of[0])) for plan in (toy, long)]
    assert ends == [False, True]
    slow = Clock(Path("/nowhere"), lambda cfg: (flops(cfg) / 3e10, 0.0), lambda: 5.0)
    assert toy.run_seconds(twice, 2, 100) > 0 and asked == {"off"}
    assert long.run_seconds(twice, 2, 200_000) < 0.6 * long.run_seconds(slow, 2, 200_000) and asked == {"off", "on"}
    assert replace(long, compiled=False).run_seconds(twice, 2, 200_000) > long.run_seconds(twice, 2, 200_000)
    monkeypatch.setattr(device, "has_compiler", lambda kind: False)
    assert not twice.compiles(train, 1e20)


def test_a_plan_has_more_steps_where_compiling_is_faster(monkeypatch):
    monkeypatch.setattr(device, "has_compiler", lambda kind: True)
    monkeypatch.setattr(device, "COMPILE_FLOPS", dict.fromkeys(("cpu", "cuda", "mps"), 1e12))

    def plan_with(speed_up: float) -> Plan:
        def measured(cfg) -> tuple[float, float]:
            return flops(cfg) / 3e10 / (speed_up if cfg.train.compile == "on" else 1), 0.0

        return plan_scaling(90, Clock(Path("/nowhere"), measured, lambda: 5.0))

    same, faster, slower = (plan_with(speed_up) for speed_up in (1.0, 2.0, 0.5))
    assert faster.compiled and faster.steps_of[0] > 1.5 * same.steps_of[0]
    assert slower.compiled and slower.steps_of[0] < same.steps_of[0]  # runs are compiled all the same

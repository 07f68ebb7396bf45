"""Plans: sizes by one dial, what fits the time, and commands that the scripts understand."""

import importlib
import json
import time
from dataclasses import replace

import pytest
from conftest import ROOT

from config import Config
from kindling.cli import parse_cli
from kindling.data.sources import LocalFile
from kindling.errors import KindlingError
from kindling.studies import plan as planning
from kindling.studies.inputs import Inputs, prose_of_docstrings, sums
from kindling.studies.sizes import LADDER, flags_of, shrink
from kindling.studies.speed import Clock, flops
from kindling.studies.steps import Step, StudyError, require_plan
from presets import PRESETS, preset
from study import SEEDS, study_of


@pytest.fixture
def clock(tmp_path):
    """A machine of 1e9 FLOP/s, on which nothing is really measured."""
    return Clock(tmp_path, measure=lambda cfg: (flops(cfg) / 1e9, 0.0), start=lambda: 1.0)


def test_the_dial_at_one_is_the_preset_itself():
    assert all(shrink(make(), 1.0) == make() for make in PRESETS.values())
    assert flags_of(preset("code-50m")) == ("--preset", "code-50m")


@pytest.mark.parametrize(
    "name", ["code-50m", "code-225m", "tinystories", "autocomplete", "fineweb-nano", "smallcoder-2"]
)
def test_the_dial_makes_valid_sizes_that_fall_and_keep_the_ratio_of_tokens(name):
    seed, sizes = preset(name), []
    for scale in LADDER:
        cfg = shrink(seed, scale)
        sizes.append(cfg.model.n_parameters)
        if cfg.train.max_steps > 60:
            ratio = (cfg.tokens / cfg.model.n_parameters) / (seed.tokens / seed.model.n_parameters)
            assert ratio == pytest.approx(1, rel=0.02)
    assert sizes == sorted(sizes, reverse=True)


def test_flags_give_the_config_back():
    cfg = shrink(preset("code-50m"), 0.25)
    cfg = replace(cfg, name="x", data=replace(cfg.data, max_tokens=None, drop_generated=True))
    module = importlib.import_module("main")
    assert parse_cli(module.Flags, module.__doc__, list(flags_of(cfg))).config == cfg


def made(scale: float, clock: Clock, inputs: Inputs) -> list[Step]:
    cfg = shrink(preset("code-50m"), scale)
    return [Step("a", "main.py", (), "a", (), clock.training(cfg))]


def test_the_largest_size_that_fits_is_chosen(clock):
    scale, steps = planning.largest_plan(made, clock, Inputs(), 3600)
    assert planning.total(steps) <= 3600
    larger = [s for s in LADDER if s > scale]
    assert larger and planning.total(made(min(larger), clock, Inputs())) > 3600


def test_no_size_is_measured_that_would_take_far_too_long(clock):
    measured, measure = [], clock._measure
    clock._measure = lambda cfg: measured.append(cfg) or measure(cfg)
    planning.largest_plan(made, clock, Inputs(), 3600)
    assert 0 < len(measured) <= 4
    assert all(clock.training(cfg) < 2 * 3600 for cfg in measured)


def test_too_little_time_is_one_line_that_says_what_fits(clock):
    with pytest.raises(
        StudyError, match=r"study 000 must have at least \d+ minutes .* was given 0.1; give --minutes (\d+)"
    ):
        planning.largest_plan(made, clock, Inputs(), 6, "000")


def test_the_first_plan_of_a_shape_has_its_time_to_compile(tmp_path):
    clock = Clock(tmp_path, measure=lambda cfg: (1.0, 30.0), start=lambda: 1.0)
    assert clock.training(preset("code-50m"), 5) == clock.training(preset("code-50m"), 5) > 35


def test_speed_is_kept_in_the_folder_and_only_for_the_same_machine(clock, tmp_path, monkeypatch):
    clock.training(preset("code-50m"))
    clock.save()
    again = Clock(tmp_path, measure=lambda cfg: pytest.fail("measured again"), start=lambda: 9.0)
    assert again.training(preset("code-50m")) == clock.training(preset("code-50m"))
    assert Clock(tmp_path, max_age_s=600).measured == clock.measured
    later = time.time() + 700  # the machine may have been busy then
    monkeypatch.setattr("time.time", lambda: later)
    late = Clock(tmp_path, max_age_s=600, start=lambda: 2.0)
    assert late.measured == {} and late.start_s
    late.save()  # keeps what others may use
    assert Clock(tmp_path).measured == clock.measured | {"start": [2.0]}
    assert Clock(tmp_path, max_age_s=600).measured == {"start": [2.0]}
    text = (tmp_path / "speed.json").read_text("utf-8").replace('"cores"', '"other"')
    (tmp_path / "speed.json").write_text(text, encoding="utf-8")
    assert Clock(tmp_path).measured == {}


@pytest.mark.parametrize("name", SEEDS)
@pytest.mark.parametrize(("hub", "scale"), [(False, 1 / 16), (True, 1.0), (True, 1 / 8)])
def test_each_command_of_a_plan_is_understood_by_its_script(clock, tmp_path, monkeypatch, name, hub, scale):
    study, size = study_of(name), (scale, clock, Inputs(tmp_path, preset=hub))
    steps = study.plan(*size)
    require_plan(steps, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kindling.studies.held_out.write_held_out", lambda inputs: None)
    monkeypatch.setattr(Inputs, "write", lambda self, source: None)
    study.prepare(size[0], size[2])  # the files that commands name
    for step in steps:
        module = importlib.import_module(step.script.removesuffix(".py"))
        default = (module.OFFLINE,) if step.script == "sft_train.py" else ()
        if step.script == "autocomplete.py":
            assert module.parse_arguments(list(step.arguments))
        else:
            assert parse_cli(module.Flags, module.__doc__, list(step.arguments), *default)
        assert (ROOT / step.script).is_file() and step.seconds > 0


@pytest.mark.parametrize("name", SEEDS)
def test_at_full_size_from_the_hub_the_shapes_are_the_presets(clock, tmp_path, name):
    """So a machine with a large GPU trains what the project trained."""
    for step in study_of(name).plan(1.0, clock, Inputs(tmp_path, preset=True)):
        if step.script == "main.py" and not step.name.startswith("spike"):
            module = importlib.import_module("main")
            cfg = parse_cli(module.Flags, module.__doc__, list(step.arguments)).config
            assert cfg.model == replace(preset(cfg.preset).model, vocab_size=cfg.model.vocab_size)


@pytest.mark.parametrize("name", ["000", "003", "004"])
def test_below_full_size_the_hub_gives_as_many_tokens_as_are_read_and_a_tokenizer_of_the_vocabulary(
    clock, tmp_path, name
):
    steps = study_of(name).plan(1 / 8, clock, Inputs(tmp_path, preset=True))
    parsed = {step.name: configured(step) for step in steps if step.script in ("main.py", "data_pipeline.py")}
    builds = [cfg for step, cfg in parsed.items() if step.startswith("data")]
    for step, cfg in parsed.items():
        assert cfg.tokenizer.kind != "pretrained" or cfg.tokenizer.path == "runs/stage-1/tokenizer.json"
        assert cfg.data.val_fraction * cfg.data.max_tokens > 2000
        if not step.startswith(("data", "spike")):  # it has a build, of as many tokens as it reads
            assert any(replace(cfg.data, workers=b.data.workers) == b.data for b in builds)
            seed = preset(cfg.preset)  # which may read its data several times
            assert cfg.data.max_tokens / cfg.tokens >= 0.95 * seed.data.max_tokens / seed.tokens
    assert max(cfg.data.max_tokens for cfg in builds) < 0.1 * preset(builds[0].preset).data.max_tokens
    if name == "000":  # one build, so that the sizes compare
        assert len(builds) == 1
        tunings = [step for step in steps if step.script == "sft_train.py"]
        assert all("--data.sources.0.max-bytes" in step.arguments for step in tunings)


def configured(step: Step) -> Config:
    """Return the config of a step that trains or builds."""
    module = importlib.import_module(step.script.removesuffix(".py"))
    return parse_cli(module.Flags, module.__doc__, list(step.arguments)).config


def test_rows_that_are_given_to_fine_tune_on_are_read_in_their_ratio_and_timed(clock, tmp_path):
    rows, few = tmp_path / "rows.jsonl", tmp_path / "few.jsonl"
    row = json.dumps({"instruction": "Add.", "input": "", "output": "x" * 990}) + "\n"
    rows.write_text(row * 4000, encoding="utf-8")
    few.write_text(row * 100, encoding="utf-8")
    plans = {given: study_of("000").plan(1 / 8, clock, Inputs(tmp_path, instructions=given)) for given in (None, rows)}
    mined, read = ([step for step in steps if step.script == "sft_train.py"] for steps in plans.values())
    for step in read:
        assert step.arguments[step.arguments.index("--data.sources.0.max-bytes") + 1] == "1000000"
    assert all(two.seconds > one.seconds for one, two in zip(mined, read))
    assert "rows.jsonl, its first 1.0 MB" in study_of("000").sources(1 / 8, Inputs(tmp_path, instructions=rows))
    less = [
        s for s in study_of("000").plan(1 / 8, clock, Inputs(tmp_path, instructions=few)) if s.script == "sft_train.py"
    ]
    assert all(one.seconds < two.seconds for one, two in zip(less, read))
    with pytest.raises(KindlingError, match="must be a file or folder that exists"):
        study_of("000").plan(1 / 8, clock, Inputs(tmp_path, instructions=tmp_path / "none.jsonl"))


@pytest.mark.parametrize(("scale", "tokens", "three"), [(1.0, "512", True), (1 / 8, "64", False)])
def test_at_full_size_samples_are_as_long_as_the_projects(clock, tmp_path, scale, tokens, three):
    for name in ("000", "004"):
        for step in study_of(name).plan(scale, clock, Inputs(tmp_path)):
            if step.script == "evaluate.py":
                assert step.arguments[step.arguments.index("--eval.max-new-tokens") + 1] == tokens
                assert ("mbpp-3shot:1" in step.arguments) == (three and name == "004")


def test_a_stored_plan_is_gone_on_with_and_another_one_refused(tmp_path):
    data = {"hub": False, "code": "/rows.jsonl"}
    step = Step("a", "main.py", ("--x", "1"), "a", ("b",), 2.0, "about")
    plan = planning.Plan(60.0, 0.5, (step,), data)
    assert planning.read_plan(tmp_path, 60.0, data) is None
    planning.write_plan(tmp_path, plan)
    nothing = {"hub": False, "code": None}
    assert planning.read_plan(tmp_path, 60.0, data) == planning.read_plan(tmp_path, None, nothing) == plan
    for minutes, given, words in (
        (30.0, data, r"--minutes must be 60, as .*plan\.json has it, but is 30; leave it out"),
        (60.0, {**data, "code": "/other"}, "--code must be /rows.jsonl, .* but is /other; leave it out"),
        (60.0, {**nothing, "hub": True}, "--hub must be False"),
    ):
        with pytest.raises(StudyError, match=words):
            planning.read_plan(tmp_path, minutes, given)
    (tmp_path / "plan.json").write_text('{"minutes": 60, "steps": 3}', encoding="utf-8")
    with pytest.raises(StudyError, match=r"must be as study\.py wrote it"):
        planning.read_plan(tmp_path, 60.0, data)
    (tmp_path / "plan.json").write_text('{"minutes": 45}', encoding="utf-8")  # of an earlier version
    assert planning.read_plan(tmp_path, None, data) == planning.Plan(45.0, 1.0, None, {})


def test_a_second_start_has_the_steps_of_the_first_though_the_machine_is_slower(tmp_path, monkeypatch):
    import study
    from kindling.studies import speed

    def plan(scale: float, clock: Clock, inputs: Inputs) -> list[Step]:
        return [replace(one, arguments=(str(scale), str(inputs.code))) for one in made(scale, clock, inputs)]

    ran, seconds, code = [], [1e-9], tmp_path / "code.jsonl"
    code.touch()
    monkeypatch.setattr(speed.Clock, "step_s", lambda self, cfg: flops(cfg) * seconds[0])
    monkeypatch.setattr(speed.Clock, "start_s", 1.0)
    monkeypatch.setattr("kindling.sandbox.self_test.self_test", lambda *a: None)
    monkeypatch.setattr("kindling.studies.steps.run_steps", lambda steps, *a: ran.append(steps) or 130)
    monkeypatch.setattr(study, "study_of", lambda name: replace(study_of(name), plan=plan))
    flags = ["000", "--out", str(tmp_path / "s")]
    assert study.main([*flags, "--minutes", "60", "--code", str(code)]) == 130
    seconds[0] = 3e-9
    (tmp_path / "s" / "speed.json").unlink()
    assert study.main(flags) == 130
    assert ran[0] == ran[1] and ran[1][0].arguments[1] == str(code)
    kept = tmp_path / "s" / "plan.json"
    kept.write_text('{"minutes": 30}', encoding="utf-8")  # of an earlier version, which planned again
    assert study.main(flags) == 130
    assert json.loads(kept.read_text(encoding="utf-8"))["minutes"] == 30 and ran[2] != ran[1]
    assert planning.read_plan(tmp_path / "s", None, {}).steps == tuple(ran[2])


def test_ctrl_c_before_the_first_step_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    import study

    monkeypatch.setattr(study, "run_study", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    assert study.main(["003", "--minutes", "30"]) == 130
    assert "stopped in study 003; python study.py 003 --minutes 30 goes on from here" in capsys.readouterr().out


def test_of_all_studies_one_that_cannot_be_planned_is_left_out(monkeypatch, capsys):
    import study

    def run(name: str, flags: study.Flags, minutes: float, command: str) -> int:
        if name == "000":
            raise StudyError("study 000 must have at least 90 minutes")
        print(f"ran {name}")
        return 0

    monkeypatch.setattr(study, "run_study", run)
    assert study.main(["all", "--minutes", "30"]) == 1
    said = capsys.readouterr()
    assert "6 studies, one after the other; each has 5 minutes" in said.err
    assert said.out.split("\n")[:-1] == [f"ran {name}" for name in (*SEEDS[1:], "scaling")]
    assert "error: study 000 is left out: study 000 must have at least 90 minutes" in said.err
    with pytest.raises(StudyError, match="at least 90"):
        study.main(["000"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["000", "--minutes", "0"], "--minutes must be a positive number of minutes, but is 0;"),
        (["scaling", "--minutes", "inf"], "--minutes must be a positive number of minutes, but is inf;"),
        (["scaling", "--code", "x"], "--code must be left out for the study scaling"),
        (["001", "--code", "x"], "--code must be left out for the study 001, .*takes --prose"),
        (["000", "--prose", "x"], "--prose must be left out for the study 000, .*takes --code, --instructions"),
        (["--predict", "3h"], "--predict must come with a study, .*study.py scaling --predict 3h"),
        (["--minutes", "60"], "--minutes must come with a study, .*study.py 000 --minutes 60"),
        (["audit", "--hub"], "--hub must come with a study"),
        (["004", "--harness-data", "x"], "--harness-data needs lm-eval"),
        (["--minutes", "0"], "--minutes must come with a study"),
        (["000", "--hub", "--code", "x"], "--code must be left out with --hub"),
        (["004", "--hub", "--prose", "x"], "--prose must be left out with --hub"),
    ],
)
def test_what_no_study_can_use_is_refused(argv, words, monkeypatch):
    import study

    monkeypatch.setattr(study, "find_spec", lambda name: None)  # whether or not lm-eval is installed here
    with pytest.raises(StudyError, match=words):
        study.main(argv)


def test_a_stand_in_stops_when_there_are_enough_bytes(tmp_path, monkeypatch):
    read = []
    texts = (read.append(n) or "x" * 1000 for n in range(10_000))
    monkeypatch.setattr("kindling.studies.inputs.prose_of_docstrings", lambda unread, globs: texts)
    inputs = Inputs(tmp_path)
    inputs.write(inputs.prose_source(20_000).source)
    assert len(read) == 20
    assert sum(1 for _ in open(tmp_path / "sources" / "prose-0MB.jsonl", encoding="utf-8")) == 20


def test_docstrings_and_sums_are_the_same_each_time():
    first, again = (next(prose_of_docstrings([])) for _ in range(2))
    assert first == again and len(first) >= 200
    text = next(sums())
    assert text == next(sums()) and "multiply by" in text
    for line in text.splitlines():
        plus, times = line.split(". ")[1].rstrip(".").split(", and ")
        assert all(eval(part.split(" = ")[0]) == int(part.split(" = ")[1]) for part in (plus, times))


def test_files_that_cannot_be_parsed_are_counted_in_the_stand_in(tmp_path, monkeypatch, capsys):
    for name, text in (("a", "def f(:\n"), ("b", f'"""{"x" * 300}"""\n')):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    files = [LocalFile(path.name, path, 1, 0) for path in sorted(tmp_path.glob("*.py"))]
    monkeypatch.setattr("kindling.studies.inputs.local_files", lambda source: files)
    inputs = Inputs(tmp_path)
    inputs.write(inputs.prose_source(1_000_000).source)
    assert f"note: files that cannot be parsed are left out: 1, such as {tmp_path / 'a.py'}" in capsys.readouterr().out
    assert (tmp_path / "sources" / "prose-1MB.jsonl").read_text("utf-8").count("x" * 300) == 1

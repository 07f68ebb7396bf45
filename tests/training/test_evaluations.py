"""When a run is evaluated and shows samples, on how much, and that neither changes a bit of it."""

import csv
import json
import math
import shutil
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_run, tiny_config
from test_trainer import Clock, Numbers, stop_during

from config import ModelConfig, TrainConfig
from kindling import device
from kindling.data.shards import Batch, PackedBlocks, evenly_spaced
from kindling.generation.completion import complete
from kindling.generation.sampling import Sampling
from kindling.runs.checkpoint import load_state
from kindling.runs.metrics import MetricsLog, read_metrics
from kindling.training.evaluations import part_of_split, steps_between
from kindling.training.loop import fit
from kindling.training.stage import length, summary_line
from kindling.training.state import TrainingState
from kindling.training.trainer import Trainer
from kindling.training.validation import Validation, mean_loss, summed_loss, validate
from model import build_model
from presets import PRESETS, preset

# -- when, and on how much --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps, between", [(1500, 150), (1499, 149), (25_000, 1000), (4, 1)])
def test_a_run_is_evaluated_at_ten_points_at_least(corpus, steps, between):
    assert steps_between(tiny_config(corpus, max_steps=steps, eval_every=None).train) == between


def test_what_the_user_sets_is_what_counts(corpus):
    assert steps_between(tiny_config(corpus, eval_every=7).train) == 7
    assert steps_between(tiny_config(corpus, eval_every=7, max_minutes=1).train) == 7
    assert steps_between(tiny_config(corpus, eval_every=None, max_minutes=1).train) is None


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_ten_points(name):
    cfg = preset(name).with_steps(20_000)
    assert cfg.train.max_steps // steps_between(cfg.train) >= 10


@pytest.mark.parametrize("n_rows, part", [(700, None), (720, None), (721, 72), (1150, 72), (10**6, 72)])
def test_a_split_of_more_than_a_fiftieth_of_the_run_is_read_in_part(n_rows, part):
    cfg = preset("demo")  # 12,000 rows, each forward and backward: as long as 36,000 forward
    assert part_of_split(cfg, n_rows) == part


def test_a_part_has_enough_tokens_to_say_something(corpus):
    cfg = tiny_config(corpus, max_steps=20)  # 80 rows of 32 tokens
    assert part_of_split(cfg, 10**6) == 16_384 // 32 and part_of_split(cfg, 400) is None


def test_in_a_run_by_minutes_the_measured_speed_counts():
    cfg = preset("demo")
    cfg = replace(cfg, train=replace(cfg.train, max_minutes=10))
    assert part_of_split(cfg, 1000, row_s=0.012) is None  # 12 of 600 s
    assert part_of_split(cfg, 1001, row_s=0.012) == 100  # 1.2 s
    assert part_of_split(cfg, 1000, row_s=0.12) == 64  # 8 s for enough tokens
    assert part_of_split(cfg, 1000, row_s=0.4) == 30  # never more than 12 s
    assert part_of_split(cfg, 1000, row_s=60.0) == 1


def test_a_part_is_spread_over_the_split_and_is_the_same_each_time():
    assert evenly_spaced(10, 4) == [0, 2, 5, 7] and evenly_spaced(3, 9) == evenly_spaced(3, None) == [0, 1, 2]


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory, corpus):
    """A run's folder without checkpoints."""
    run = make_run(tmp_path_factory.mktemp("made") / "r", corpus, n_files=2)
    shutil.rmtree(run.path / "step_000004")
    return run.path


def trainer_in(path, made, cfg, kind=Validation, n_rows=4, model_seed=0):
    from kindling.runs.checkpoint import RunDirectory

    if not path.exists():
        shutil.copytree(made, path)
    run, runtime = RunDirectory(path), device.resolve(cfg.train)
    device.seed_all(model_seed)
    model = build_model(cfg.model)
    batches = PackedBlocks(Numbers(), cfg.model.block_size, cfg.train.seed)
    return Trainer(cfg, run, model, batches, kind(run.heldout("val"), runtime, n_rows), runtime)


def points(path):
    return [line for line in read_metrics(path / "metrics.jsonl") if "val_loss" in line]


def test_the_figures_of_a_part_are_those_of_its_rows(made, corpus, tmp_path):
    trainer = trainer_in(tmp_path / "r", made, tiny_config(corpus))
    dataset, cfg, n = trainer.validation.dataset, trainer.cfg.model, 10
    rows = list(dataset.in_order(cfg, 1))
    assert len(rows) == dataset.n_rows_in_order(cfg) > 2 * n
    wanted, tokens = mean_loss(trainer.model, [rows[i] for i in evenly_spaced(len(rows), n)], trainer.runtime)
    found, whole = (validate(trainer.model, dataset, trainer.runtime, 4, part) for part in (n, None))
    assert found["val_loss"] == pytest.approx(wanted, rel=1e-5) and found["val_tokens"] == tokens == 32 * n
    assert whole["val_tokens"] == dataset.n_targets == len(dataset) - 1
    ratio = [figures["val_bits_per_byte"] / figures["val_loss"] for figures in (found, whole)]
    assert ratio[0] == pytest.approx(ratio[1])


def test_only_rows_that_fill_the_context_get_the_attention_of_fixed_shapes(monkeypatch):
    cfg = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=20)
    model, runtime = build_model(cfg), device.resolve(TrainConfig(device="cpu"))
    used = []
    monkeypatch.setattr(device, "attention_of_fixed_shapes", lambda runtime: used.append(True) or nullcontext())
    wrapped = torch.nn.Module()  # as DDP does
    wrapped.module, wrapped.forward = model, model.forward
    for way, width, expected in ((model, 6, []), (model, 8, [True]), (wrapped, 8, [True]), (wrapped, 6, [])):
        used.clear()
        idx = np.ones((2, width), dtype=np.int64)
        summed_loss(way, Batch(idx, idx), runtime)
        assert used == expected


def test_a_run_is_evaluated_before_its_first_step_on_the_same_part_at_each_point_and_whole_at_the_end(
    made, corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr("kindling.training.evaluations.PART_TOKENS", 32 * 10)
    trainer = trainer_in(tmp_path / "r", made, tiny_config(corpus, max_steps=20, eval_every=None))
    before = validate(trainer.model, trainer.validation.dataset, trainer.runtime, 4, 10)
    assert fit(trainer) == 0
    found, state = points(trainer.run.path), trainer.state
    assert [line["step"] for line in found] == [*range(0, 21, 2), 20]
    assert [line["val_tokens"] for line in found] == [320] * 11 + [trainer.validation.dataset.n_targets]
    assert found[0]["val_loss"] == before["val_loss"] == state.first_eval["val_loss"]
    assert state.last_point["val_tokens"] == 320 and state.whole_is_evaluated
    assert state.last_eval == trainer.validation.whole(trainer.model)
    best = min(found[1:-1], key=lambda line: line["val_loss"])
    assert state.best == {"step": best["step"], "val_loss": best["val_loss"]}


def test_a_resumed_run_reads_the_part_that_it_began_with(made, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("kindling.training.evaluations.PART_TOKENS", 32 * 10)
    cfg = tiny_config(corpus, max_steps=20, eval_every=4)
    first = trainer_in(tmp_path / "r", made, cfg)
    stop_during(first, 9)
    assert fit(first) == 143
    longer = replace(cfg, train=replace(cfg.train, max_steps=4000, eval_every=4))
    second = trainer_in(tmp_path / "r", made, longer, model_seed=9)
    folder = second.run.newest()
    second.resume(folder, load_state(folder))
    assert second.validation.part == second.state.validation_rows == 10
    assert second.state.first_eval == first.state.first_eval


def test_a_run_of_an_earlier_version_goes_on_with_the_whole_split():
    saved = {k: v for k, v in TrainingState(step=4).to_dict().items() if not k.startswith(("validation", "last_point"))}
    state = TrainingState.from_dict(saved)
    assert state.validation_rows is None and state.last_point == {} and state.whole_is_evaluated


# -- nothing of it changes the run ------------------------------------------------------------------------------------


def test_samples_and_evaluations_change_no_bit_of_a_run_with_dropout_resumed_or_not(made, corpus, tmp_path):
    silent = tiny_config(corpus, max_steps=12, eval_every=1000, save_every=1000)
    assert silent.model.dropout > 0
    lively = replace(
        silent, train=replace(silent.train, eval_every=2, sample_every=3, sample_prompts=("import os\n", ""))
    )
    plain = trainer_in(tmp_path / "a", made, silent)
    assert fit(plain) == 0
    shown = trainer_in(tmp_path / "b", made, lively)
    assert fit(shown) == 0
    assert shown.digest() == plain.digest()
    first = trainer_in(tmp_path / "c", made, lively)
    stop_during(first, 6)
    assert fit(first) == 143
    with open(first.run.path / "training_samples.jsonl", "a", encoding="utf-8") as f:
        f.write('{"step": 9, "prompt": "", "text": "of a run that was killed"}\n{"step": 12, "pro')
    second = trainer_in(tmp_path / "c", made, lively, model_seed=9)
    folder = second.run.newest()
    second.resume(folder, load_state(folder))
    assert fit(second) == 0
    assert second.digest() == plain.digest()
    samples = [read_metrics(t.run.path / "training_samples.jsonl") for t in (shown, second)]
    assert samples[0] == samples[1]
    assert [(line["step"], line["prompt"]) for line in samples[0]] == [
        (step, prompt) for step in (3, 6, 9, 12) for prompt in ("import os\n", "")
    ]
    assert all(isinstance(line["text"], str) and line["text"] for line in samples[0])
    assert not (plain.run.path / "training_samples.jsonl").exists()
    without_dropout = complete(shown.model.eval(), shown.run.tokenizer(), "import os\n", Sampling(64, seed=0)).text
    assert samples[0][-2]["text"] == without_dropout


def test_the_samples_differ_with_the_weights_and_are_printed_but_the_last(made, corpus, tmp_path, capsys):
    cfg = tiny_config(corpus, max_steps=6, sample_every=3, sample_prompts=("import os\n",))
    trainer = trainer_in(tmp_path / "r", made, cfg)
    trainer.model.train()
    fit(trainer)
    out = capsys.readouterr()
    (shown, *_) = read_metrics(trainer.run.path / "training_samples.jsonl")
    whole = f"--- step 3, from 'import os\\n'\n{('import os' + chr(10) + shown['text']).rstrip()}\n"
    assert whole in out.out + out.err and "--- step 6" not in out.out + out.err
    assert trainer.model.training


def test_a_prompt_that_no_sample_can_have_does_not_end_the_training(made, corpus, tmp_path, monkeypatch):
    from kindling.generation.sampling import GenerationError

    def refuse(*args):
        raise GenerationError("a prompt must be shorter")

    monkeypatch.setattr("kindling.training.samples.complete", refuse)
    trainer = trainer_in(tmp_path / "r", made, tiny_config(corpus, max_steps=2, sample_every=1, sample_prompts=("x",)))
    assert fit(trainer) == 0
    assert [x["text"] for x in read_metrics(trainer.run.path / "training_samples.jsonl")] == [
        "(a prompt must be shorter)"
    ] * 2


# -- a run by minutes -------------------------------------------------------------------------------------------------


class Timed(Validation):
    """A validation whose clock a test moves: seconds of a point, and of the whole split."""

    clock, point_s, whole_s = None, 1.0, 20.0

    def __call__(self, model):
        self.clock.pass_by(self.point_s)
        return {"val_loss": 2.0, "val_tokens": 32 * (self.part or 0)}

    def whole(self, model):
        self.clock.pass_by(self.whole_s)
        return {"val_loss": 1.0, "val_tokens": self.dataset.n_targets}

    def row_s(self, model):
        self.clock.pass_by(1.0)
        return 60.0 / 1000


def minute(path, made, corpus, monkeypatch, **seconds):
    cfg = tiny_config(corpus, max_minutes=1, eval_every=None, save_every=10**6, warmup_steps=1).with_steps(1)
    trainer = trainer_in(path, made, cfg, Timed)
    trainer.validation.clock = Clock(trainer, monkeypatch, step_s=2.0)
    for name, value in seconds.items():
        setattr(trainer.validation, name, value)
    return trainer


def test_a_minute_has_ten_points_by_the_clock_and_the_whole_split_at_the_end(
    made, corpus, tmp_path, monkeypatch, capsys
):
    trainer = minute(tmp_path / "r", made, corpus, monkeypatch, point_s=0.3, whole_s=5.0)
    monkeypatch.setattr(trainer.validation.dataset, "n_rows_in_order", lambda cfg: 100)
    assert fit(trainer) == 0
    assert trainer.state.validation_rows == 20 and trainer.state.elapsed_s == 60
    assert [line["step"] for line in points(trainer.run.path)] == [*range(0, 31, 3), 30]
    assert trainer.state.last_eval["val_loss"] == 1.0 and trainer.state.whole_is_evaluated
    assert trainer.state.evaluation_s == pytest.approx(1.0 + 11 * 0.3 + 5.0)
    *parts, last = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert "the whole split)" in last and not any("whole" in line for line in parts)
    assert summary_line(trainer, "0" * 16, 70.0, resumed=False).startswith(
        "60 s of training, 9 s of evaluation, 70 s since the start;"
    )
    assert length(trainer.cfg).startswith("1 minute in steps of ")
    assert "70 s since it was resumed" in summary_line(trainer, "0" * 16, 70.0, resumed=True)


@pytest.mark.parametrize("point_s", [0.5, 3.0, 8.0, 11.0])
def test_a_minute_on_a_slow_machine_ends_within_a_minute_and_a_half(
    made, corpus, tmp_path, monkeypatch, capsys, point_s
):
    trainer = minute(tmp_path / "r", made, corpus, monkeypatch, point_s=point_s, whole_s=1000.0)
    monkeypatch.setattr(trainer.validation.dataset, "n_rows_in_order", lambda cfg: 10**4)
    assert fit(trainer) == 0
    state, said = trainer.state, capsys.readouterr().err
    assert state.elapsed_s == 60 and state.elapsed_s + state.evaluation_s <= 90
    assert state.last_eval["val_loss"] == 2.0 and not state.whole_is_evaluated and state.last_eval_step == 30
    assert "so the last validation is of 20 of 10,000 rows" in said
    assert ("so some evaluations are left out" in said) == (point_s > 1)


def test_a_minute_that_was_stopped_goes_on_with_its_part_and_its_time(made, corpus, tmp_path, monkeypatch):
    first = minute(tmp_path / "r", made, corpus, monkeypatch, point_s=0.3)
    monkeypatch.setattr(first.validation.dataset, "n_rows_in_order", lambda cfg: 100)
    stop_during(first, 15)
    assert fit(first) == 143
    second = minute(tmp_path / "r", made, corpus, monkeypatch, point_s=0.3)
    monkeypatch.setattr(second.validation.dataset, "n_rows_in_order", lambda cfg: 100)
    folder = second.run.newest()
    second.resume(folder, load_state(folder))
    assert second.validation.part == 20 and second.state.evaluation_s == first.state.evaluation_s > 0
    assert fit(second) == 0
    assert [line["step"] for line in points(second.run.path)][:-1] == [*range(0, 31, 3)]


# -- metrics.csv ------------------------------------------------------------------------------------------------------


def rows_of(folder):
    with open(folder / "metrics.csv", encoding="utf-8", newline="") as f:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(f)]


def numbers(lines):
    return [{name: value for name, value in line.items() if value is not None} for line in lines]


def test_the_table_has_the_lines_of_the_log_after_each_write_whatever_columns_they_have(tmp_path):
    log = MetricsLog(tmp_path, 0)
    writes = [
        (0, {"val_loss": 9.5}),
        (1, {"loss": 5.0, "lr": 1e-5}),
        (2, {"loss": math.nan, "lr": 2e-5}),
        (2, {"new": 1.0}),
    ]
    for step, values in writes:
        log.write(step, **values)
        assert rows_of(tmp_path) == numbers(read_metrics(tmp_path / "metrics.jsonl"))
    assert (tmp_path / "metrics.csv").read_text(
        encoding="utf-8"
    ) == "step,val_loss,loss,lr,new\n0,9.5,,,\n1,,5.0,1e-05,\n2,,,2e-05,\n2,,,,1.0\n"
    log.rewind(1)
    assert rows_of(tmp_path) == numbers(read_metrics(tmp_path / "metrics.jsonl"))
    assert [row["step"] for row in rows_of(tmp_path)] == [0, 1]
    log.close()


def test_after_a_crash_the_table_is_that_of_the_lines_that_remain(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 5.0}\n{"step": 2, "loss": 4.0}\n{"step": 3, "lo', encoding="utf-8"
    )
    (tmp_path / "metrics.csv").write_text("step,loss\n1,5.0\n2,", encoding="utf-8")
    MetricsLog(tmp_path, 2).close()
    assert rows_of(tmp_path) == [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}]


def test_a_row_that_could_not_be_written_comes_with_the_next_one(tmp_path, monkeypatch):
    from kindling.runs import metrics

    log, append = MetricsLog(tmp_path, 0), metrics.append_line
    log.write(1, loss=5.0)

    def full(path, line):
        if path.suffix == ".csv":
            raise OSError(28, "No space left on device")
        append(path, line)

    monkeypatch.setattr(metrics, "append_line", full)
    log.write(2, loss=4.0)
    monkeypatch.setattr(metrics, "append_line", append)
    log.write(3, loss=3.0)
    log.close()
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3]


def test_a_run_leaves_the_same_in_both_files(made, corpus, tmp_path):
    trainer = trainer_in(tmp_path / "r", made, tiny_config(corpus, max_steps=4))
    fit(trainer)
    assert rows_of(trainer.run.path) == numbers(read_metrics(trainer.run.path / "metrics.jsonl"))


def test_samples_stand_as_text_in_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, 0)
    log.write_samples(5, [("def f", "():\n    *x*")])
    log.close()
    assert json.loads((tmp_path / "training_samples.jsonl").read_text(encoding="utf-8")) == {
        "step": 5,
        "prompt": "def f",
        "text": "():\n    *x*",
    }
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = events.Tensors("sample 1/text_summary")
    assert event.step == 5 and event.tensor_proto.string_val[0] == b"    def f():\n        *x*"

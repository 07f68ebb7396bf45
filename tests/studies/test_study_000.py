"""Study 000: one build for three sizes, rates in its own ratio, a run that spikes to its end, and sizes beside each other."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from test_study_report import make_run

from kindling.config_io import from_yaml, to_yaml
from kindling.evaluation.results_file import FORMAT
from kindling.files import sha256_text
from kindling.studies import study_000 as study
from kindling.studies.inputs import Inputs
from kindling.studies.run_results import Run, lead_text
from kindling.studies.speed import Clock, flops
from presets import preset

SCALE = 1 / 8


@pytest.fixture
def steps(tmp_path) -> dict:
    clock = Clock(tmp_path, measure=lambda cfg: (flops(cfg) / 1e9, 0.0), start=lambda: 1.0)
    return {step.name: step for step in study.plan(SCALE, clock, Inputs(tmp_path))}


def test_the_three_sizes_are_trained_on_one_build(steps, tmp_path):
    bases = study.bases(SCALE, Inputs(tmp_path))
    assert len({cfg.preset for cfg in bases.values()}) == len({cfg.data for cfg in bases.values()}) == 1
    assert len({(cfg.tokenizer, cfg.model.vocab_size) for cfg in bases.values()}) == 1
    assert len({cfg.model.n_parameters for cfg in bases.values()}) == 3
    assert [name for name, step in steps.items() if step.script == "data_pipeline.py"] == ["data"]


def test_a_fine_tuning_has_the_seeds_ratio_to_its_base_and_a_warmup_that_ends(tmp_path):
    bases = study.bases(SCALE, Inputs(tmp_path))
    for size, base in bases.items():
        cfg = study.fine_tuning(1, size, bases, Inputs(tmp_path))
        ratio = preset("alpaca").train.lr / preset(f"code-{size}").train.lr
        assert cfg.train.lr / base.train.lr == pytest.approx(ratio, rel=0.05)
        steps = study.tuning_tokens(bases["50m"], Inputs(tmp_path)) / (cfg.train.batch_size * base.model.block_size)
        assert 5 <= cfg.train.warmup_steps <= max(5, steps / 10)


def test_a_run_that_spikes_never_goes_back_and_has_one_at_the_usual_rate_beside_it(steps, tmp_path):
    base = study.bases(SCALE, Inputs(tmp_path))["50m"]
    assert study.spiking(base, study.USUAL).train.lr == base.train.lr < study.spiking(base, "no remedy").train.lr
    for remedy in study.SPIKE_RUNS:
        train = study.spiking(base, remedy).train
        assert train.max_skipped_steps >= train.max_steps  # so it needs no checkpoint to go back to
        assert (train.spike_ratio > 0) == (remedy in ("skipping", "all"))
    names = list(steps)
    assert names.index("spike-all") < names.index("base-50m")


def test_both_benchmarks_are_run_before_and_after_fine_tuning(steps):
    for size in study.SIZES:
        for kind in ("base", "sft-1", "sft-3"):
            arguments = steps[f"evaluate-{kind}-{size}"].arguments
            assert {"problems:5", "humaneval:1"} <= set(arguments)


def evaluated(folder: Path, name: str, better: float, curve: list[float]) -> Run:
    """A run with losses of eight documents and problems, and a validation of a part of the split every ten steps."""
    path = make_run(folder, name)
    (path / "data").mkdir()
    (path / "data" / "manifest.json").write_text('{"fingerprint": "f"}', encoding="utf-8")
    losses = [
        {"document": n, "language": "python", "bytes": 100, "tokens": 30, "nll": 90.0 + n - better} for n in range(8)
    ]
    text = "".join(json.dumps(line) + "\n" for line in losses)
    (path / "losses.jsonl").write_text(text, encoding="utf-8")
    gold = {"problems": {"losses": [[str(n), 50, 40.0 + n - better] for n in range(8)]}}
    figures = {"all": {"loss": 2.0, "perplexity": 7.389, "bits_per_byte": 1.234}}
    results = {"format": FORMAT, "data": "d", "language_modelling": figures, "gold": gold}
    results["losses_sha256"] = sha256_text(text)
    (path / "eval.json").write_text(json.dumps(results), encoding="utf-8")
    lines = [
        {"step": 10 * n, "val_bits_per_byte": bits, "val_loss": bits, "val_tokens": 50} for n, bits in enumerate(curve)
    ]
    lines += [
        {"step": 10 * (len(curve) - 1), "val_bits_per_byte": 9.0, "val_loss": 9.0, "val_tokens": 999}
    ]  # of all of it
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return Run(folder, name)


def test_each_size_is_beside_the_one_before_it_on_the_same_texts(tmp_path):
    evaluated(tmp_path, "base-50m", 0.0, [5.0, 4.0, 3.0])
    evaluated(tmp_path, "base-150m", 7.0, [5.0, 4.1, 2.9, 2.0])
    table = next(section for section in study.sections(tmp_path) if "beside" in section.heading)
    rows = {tuple(row[:2]): row[2:] for row in table.rows}
    bits, gold, lead, file = rows["base-150m", "base-50m"]
    assert bits.startswith("-0.101 [") and bits.endswith("*")  # 7 nats less of 100 bytes
    assert gold.startswith("-0.202 [") and file == "runs/base-150m/losses.jsonl"
    assert lead == f"{20 * tokens_of_a_step(tmp_path) / 1e3:.3g}k"
    assert set(rows["sft-1-225m", "sft-1-150m"][:3]) == {"-"}


def tokens_of_a_step(folder: Path) -> int:
    cfg = Run(folder, "base-50m").config()
    return cfg.train.batch_size * cfg.model.block_size


@pytest.mark.parametrize(
    ("larger", "said"), [([5.0, 3.9, 2.9], "10"), ([5.0, 3.9, 3.0], "not"), ([5.0], "-"), ([5.0, 4.2, 2.5, 1.0], "20")]
)
def test_the_tokens_are_named_from_which_on_a_larger_size_is_better(tmp_path, larger, said):
    before, run = (evaluated(tmp_path, name, 0, curve) for name, curve in (("a", [5.0, 4.0, 3.0]), ("b", larger)))
    if said.isdigit():
        cfg = before.config()
        said = f"{int(said) * cfg.train.batch_size * cfg.model.block_size / 1e3:.3g}k"
    assert lead_text(before, run).startswith(said)


def test_losses_on_different_parts_of_a_split_and_those_that_are_no_number_lead_nowhere(tmp_path):
    before = evaluated(tmp_path, "a", 0, [5.0, 4.0, 3.0])
    assert lead_text(before, evaluated(tmp_path, "b", 0, [5.0, math.nan, math.nan])).startswith("not within")
    other = evaluated(tmp_path, "c", 0, [5.0, 3.9, 2.9])
    metrics = other.path / "metrics.jsonl"
    metrics.write_text(metrics.read_text("utf-8").replace('"val_tokens": 50', '"val_tokens": 70'), encoding="utf-8")
    assert lead_text(before, Run(tmp_path, "c")) == "-"


def test_a_larger_size_with_fewer_tokens_a_step_is_compared_at_as_many_tokens(tmp_path):
    before, run = (evaluated(tmp_path, name, 0, curve) for name, curve in (("a", [5.0, 4.0, 3.0]), ("b", [5.0, 4.45])))
    cfg = from_yaml((run.path / "config.yaml").read_text("utf-8"), "config")
    half = replace(cfg, train=replace(cfg.train, batch_size=cfg.train.batch_size // 2, micro_batch_size=None))
    (run.path / "config.yaml").write_text(to_yaml(half), encoding="utf-8")
    assert lead_text(before, run) == f"{5 * cfg.train.batch_size * cfg.model.block_size / 1e3:.3g}k"

"""The mean of a run's last checkpoints, evaluated and exported."""

import json

import pytest
import torch
from conftest import make_run
from safetensors.torch import load_file

import evaluate
import export
from kindling.errors import CheckpointError
from kindling.runs.averaging import average_name, average_sha256, checkpoints_to_average, load_average
from kindling.runs.checkpoint import RunDirectory, load_state, weights_sha256
from kindling.runs.loading import load_model

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path, corpus) -> RunDirectory:
    """A run with checkpoints at steps 4, 6 and 8, of other weights each."""
    made = make_run(tmp_path / "runs" / "tiny", corpus)
    model, folder = load_model(made, CPU)
    state = load_state(folder)
    for step in (6, 8):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01 * torch.randn_like(p))
        made.save(step, model, {**state, "step": step})
    return made


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_weights_are_the_mean_of_those_of_the_last_checkpoints(run, n):
    folders = checkpoints_to_average(run, n)
    assert [folder.name for folder in folders] == ["step_000004", "step_000006", "step_000008"][3 - n :]
    each = [load_file(folder / "model.safetensors") for folder in folders]
    model = load_average(run, folders, CPU)
    assert not model.training
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), torch.stack([w[name] for w in each]).double().mean(0).float())
    assert (average_sha256(run, folders) == weights_sha256(run.checkpoints()[-1])) == (n == 1)
    assert average_name(folders) == (
        "step_000008" if n == 1 else f"mean of {n} checkpoints, {folders[0].name} to step_000008"
    )


@pytest.mark.parametrize("n", [0, 4, -1])
def test_more_checkpoints_than_there_are_is_one_line_that_says_how_to_keep_more(run, n):
    with pytest.raises(CheckpointError, match=r"from 1 to the 3 checkpoints .*--train\.keep-checkpoints"):
        checkpoints_to_average(run, n)


def test_a_damaged_checkpoint_is_no_part_of_a_mean(run):
    weights = run.checkpoints()[1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert len(checkpoints_to_average(run, 1)) == 1
    with pytest.raises(CheckpointError, match="step_000006"):
        checkpoints_to_average(run, 3)


def test_a_mean_is_evaluated_and_exported_and_each_says_so(run, capsys):
    quick = ["--eval.benchmarks", "none", "--eval.signatures", "0"]
    assert evaluate.main([str(run.path), "--average", "3", *quick]) == 0
    results = json.loads((run.path / "eval.json").read_text(encoding="utf-8"))
    assert results["checkpoint"] == "mean of 3 checkpoints, step_000004 to step_000008"
    assert results["checkpoint"] in capsys.readouterr().out
    for average, others in ((3, False), (1, True)):
        assert export.main([str(run.path), "--to", "hf", "--average", str(average), "--replace"]) == 0
        card = (run.path / "export/hf/README.md").read_text(encoding="utf-8")
        assert ("of other weights than those here" in card) is others
        assert ("the mean of its weights at 3 checkpoints, from step 4 to step 8" in card) is not others
    mean = load_file(run.path / "export/hf/model.safetensors")
    assert export.main([str(run.path), "--to", "hf", "--average", "2", "--replace"]) == 0
    other = load_file(run.path / "export/hf/model.safetensors")
    assert any((mean[name] != other[name]).any() for name in mean)

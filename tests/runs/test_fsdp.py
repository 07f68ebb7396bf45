"""fsdp.py: two processes against one, their checkpoints at any world size, and what must be refused.

Two processes run once for all tests (sharded_worker.py), after this process has done the same work alone.
"""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import ROOT, on_ranks
from sharded_worker import ARCHITECTURES, SAVED_AT, STEPS, WORLD, Run

from kindling.runs import fsdp
from kindling.runs.fsdp import CheckpointError, full_weights
from model import build_model

NAMES = list(ARCHITECTURES)


class Outcome(NamedTuple):
    """The results of the two processes, by rank, and of this one."""

    folder: Path
    two: list[dict[str, Any]]
    one: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> Outcome:
    folder = tmp_path_factory.mktemp("sharded")
    one = {}
    for name in NAMES:
        run = Run(name)
        one[name] = {"losses": run.train(SAVED_AT), "validation_loss": run.validate(), "norm": run.norm}
        run.save(folder / f"{name}-by-1")
        one[name]["saved_digest"] = run.digest()
        one[name]["losses"] += run.train(STEPS - SAVED_AT)
        one[name]["digest"] = run.digest()
    result = on_ranks(ROOT / "tests" / "sharded_worker.py", folder, cwd=folder, n=WORLD)
    assert result.returncode == 0, result.stdout + result.stderr
    two = [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(WORLD)]
    return Outcome(folder, two, one)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_have_the_losses_and_the_gradient_norm_of_one(outcome, name):
    for result in outcome.two:
        assert result[name]["losses"] == pytest.approx(outcome.one[name]["losses"], abs=1e-5)
        assert result[name]["norm"] == pytest.approx(outcome.one[name]["norm"], rel=1e-4)
        assert result[name]["validation_loss"] == pytest.approx(outcome.one[name]["validation_loss"], rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_each_process_holds_about_half_of_the_weights(outcome, name):
    shares = [result[name]["local_share"] for result in outcome.two]
    assert sum(shares) == pytest.approx(1) and all(0.45 < share < 0.55 for share in shares)
    assert all(result[name]["is_sharded"] for result in outcome.two)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_resumed_by_as_many_processes_ends_in_the_same_bits(outcome, name):
    for result in (result[name] for result in outcome.two):
        assert result["loaded_digest_of_2"] == result["saved_digest"] != result["digest"]
        assert result["resumed_losses_of_2"] == result["losses"][SAVED_AT:]
        assert result["resumed_digest_of_2"] == result["digest"] == outcome.two[0][name]["digest"]


@pytest.mark.parametrize("name", NAMES)
def test_one_process_loads_the_bits_that_two_have_saved_and_continues_to_rounding(outcome, name):
    run = Run(name)
    run.load(outcome.folder / f"{name}-by-2")
    gathered = torch.load(outcome.folder / f"{name}-gathered.pt", weights_only=True)
    assert {n: torch.equal(p, gathered[n]) for n, p in run.model.named_parameters()} == dict.fromkeys(gathered, True)
    assert run.digest() == outcome.two[0][name]["saved_digest"]
    assert run.train(STEPS - SAVED_AT) == pytest.approx(outcome.one[name]["losses"][SAVED_AT:], abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_load_the_bits_that_one_has_saved_and_continue_to_rounding(outcome, name):
    for result in (result[name] for result in outcome.two):
        assert result["loaded_digest_of_1"] == outcome.one[name]["saved_digest"]
        assert result["resumed_losses_of_1"] == pytest.approx(outcome.one[name]["losses"][SAVED_AT:], abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_weights_come_whole_out_of_the_parts(outcome, name):
    gathered = torch.load(outcome.folder / f"{name}-gathered.pt", weights_only=True)
    weights = full_weights(outcome.folder / f"{name}-by-2")
    assert {n: torch.equal(w, gathered[n]) for n, w in weights.items()} == dict.fromkeys(gathered, True)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_have_the_weights_of_one_to_rounding(outcome, name):
    two, one = (full_weights(outcome.folder / f"{name}-by-{number}") for number in (2, 1))
    torch.manual_seed(0)
    start = dict(build_model(ARCHITECTURES[name][0]).named_parameters())
    for n, weight in one.items():
        moved, apart = (weight - start[n]).norm(), (weight - two[n]).norm()
        assert apart < 1e-3 * moved, n


def test_a_state_loaded_after_validation_is_the_one_that_trains_on(outcome):
    for result in outcome.two:
        assert result["roll_back"]["losses"] == result["gpt2"]["losses"][SAVED_AT:]


@pytest.mark.parametrize(
    ("name", "within"), [("gpt2", 3e-2), ("llama", 2e-3)]
)  # sharding rounds biases to bfloat16, autocast does not
def test_bfloat16_keeps_float32_weights_and_has_about_the_losses_of_autocast_in_one_process(outcome, name, within):
    run = Run(name)
    with torch.autocast("cpu", torch.bfloat16):
        losses = run.train(STEPS)
    for result in (result["bf16"][name] for result in outcome.two):
        assert result["losses"] == pytest.approx(losses, abs=within)
        assert result["dtypes"] == ["torch.float32"]


def test_sharded_optimisers_told_of_a_bad_step_change_neither_weights_nor_state(outcome):
    for result in outcome.two:
        assert result["bad_step"] == {"skipped_is_unchanged": True, "done_is_unchanged": False}


def test_trouble_of_one_process_is_one_line_in_all(outcome):
    for result in (result["refusals"] for result in outcome.two):
        assert "must be writable" in result["save"] and "must be a whole checkpoint" in result["load"]
        assert "\n" not in result["save"] + result["load"]


# -- what must be refused ---------------------------------------------------------------------------------------------


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def copied(outcome, tmp_path) -> Path:
    return shutil.copytree(outcome.folder / "gpt2-by-2", tmp_path / "parts")


def loaded(folder: Path) -> None:
    Run("gpt2").load(folder)


def test_no_pickle_is_executed_in_place_of_any_file_nor_beside_them(copied, tmp_path):
    mark = tmp_path / "executed"
    evil = pickle.dumps(Evil(mark))
    names = [path.name for path in sorted(copied.iterdir())]
    assert {Path(name).suffix for name in names} == {".safetensors", ".json"} and len(names) == 5
    (copied / ".metadata").write_bytes(evil)  # torch's own reader unpickles this file
    loaded(copied)
    for name in names:
        good = (copied / name).read_bytes()
        (copied / name).write_bytes(evil)
        with pytest.raises(CheckpointError):
            loaded(copied)
        (copied / name).write_bytes(good)
    loaded(copied)
    assert not mark.exists()
    pickle.loads(evil)
    assert mark.exists()  # so a pickle that runs would have been noticed


def test_a_missing_part_is_refused_whichever_it_is(copied):
    for part in sorted(copied.iterdir()):
        content = part.read_bytes()
        part.unlink()
        with pytest.raises(CheckpointError, match="must be a whole checkpoint"):
            loaded(copied)
        part.write_bytes(content)


def test_a_part_of_another_number_of_processes_is_refused(copied, outcome):
    (other,) = (outcome.folder / "gpt2-by-1").glob("*model-00001*")
    shutil.copyfile(other, copied / "other.safetensors")
    with pytest.raises(CheckpointError, match="another checkpoint's"):
        full_weights(copied)


def test_another_model_is_refused_with_the_name_of_what_differs(outcome):
    cfg = ARCHITECTURES["gpt2"][0]
    for other, name in ((replace(cfg, n_layer=3), "blocks.2"), (replace(cfg, vocab_size=300), "wte.weight")):
        with pytest.raises(CheckpointError, match=name):
            fsdp.load_sharded(outcome.folder / "gpt2-by-2", build_model(other))


def test_other_optimisers_are_refused(outcome):
    modern, folder = Run("modern"), outcome.folder / "modern-by-2"
    with pytest.raises(CheckpointError, match="2 optimisers and not 1"):
        fsdp.load_sharded(folder, modern.model, modern.optimizers[:1])
    with pytest.raises(CheckpointError, match="other parameters or settings"):
        fsdp.load_sharded(folder, modern.model, modern.optimizers[::-1])


def test_weights_alone_need_no_optimisers(outcome):
    run = Run("llama")
    fsdp.load_sharded(outcome.folder / "llama-by-2", run.model)
    assert not run.optimizers[0].state

import json
import re

import pytest
import ranks
import torch
from conftest import ROOT, on_ranks, script, tiny_flags, torchrun

from kindling.distributed import World
from kindling.errors import ConfigError
from kindling.runs.checkpoint import RunDirectory
from kindling.training import trainer
from kindling.training.start_or_resume import start_or_resume
from kindling.training.validation import batches_of_rank


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> list[dict]:
    """The results of two ranks, in their order."""
    folder = tmp_path_factory.mktemp("ranks")
    result = on_ranks(ROOT / "tests" / "ranks.py", folder, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads((folder / "seen.json").read_text(encoding="utf-8"))


def test_ranks_agree_on_sums_and_on_what_the_main_one_does(seen):
    for rank, saw in enumerate(seen):
        assert saw["rank"] == rank
        assert saw["sum"] == [3.0, 20.0]
        assert saw["max"] == [1.0]
        assert saw["gathered"] == ["rank 0", "rank 1"]
        assert saw["from main"] == "by 0"


@pytest.mark.parametrize("how", ["", "fsdp "])
def test_two_ranks_have_the_loss_curve_of_one(seen, tmp_path, how):
    torch.set_num_threads(1)
    alone = ranks.curve(tmp_path)
    assert len(alone) == len(seen[0][f"{how}curve"]) == ranks.STEPS
    assert max(abs(a - b) for a, b in zip(alone, seen[0][f"{how}curve"])) < 1e-5


def test_ranks_share_out_the_validation_split(seen):
    loss, n = ranks.validation()
    assert seen[0]["validation"] == seen[1]["validation"]
    assert seen[0]["validation"] == [pytest.approx(loss, rel=1e-6), n]


@pytest.mark.parametrize("how", ["", "fsdp "])
def test_two_ranks_resume_bit_for_bit_with_dropout(seen, how):
    for saw in seen:
        assert saw[f"{how}resumed"][0] == saw[f"{how}resumed"][1] == seen[0][f"{how}resumed"][0]


@pytest.mark.parametrize("how", ["", "fsdp "])
def test_a_nan_on_one_rank_is_one_skipped_step_on_all(seen, how):
    for saw in seen:
        assert saw[f"{how}poisoned"] == seen[0][f"{how}poisoned"]
        assert saw[f"{how}poisoned"]["skipped"] == 1
        assert saw[f"{how}poisoned"]["unchanged"] == [False, False, True, False, False]


def test_ranks_whose_clocks_differ_have_the_same_learning_rates(seen):
    assert seen[0]["by the clock"] == seen[1]["by the clock"]


@pytest.mark.parametrize("how", ["", "fsdp "])
def test_a_full_disk_of_the_main_rank_is_a_warning_on_all_and_the_next_save_succeeds(seen, how):
    assert [saw[f"{how}unsaved"] for saw in seen] == [[False, True], [False, True]]


@pytest.mark.parametrize("how", ["", "fsdp "])
def test_ranks_go_back_together(seen, how):
    assert seen[0][f"{how}gone back"] == seen[1][f"{how}gone back"]
    assert seen[0][f"{how}gone back"] | {"digest": ""} == {
        "step": 12,
        "avoided": [[48, 72]],
        "rollbacks": 1,
        "digest": "",
    }


def test_a_signal_to_one_rank_stops_all_at_the_same_step(seen):
    for saw in seen:
        assert saw["signalled"] == {"code": 143, "step": 4, "saved": ["step_000004"]}


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_every_batch_counts_on_one_rank_and_each_rank_has_as_many(size):
    batches = list(range(7))
    shares = [list(batches_of_rank(batches, World(rank, size))) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(batch for share in shares for batch, counts in share if counts) == batches


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """The folder, the output and the flags of a run on two ranks."""
    folder = tmp_path_factory.mktemp("two")
    flags = [*tiny_flags(corpus), "--model.dropout", "0.1"]
    result = on_ranks(ROOT / "main.py", *flags, "--name", "whole", cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result.stdout, flags


def test_two_ranks_train_main_py_and_one_reports(undisturbed):
    _, out, _ = undisturbed
    assert "on 2 ranks" in out
    assert out.count("state sha256") == out.count("validation over the whole") == 1


@pytest.mark.slow
def test_torchrun_trains_main_py_to_the_same_bits(undisturbed):
    folder, expected, flags = undisturbed
    process = torchrun(ROOT / "main.py", *flags, "--name", "launched", cwd=folder)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    assert "on 2 ranks" in out
    assert re.findall(r"state sha256 \w+", out) == re.findall(r"state sha256 \w+", expected) != []


def test_ranks_share_out_an_evaluation(undisturbed):
    folder, _, _ = undisturbed
    flags = ["runs/whole", "--eval.benchmarks", "none", "--eval.signatures", "4", "--eval.max-new-tokens", "8"]

    def results() -> tuple[dict, list]:
        losses = json.loads((folder / "runs/whole/eval.json").read_text(encoding="utf-8"))["language_modelling"]["all"]
        lines = (folder / "runs/whole/samples.jsonl").read_text(encoding="utf-8").splitlines()
        return losses, [json.loads(line)["text"] for line in lines]

    assert script("evaluate.py", *flags, cwd=folder).returncode == 0
    losses, samples = results()
    result = on_ranks(ROOT / "evaluate.py", *flags, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    shared, same = results()
    assert shared == {name: pytest.approx(value, rel=1e-6) for name, value in losses.items()}
    assert same == samples and len(samples) == 4


def test_another_number_of_ranks_goes_on_and_says_that_bits_may_differ(undisturbed):
    folder, _, flags = undisturbed
    result = script("main.py", *flags, "--name", "whole", "--train.max-steps", "13", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "resuming at step 12" in result.stdout
    assert "world_size was 2 and is 1: the run goes on, but not bit for bit" in result.stderr


def test_a_batch_that_ranks_cannot_share_out_is_refused_in_a_line(tmp_path):
    with pytest.raises(ConfigError, match="must be a multiple of the 3 ranks, but is 8"):
        start_or_resume(ranks.config(), RunDirectory(tmp_path / "r"), False, dataset=None, rows=None, world=World(0, 3))
    assert not (tmp_path / "r").exists()


def test_micro_batches_follow_from_the_number_of_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "wrap_ddp", lambda model, device: model)
    cfg = ranks.config(batch_size=24, micro_batch_size=8)
    shapes = [
        (t.rows_per_rank, t.micro_batch) for t in (ranks.trainer_of(cfg, tmp_path, World(0, n)) for n in (1, 2, 4, 8))
    ]
    assert shapes == [(24, 8), (12, 6), (6, 6), (3, 3)]

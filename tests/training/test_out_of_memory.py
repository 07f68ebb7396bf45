from dataclasses import replace

import pytest
import torch
from conftest import tiny_config
from test_trainer import make_trainer

from kindling import device
from kindling.training import trainer as trainer_module
from kindling.training.loop import fit
from kindling.training.out_of_memory import OutOfMemoryError, out_of_memory
from kindling.training.validation import summed_loss


def with_room_for(n_rows, monkeypatch):
    """Let a pass over more rows than `n_rows` fail as on a GPU that is full."""
    tried = []

    def full(model, batch, runtime):
        tried.append(len(batch.idx))
        if len(batch.idx) > n_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return summed_loss(model, batch, runtime)

    monkeypatch.setattr(trainer_module, "summed_loss", full)
    return tried


@pytest.mark.parametrize(("room", "named"), [(11, 6), (5, 4), (1, 1)])
def test_the_largest_micro_batch_that_fits_is_named(corpus, tmp_path, monkeypatch, room, named):
    trainer = make_trainer(tmp_path, tiny_config(corpus, batch_size=12))
    tried = with_room_for(room, monkeypatch)
    with pytest.raises(
        OutOfMemoryError, match=rf"--train.micro-batch-size {named} or --train.activation-checkpointing"
    ) as e:
        fit(trainer)
    assert "\n" not in str(e.value) and f"while {named} do" in str(e.value)
    assert set(tried) <= {12, 6, 4, 3, 2, 1}, "only divisors of the batch are tried"


def test_where_no_row_fits_other_settings_are_named(corpus, tmp_path, monkeypatch):
    cfg = tiny_config(corpus, activation_checkpointing=True)
    with_room_for(0, monkeypatch)
    with pytest.raises(OutOfMemoryError) as e:
        fit(make_trainer(tmp_path, cfg))
    assert "nor does one row; set a lower --model.block-size" in str(e.value)
    with pytest.raises(OutOfMemoryError) as e:
        fit(
            make_trainer(tmp_path, replace(cfg, train=replace(cfg.train, batch_size=1, activation_checkpointing=False)))
        )
    assert "one of 1 rows of 32 tokens does not; set --train.activation-checkpointing True or a lower" in str(e.value)


def test_of_a_run_with_checkpoints_it_says_that_they_are_kept(corpus, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, tiny_config(corpus))
    assert fit(trainer) == 0
    kept = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    trainer.train = replace(trainer.train, max_steps=20)
    with_room_for(2, monkeypatch)
    with pytest.raises(OutOfMemoryError, match="what was saved is kept, and the same command goes on from it"):
        fit(trainer)
    assert {path: path.read_bytes() for path in kept} == kept


def test_compiling_that_runs_out_of_memory_is_no_broken_compiler(corpus, tmp_path, monkeypatch, capsys):
    trainer = make_trainer(tmp_path, tiny_config(corpus, compile="on"))
    monkeypatch.setattr(trainer.model, "enable_compile", lambda *_: None)
    with_room_for(2, monkeypatch)
    with pytest.raises(OutOfMemoryError, match=r"--train.micro-batch-size 2 "):
        fit(trainer)
    assert "torch.compile failed" not in capsys.readouterr().err


def test_on_several_ranks_nothing_is_tried(corpus, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, tiny_config(corpus))
    tried = with_room_for(0, monkeypatch)
    trainer.world = replace(trainer.world, size=2)
    assert "set --train.micro-batch-size 2 or --train.activation-checkpointing True or --train.parallel fsdp" in str(
        out_of_memory(trainer)
    )
    assert not tried


def test_where_other_programs_hold_the_memory_they_are_the_first_advice(corpus, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, tiny_config(corpus))
    with_room_for(0, monkeypatch)
    monkeypatch.setattr(device, "memory_of_others", lambda where: int(78.2e9))
    assert "; end the other programs, or set --train.activation-checkpointing True or" in str(out_of_memory(trainer))


def test_other_errors_pass_as_they_are(corpus, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, tiny_config(corpus))

    def broken(*given):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(trainer_module, "summed_loss", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        fit(trainer)
    assert not device.is_out_of_memory(ValueError("out of memory"))
    assert device.is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"))
    assert device.is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))

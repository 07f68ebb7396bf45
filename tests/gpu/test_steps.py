"""Steps of training on a GPU: as on the CPU, without waiting for the device, through overflows, and out of memory."""

import gc
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from card import LIMITS, PRECISIONS, copies, distance, model_of, runtime_of, shape_of
from conftest import tiny_config
from given_figures import GivenFigures

from kindling import device
from kindling.distributed import World, wrap_ddp
from kindling.runs.checkpoint import RunDirectory
from kindling.runs.fsdp import full_tensor, shard
from kindling.training import trainer as trainer_module
from kindling.training.dry_run import RandomRows
from kindling.training.loop import fit
from kindling.training.optim import make_optimizers
from kindling.training.out_of_memory import OutOfMemoryError
from kindling.training.trainer import Trainer
from kindling.training.validation import summed_loss

pytestmark = pytest.mark.gpu


def trainer_of(path, corpus, gpu, name="demo", shape=None, **train) -> Trainer:
    """A trainer of a preset's shape on random tokens."""
    cfg = tiny_config(corpus, **{"device": gpu, "batch_size": 8, "optimizer": "muon", **train})
    cfg = replace(cfg, model=shape or shape_of(name, gpu))
    runtime = device.resolve(cfg.train)
    device.seed_all(0)
    model = model_of(cfg.model).to(runtime.device)
    path.mkdir(parents=True, exist_ok=True)
    return Trainer(cfg, RunDirectory(path), model, RandomRows(cfg.model), GivenFigures(), runtime)


@pytest.mark.parametrize("name", ["demo", "code-50m", "smallcoder-1"])
def test_steps_on_the_gpu_are_steps_on_the_cpu(gpu, corpus, tmp_path, name):
    found = []
    for kind in ("cpu", gpu):
        shape = shape_of(name, gpu)
        trainer = trainer_of(tmp_path / kind, corpus, kind, shape=shape, precision="fp32", lr=1e-3)
        losses = [trainer.train_step()[0] for _ in range(3)]
        weights = torch.cat([p.detach().flatten().cpu().double() for p in trainer.model.parameters()])
        found.append((losses, weights))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    assert distance(found[1][1], found[0][1]) < 1e-3  # AdamW's first steps amplify the rounding of small gradients


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["demo", "code-50m"])
def test_a_step_does_not_wait_for_the_device(gpu, corpus, tmp_path, name, precision):
    trainer = trainer_of(tmp_path, corpus, gpu, name, precision=precision, micro_batch_size=4)
    for _ in range(2):  # memory is allocated, and the loss scaler has its tensors
        trainer.train_step()
    if gpu == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        step = trainer.launch_step()
    finally:
        if gpu == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert trainer.finish_step(step)[2]


def test_fp16_lowers_its_scale_after_an_overflow_and_goes_on(gpu, corpus, tmp_path):
    trainer = trainer_of(tmp_path, corpus, gpu, precision="fp16", batch_size=2)
    trainer.scaler = torch.amp.GradScaler(gpu, init_scale=2.0**40)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train_step()
    assert trainer.state.skipped == 1 and trainer.scaler.get_scale() == 2.0**39
    assert all(torch.equal(p, b) for p, b in zip(trainer.model.parameters(), before))
    trainer.scaler = torch.amp.GradScaler(gpu, init_scale=2.0**8)
    trainer.train_step()
    assert trainer.state.skipped == 1
    assert not torch.equal(trainer.model.head.weight, before[-1])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_bad_step_changes_nothing(gpu, corpus, tmp_path, precision, monkeypatch):
    trainer = trainer_of(tmp_path, corpus, gpu, precision=precision, batch_size=2)
    trainer.train_step()
    before = [p.detach().clone() for p in trainer.model.parameters()]

    def poisoned(*given):
        loss, count = summed_loss(*given)
        return loss * float("nan"), count

    monkeypatch.setattr(trainer_module, "summed_loss", poisoned)
    trainer.train_step()
    assert trainer.state.skipped == 1
    assert all(torch.equal(p, b) for p, b in zip(trainer.model.parameters(), before))
    monkeypatch.undo()
    trainer.scaler = torch.amp.GradScaler(gpu, init_scale=2.0**8, enabled=precision == "fp16")
    trainer.train_step()
    assert trainer.state.skipped == 1


@pytest.fixture
def room_for_four_rows(gpu, monkeypatch):
    """A device on which a micro-batch of 8 rows does not fit, and one of 4 does."""
    gc.collect()  # what other tests left would count
    if gpu != "cuda":

        def full(model, batch, runtime):
            if len(batch.idx) > 4:
                raise torch.OutOfMemoryError("out of memory")
            return summed_loss(model, batch, runtime)

        monkeypatch.setattr(trainer_module, "summed_loss", full)
        yield lambda trainer: None
        return
    total = torch.cuda.get_device_properties(0).total_memory

    def limit(trainer: Trainer) -> None:
        held, used = {}, {}
        for rows in (4, 8):
            trainer.micro_batch = rows
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            trainer.train_step()
            held[rows], used[rows] = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
        trainer.model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        assert held[4] < used[8], (held, used)  # what the allocator holds for 4 rows, and what tensors of 8 rows need
        torch.cuda.set_per_process_memory_fraction((held[4] + used[8]) / 2 / total)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_out_of_memory_is_one_line_that_names_the_micro_batch_that_fits(gpu, corpus, tmp_path, room_for_four_rows):
    shape = shape_of("code-50m", gpu)
    if gpu == "cuda":  # large activations beside small weights
        shape = replace(shape, block_size=1024, vocab_size=512, n_layer=8)
    trainer = trainer_of(tmp_path, corpus, gpu, shape=shape, max_steps=10, optimizer="adamw")
    room_for_four_rows(trainer)
    trainer.micro_batch = 8
    with pytest.raises(OutOfMemoryError) as caught:
        fit(trainer)
    said = str(caught.value)
    assert "\n" not in said and "--train.micro-batch-size 4 or --train.activation-checkpointing True" in said, said
    del caught
    trainer.micro_batch, done = (
        4,
        trainer.state.step,
    )  # what it names does fit, and so does evaluating with as many rows
    assert fit(trainer) == 0 and trainer.state.step > done + 2
    trainer.model.eval()
    with torch.no_grad():
        summed_loss(trainer.model, trainer.batches.rows(0, 4), trainer.runtime)


@pytest.fixture
def one_rank(gpu):
    """A process group of one rank, over NCCL on a GPU."""
    backend = "cpu:gloo,cuda:nccl" if gpu == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1)
    dist.destroy_process_group()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_one_rank_of_several_gives_the_gradients_and_steps_of_a_process_alone(gpu, corpus, one_rank, how, precision):
    runtime = runtime_of(gpu, precision)
    cfg = shape_of("demo", gpu)
    train = tiny_config(corpus, optimizer="muon").train
    batch = RandomRows(cfg).rows(0, 4)
    gradients, weights = [], []
    for model, parallel in zip(copies(model_of(cfg).to(runtime.device), runtime), (None, how)):
        wrapped = model
        if parallel == "fsdp":
            shard(model, 1, torch.bfloat16 if precision == "bf16" else None)
        elif parallel == "ddp":
            wrapped = wrap_ddp(model, runtime.device)
        loss, count = summed_loss(wrapped, batch, runtime)
        (loss / count).backward()
        gradients.append(torch.cat([full_tensor(p.grad).flatten().cpu().double() for p in model.parameters()]))
        for optimizer in make_optimizers(model, train, runtime.matmul_dtype):
            optimizer.step()
        weights.append(torch.cat([full_tensor(p.detach()).flatten().cpu().double() for p in model.parameters()]))
    assert distance(gradients[1], gradients[0]) < LIMITS[precision][2]
    assert distance(weights[1], weights[0]) < (1e-3 if precision == "fp32" else 5e-2)

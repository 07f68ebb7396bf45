import itertools
import json
import math
import os
import signal
import threading
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import tiny_config
from given_figures import GivenFigures
from torch._dynamo.utils import counters

from config import IGNORE
from kindling import device
from kindling.data.shards import SPLITS, Batch, PackedBlocks, ShardWriter, TokenDataset, write_manifest
from kindling.runs.checkpoint import RunDirectory, load_state
from kindling.runs.metrics import read_metrics
from kindling.training import trainer as trainer_module
from kindling.training.compilation import wants_compile
from kindling.training.loop import fit
from kindling.training.prefetch import Prefetch
from kindling.training.rollback import TrainingError
from kindling.training.schedule import learning_rate_scale
from kindling.training.trainer import Trainer
from kindling.training.validation import mean_loss, validate
from model import build_model

EOS = 5  # end of text; only the document mask uses it


class Numbers:
    """Pseudo-random tokens, with the interface of a TokenDataset."""

    split = "train"

    def __init__(self, n=4001, vocab_size=512):
        self.manifest = {"eos_id": EOS}
        self.tokens = np.random.default_rng(0).integers(0, vocab_size, n)

    def __len__(self):
        return len(self.tokens)

    def read(self, start, count):
        return self.tokens[start : start + count]


def make_trainer(path, cfg, batches=None, model_seed=0):
    device.seed_all(model_seed)
    model = build_model(cfg.model)
    runtime = device.resolve(cfg.train)
    path.mkdir(parents=True, exist_ok=True)
    batches = batches or PackedBlocks(Numbers(), cfg.model.block_size, cfg.train.seed)
    return Trainer(cfg, RunDirectory(path), model, batches, GivenFigures(), runtime)


# -- the step ---------------------------------------------------------------------------------------------------------


class Uneven:
    """Rows with different numbers of supervised tokens. One micro-batch has none."""

    def rows(self, first, count):
        idx = np.random.default_rng(first).integers(0, 512, (count, 33))
        targets = idx[:, 1:].copy()
        for row, keep in enumerate([32, 2, 0, 0, 17, 1, 5, 32][:count]):
            targets[row, keep:] = IGNORE
        return Batch(idx[:, :-1], targets)


def test_accumulation_gives_the_gradient_of_the_whole_step(corpus, tmp_path):
    gradients = []
    for micro in (8, 4, 2, 1):
        cfg = tiny_config(corpus, batch_size=8, micro_batch_size=micro)
        cfg = replace(cfg, model=replace(cfg.model, dropout=0.0))
        trainer = make_trainer(tmp_path / "r", cfg, Uneven())
        loss, n = trainer.forward_backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
        idx, targets = (torch.from_numpy(a) for a in Uneven().rows(0, 8)[:2])
        expected = torch.nn.functional.cross_entropy(
            trainer.model(idx).flatten(0, 1), targets.flatten(), ignore_index=IGNORE
        )
        assert n == 89 and float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() / gradients[0].norm() < 1e-5


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(corpus, tmp_path, poison, monkeypatch):
    trainer = make_trainer(tmp_path / "r", tiny_config(corpus))
    trainer.train_step()
    before = trainer.digest()
    if poison == "loss":
        monkeypatch.setattr(
            trainer.model, "forward", lambda *a: (trainer.model.head.weight.sum() * math.nan, torch.tensor(1))
        )
    else:
        hook = trainer.model.wpe.weight.register_hook(lambda g: g * math.inf)
    trainer.train_step()
    lr_only = trainer.digest()
    for optimizer in trainer.optimizers:  # the rate of the step is set before it is known to be bad
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * learning_rate_scale(0, 0.0, trainer.train)
    assert trainer.digest() == before != lr_only
    assert (trainer.state.skipped, trainer.state.skipped_in_a_row, trainer.state.step) == (1, 1, 2)
    monkeypatch.undo()
    if poison == "gradient":
        hook.remove()
    trainer.train_step()
    assert (trainer.state.skipped, trainer.state.skipped_in_a_row) == (1, 0) and trainer.digest() != before


def test_too_many_bad_steps_in_a_row_end_the_run_with_advice(corpus, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "r", tiny_config(corpus, max_skipped_steps=3))
    monkeypatch.setattr(
        trainer.model, "forward", lambda *a: (trainer.model.head.weight.sum() * math.nan, torch.tensor(1))
    )
    with pytest.raises(
        TrainingError,
        match=r"but skipped 3 \(loss or gradient not finite, or a gradient spike\); resume with --train.precision fp32 or "
        r"--train.spike-ratio 0, or start over",
    ):
        fit(trainer)
    assert trainer.state.step == 3


def test_fp16_lowers_its_scale_after_an_overflow_and_goes_on(corpus, tmp_path):
    trainer = make_trainer(tmp_path / "r", tiny_config(corpus, precision="fp16", batch_size=1))
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = trainer.model.wte.weight.detach().clone()
    trainer.train_step()
    assert (
        trainer.state.skipped == 1
        and trainer.scaler.get_scale() == 2.0**39
        and torch.equal(trainer.model.wte.weight, before)
    )
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    trainer.train_step()
    assert trainer.state.skipped == 1 and not torch.equal(trainer.model.wte.weight, before)


def test_training_learns(corpus, tmp_path):
    cfg = tiny_config(corpus, max_steps=60, lr=1e-2, batch_size=8)
    trainer = make_trainer(tmp_path / "r", cfg, PackedBlocks(Numbers(330, 8), 32, 0))
    losses = [trainer.train_step()[0] for _ in range(60)]
    assert losses[-1] < 2.3 < 6.0 < losses[0]


def test_mean_loss_is_a_total_over_a_total(corpus, tmp_path):
    trainer = make_trainer(tmp_path / "r", tiny_config(corpus))
    parts = [Uneven().rows(i, 4) for i in range(3)]
    whole = Batch(*(np.concatenate([part[i] for part in parts]) for i in range(2)))
    by_parts, n = mean_loss(trainer.model, parts, trainer.runtime)
    assert n == 3 * 34
    assert by_parts == pytest.approx(mean_loss(trainer.model, [whole], trainer.runtime)[0], rel=1e-6)


@pytest.mark.parametrize("preferred", [False, True])
def test_attention_is_computed_by_blocks_where_that_is_faster(preferred, corpus, tmp_path, monkeypatch):
    trainer, asked = make_trainer(tmp_path, tiny_config(corpus)), []
    monkeypatch.setattr(type(trainer.runtime), "prefers_blockwise_attention", preferred)
    monkeypatch.setattr(trainer.model, "enable_compile", asked.append)
    trainer.compile()
    assert asked == [preferred]


def test_a_compiler_that_fails_leaves_an_eager_run_with_one_warning(corpus, tmp_path, capsys, monkeypatch):
    cfg = tiny_config(corpus, compile="on", max_steps=3)
    plain = make_trainer(tmp_path / "plain", replace(cfg, train=replace(cfg.train, compile="off")))
    fit(plain)

    def broken(*args, **kwargs):
        raise RuntimeError("no compiler here\nand a long story")

    trainer = make_trainer(tmp_path / "r", cfg)
    monkeypatch.setattr(trainer.model, "enable_compile", lambda *_: setattr(trainer.model, "_softmax_and_nll", broken))
    capsys.readouterr()
    assert fit(trainer) == 0
    assert [line for line in capsys.readouterr().err.splitlines() if "warning" in line] == [
        "warning: torch.compile failed (no compiler here); training goes on uncompiled"
    ]
    assert trainer.digest() == plain.digest()  # the attempt left no trace


# -- exact resume -----------------------------------------------------------------------------------------------------

RESUME = dict(max_steps=12, batch_size=4, micro_batch_size=2, optimizer="muon", eval_every=1000, save_every=1000)


def stop_during(trainer, step, number=signal.SIGTERM):
    """Send a real signal to this process during a step of the trainer."""
    launch = trainer.launch_step

    def launch_and_stop():
        if trainer.state.step == step:
            os.kill(os.getpid(), number)
        return launch()

    trainer.launch_step = launch_and_stop


def interrupted(path, cfg, stop_step, number=signal.SIGTERM, blocks=None):
    """Train until a signal arrives during `stop_step`. Return a new trainer with other weights, ready to resume the run."""
    blocks = blocks or PackedBlocks(Numbers(), cfg.model.block_size, cfg.train.seed)
    first = make_trainer(path, cfg, blocks)
    stop_during(first, stop_step, number)
    assert fit(first) == 128 + number
    assert first.state.step == stop_step + 1  # the step was finished
    second = make_trainer(path, cfg, blocks, model_seed=99)
    folder = second.run.newest()
    return second, folder, load_state(folder)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def undisturbed(request, corpus, tmp_path_factory):
    cfg = tiny_config(corpus, precision=request.param, **RESUME)
    trainer = make_trainer(tmp_path_factory.mktemp("whole"), cfg)
    assert fit(trainer) == 0
    return cfg, trainer.digest()


@pytest.mark.parametrize(
    ("undisturbed", "stop_step"),
    [
        *(("fp32", step) for step in (0, 5, 10)),
        ("bf16", 5),
        *(pytest.param("bf16", step, marks=pytest.mark.slow) for step in (0, 10)),
    ],
    indirect=["undisturbed"],
)
def test_a_stopped_and_resumed_run_ends_in_the_same_bits(undisturbed, tmp_path, stop_step):
    cfg, digest = undisturbed
    trainer, folder, state = interrupted(tmp_path / "r", cfg, stop_step)
    trainer.resume(folder, state)
    assert fit(trainer) == 0
    assert trainer.digest() == digest


@pytest.mark.parametrize("undisturbed", ["fp32"], indirect=True)
@pytest.mark.parametrize("lost", ["rng", "adamw", "muon", "position", "step"])
def test_whatever_is_not_restored_shows_in_the_bits(undisturbed, tmp_path, lost):
    cfg, digest = undisturbed
    trainer, folder, state = interrupted(tmp_path / "r", cfg, 5)
    blank = make_trainer(tmp_path / "blank", cfg, model_seed=5).saved_state()
    if lost in ("adamw", "muon"):
        state["optimizers"][lost == "muon"] = blank["optimizers"][lost == "muon"]
    else:
        state[lost] = blank[lost]
    trainer.resume(folder, state)
    trainer.train = replace(trainer.train, max_steps=12 - 6 + trainer.state.step)  # as many steps as remained
    assert fit(trainer) == 0
    assert trainer.digest() != digest


def test_fp16_resumes_exactly_with_its_scale(corpus, tmp_path):
    cfg = tiny_config(corpus, precision="fp16", max_steps=4, batch_size=1, eval_every=1000, save_every=1000)
    whole = make_trainer(tmp_path / "whole", cfg)
    fit(whole)
    trainer, folder, state = interrupted(tmp_path / "r", cfg, 1)
    trainer.resume(folder, state)
    fit(trainer)
    assert trainer.digest() == whole.digest() and trainer.scaler.state_dict() == whole.scaler.state_dict()


def test_sigint_saves_too_and_gives_130(corpus, tmp_path):
    _, folder, state = interrupted(tmp_path / "r", tiny_config(corpus, **RESUME), 3, signal.SIGINT)
    assert folder.name == "step_000004" and state["position"] == 16


def test_another_thread_count_is_named_on_resuming(corpus, tmp_path, capsys):
    trainer, folder, state = interrupted(tmp_path / "r", tiny_config(corpus, **RESUME), 3)
    state["environment"]["threads"] = 64
    trainer.resume(folder, state)
    fit(trainer)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and notes[0].startswith("note: threads was 64 and is")


# -- masking across documents -----------------------------------------------------------------------------------------


def masked_config(corpus, **train):
    cfg = tiny_config(corpus, **train)
    return replace(cfg, model=replace(cfg.model, vocab_size=16, document_mask=True))


class Documents(Numbers):
    """Pseudo-random tokens in which every 16th is an end of text."""

    def __init__(self):
        super().__init__(vocab_size=16)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_training_with_the_document_mask_resumes_to_the_same_bits(corpus, tmp_path, precision):
    cfg = masked_config(corpus, **{**RESUME, "max_steps": 8, "precision": precision})
    blocks = PackedBlocks(Documents(), 32, cfg.train.seed, document_mask=True)
    whole = make_trainer(tmp_path / "whole", cfg, blocks)
    assert fit(whole) == 0
    second, folder, state = interrupted(tmp_path / "r", cfg, 3, blocks=blocks)
    second.resume(folder, state)
    assert fit(second) == 0
    assert second.digest() == whole.digest()
    unmasked = replace(cfg, model=replace(cfg.model, document_mask=False))
    plain = make_trainer(tmp_path / "plain", unmasked, PackedBlocks(Documents(), 32, cfg.train.seed))
    assert fit(plain) == 0
    assert plain.digest() != whole.digest()


def test_a_training_step_has_the_gradient_of_the_documents_one_by_one(corpus, tmp_path):
    cfg = masked_config(corpus, batch_size=4, micro_batch_size=2)
    cfg = replace(cfg, model=replace(cfg.model, dropout=0.0))
    trainer = make_trainer(tmp_path / "r", cfg, PackedBlocks(Documents(), 32, 0, document_mask=True))
    loss, n = trainer.forward_backward()
    found = [p.grad.clone() for p in trainer.model.parameters()]
    trainer.model.zero_grad()
    total = torch.zeros(())
    for idx, targets in zip(*trainer.batches.rows(0, 4)[:2]):
        cuts = sorted({0, *np.flatnonzero(idx == EOS).tolist(), 32})
        for start, stop in itertools.pairwise(cuts):
            piece, aims = (torch.from_numpy(a[None, start:stop].copy()) for a in (idx, targets))
            total = total + trainer.model(piece, aims)[0]
    (total / n).backward()
    assert n == 4 * 32 and float(loss) == pytest.approx(float(total.detach()) / n, rel=1e-5)
    for grad, p in zip(found, trainer.model.parameters()):
        assert torch.allclose(grad, p.grad, atol=1e-6)


def test_validation_with_the_document_mask_is_the_loss_of_the_documents_one_by_one(corpus, tmp_path):
    rng = np.random.default_rng(0)
    writers = {split: ShardWriter(tmp_path, split, np.dtype("<u2")) for split in SPLITS}
    for writer in writers.values():
        for length in (3, 50, 1, 20, 44, 9):  # some longer than a block, one of a single token
            ids = rng.integers(EOS + 1, 16, length)
            writer.add(np.append(ids, EOS).astype(np.uint32), n_bytes=length)
        writer.flush()
    write_manifest(
        tmp_path,
        fingerprint="x",
        dtype="<u2",
        tokenizer_sha256="f" * 64,
        vocab_size=16,
        eos_id=EOS,
        splits={k: w.info for k, w in writers.items()},
    )
    dataset = TokenDataset(tmp_path, "val")
    trainer = make_trainer(tmp_path / "r", masked_config(corpus))
    model = trainer.model.eval()
    tokens = torch.from_numpy(dataset.read(0, len(dataset)))
    starts = {0, *range(0, len(tokens), 32), *(tokens == EOS).nonzero().flatten().tolist()}
    cuts = sorted({*starts, len(tokens) - 1})  # the last token is a target only
    nll = 0.0
    with torch.no_grad():
        for start, stop in itertools.pairwise(cuts):
            nll += float(model(tokens[None, start:stop], tokens[None, start + 1 : stop + 1])[0])
    found = validate(model, dataset, trainer.runtime)["val_loss"]
    assert found == pytest.approx(nll / (len(tokens) - 1), rel=1e-5)
    model.cfg = replace(model.cfg, document_mask=False)
    assert validate(model, dataset, trainer.runtime)["val_loss"] != pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training_is_eager_training_compiles_once_and_resumes_exactly(corpus, tmp_path, monkeypatch, backend):
    """In an architecture with all that is hard to compile. Slow tests of the model compile others.

    The backend `aot_eager` traces the same graphs, forward and backward, and does not make the C++ compiler work for minutes.
    """
    if not device.has_compiler("cpu"):
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    cfg = masked_config(corpus, **{**RESUME, "max_steps": 6, "compile": "on"})
    hard = dict(norm="rmsnorm", position="rope", activation="swiglu", bias=False, n_kv_head=1, dropout=0.0)
    cfg = replace(cfg, model=replace(cfg.model, **hard))
    blocks = PackedBlocks(Documents(), 32, 0, document_mask=True)
    torch._dynamo.reset()
    counters.clear()
    eager = make_trainer(tmp_path / "eager", replace(cfg, train=replace(cfg.train, compile="off")), blocks)
    whole = make_trainer(tmp_path / "whole", cfg, blocks)
    assert fit(eager) == fit(whole) == 0 and whole.compiled and not eager.compiled
    assert counters["stats"]["unique_graphs"] == 2  # the block, which all layers and steps share, and the loss kernel
    lines = [read_metrics(trainer.run.path / "metrics.jsonl") for trainer in (eager, whole)]
    for name in ("loss", "grad_norm"):
        expected, found = ([line[name] for line in run if name in line] for run in lines)
        assert len(found) == 6 and found == pytest.approx(expected, rel=1e-4)
    for a, b in zip(eager.model.parameters(), whole.model.parameters()):
        assert torch.allclose(a, b, atol=2e-3)
    trainer, folder, state = interrupted(tmp_path / "r", cfg, 2, blocks=blocks)
    trainer.resume(folder, state)
    assert fit(trainer) == 0
    assert trainer.digest() == whole.digest()


def test_the_transformers_backbone_trains_and_resumes_by_the_same_loop(corpus, tmp_path):
    cfg = tiny_config(corpus, **{**RESUME, "max_steps": 6})
    cfg = replace(cfg, model=replace(cfg.model, backbone="transformers"))
    whole = make_trainer(tmp_path / "whole", cfg)
    assert fit(whole) == 0
    trainer, folder, state = interrupted(tmp_path / "r", cfg, 2)
    trainer.resume(folder, state)
    assert fit(trainer) == 0
    assert trainer.digest() == whole.digest()


def test_a_run_can_go_on_in_fp16_that_began_without(corpus, tmp_path, capsys):
    _, folder, state = interrupted(tmp_path / "r", tiny_config(corpus, batch_size=1, max_steps=4), 1)
    half = make_trainer(tmp_path / "r", tiny_config(corpus, batch_size=1, max_steps=4, precision="fp16"))
    half.resume(folder, state)
    assert fit(half) == 0
    assert "note: precision was fp32 and is fp16" in capsys.readouterr().err


def test_where_no_compiler_is_found_a_long_run_says_so_once(corpus, monkeypatch, capsys):
    cfg = tiny_config(corpus, compile="auto", max_steps=10**9)
    runtime, model = device.resolve(cfg.train), build_model(cfg.model)
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    assert not wants_compile(cfg, model, runtime)
    assert "no compiler for cpu was found" in capsys.readouterr().err
    monkeypatch.undo()
    assert not wants_compile(replace(cfg, train=replace(cfg.train, max_steps=2)), model, runtime)


# -- records ----------------------------------------------------------------------------------------------------------


def test_metrics_have_the_promised_fields_and_a_resumed_run_has_each_step_once(corpus, tmp_path):
    cfg = tiny_config(corpus, **{**RESUME, "eval_every": 4})
    trainer, folder, state = interrupted(tmp_path / "r", cfg, 5)
    with open(
        trainer.run.path / "metrics.jsonl", "a", encoding="utf-8"
    ) as f:  # as a run that was killed after its last checkpoint
        f.write(json.dumps({"step": 7, "loss": 0.0}) + "\n" + '{"step": 8, "lo')
    trainer.resume(folder, state)
    fit(trainer)
    lines = read_metrics(trainer.run.path / "metrics.jsonl")
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 13))
    assert set(training[0]) >= {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "elapsed_s"}
    assert [line["tokens"] for line in training] == [128 * s for s in range(1, 13)]
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 4, 8, 12]
    assert list((trainer.run.path / "tensorboard").iterdir())


def test_last_checkpoints_and_the_best_are_kept(corpus, tmp_path):
    cfg = tiny_config(corpus, max_steps=10, eval_every=1, save_every=1, keep_checkpoints=2)
    trainer = make_trainer(tmp_path / "r", cfg)
    losses = iter([9, 5, 4, 1, 3, 2, 6, 7, 8, 9, 10])
    trainer.validation = GivenFigures(lambda m: {"val_loss": float(next(losses))})
    fit(trainer)
    assert [p.name for p in trainer.run.checkpoints()] == ["step_000003", "step_000009", "step_000010"]


def test_a_best_checkpoint_that_could_not_be_saved_does_not_replace_the_one_on_disk(corpus, tmp_path, monkeypatch):
    from kindling.runs.checkpoint import CheckpointError

    cfg = tiny_config(corpus, max_steps=8, eval_every=2, save_every=2, keep_checkpoints=1)
    trainer = make_trainer(tmp_path / "r", cfg)
    losses = iter([9.0, 2.0, 1.0, 3.0, 4.0])
    trainer.validation = GivenFigures(lambda m: {"val_loss": next(losses)})
    real = RunDirectory.save

    def full_at_4(run, step, *rest):
        if step == 4:
            raise CheckpointError("disk full")
        return real(run, step, *rest)

    monkeypatch.setattr(RunDirectory, "save", full_at_4)
    fit(trainer)
    assert [p.name for p in trainer.run.checkpoints()] == ["step_000002", "step_000008"]
    assert trainer.state.best == {"step": 2, "val_loss": 2.0}


def test_a_validation_loss_that_is_not_finite_is_never_the_best(corpus, tmp_path):
    trainer = make_trainer(tmp_path / "r", tiny_config(corpus, max_steps=6, eval_every=2))
    losses = iter([9.0, math.nan, 2.0, 3.0])
    trainer.validation = GivenFigures(lambda m: {"val_loss": next(losses)})
    fit(trainer)
    assert trainer.state.best == {"step": 4, "val_loss": 2.0}
    lines = (trainer.run.path / "metrics.jsonl").read_text(encoding="utf-8")
    assert '"val_loss": null' in lines and "NaN" not in lines


def test_metrics_that_cannot_be_written_cost_a_warning_and_not_the_run(corpus, tmp_path, monkeypatch, capsys):
    trainer = make_trainer(tmp_path / "r", tiny_config(corpus))

    def no_space(path, line):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kindling.runs.metrics.append_line", no_space)
    assert fit(trainer) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "metrics cannot be written" in line]
    assert len(warnings) == 1 and trainer.run.newest().name == "step_000012"


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")  # how pytest shows the traceback
def test_a_tensorboard_that_cannot_write_costs_a_warning_and_no_traceback(corpus, tmp_path, monkeypatch, capfd):
    from tensorboard.compat.tensorflow_stub.io import gfile

    def no_space(*args):
        raise OSError(28, "No space left on device")

    trainer = make_trainer(tmp_path / "r", tiny_config(corpus))

    def fill_the_disk(model):
        monkeypatch.setattr(gfile.LocalFileSystem, "_write", no_space)
        return {"val_loss": 1.0}

    trainer.validation = GivenFigures(fill_the_disk)
    assert fit(trainer) == 0
    err = capfd.readouterr().err
    assert err.count("metrics cannot be written") == 1 and "Traceback" not in err
    assert len(read_metrics(trainer.run.path / "metrics.jsonl")) >= 12


def test_lines_of_the_metrics_that_are_none_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n[1]\n{"loss": 3}\n\xff\n{"step": 2, "lo\n{"step": 3}\n7\n{"st')
    assert [line["step"] for line in read_metrics(path)] == [1, 3]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_a_save_that_fails_midway_is_a_warning_and_the_last_one_an_error(corpus, tmp_path, monkeypatch, capsys):
    from kindling.runs.checkpoint import CheckpointError

    trainer = make_trainer(tmp_path / "r", tiny_config(corpus))  # saves at 6 and 12
    real, calls = trainer_module.RunDirectory.save, []

    def full_disk(run, step, *rest):
        calls.append(step)
        raise CheckpointError("disk full")

    monkeypatch.setattr(trainer_module.RunDirectory, "save", full_disk)
    with pytest.raises(CheckpointError):
        fit(trainer)
    assert calls == [6, 12] and "warning: disk full; the run goes on" in capsys.readouterr().err
    monkeypatch.setattr(trainer_module.RunDirectory, "save", real)


# -- the clock, and a device that is not waited for -------------------------------------------------------------------


class Clock:
    """A clock that a test moves. Each step, and each read of its result, takes some time."""

    def __init__(self, trainer, monkeypatch, step_s, read_s=0.0):
        self.now, launch, read = 0.0, trainer.launch_step, trainer.finish_step
        monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: self.now)
        trainer.launch_step = lambda: (self.pass_by(step_s), launch())[1]
        trainer.finish_step = lambda step: (self.pass_by(read_s), read(step))[1]

    def pass_by(self, seconds):
        self.now += seconds


def timed(corpus, minutes, **train):
    return tiny_config(
        corpus, max_minutes=minutes, eval_every=10**6, save_every=10**6, log_every=1, **train
    ).with_steps(1)


def rates_of(trainer):
    return [line["lr"] for line in read_metrics(trainer.run.path / "metrics.jsonl") if "lr" in line]


def test_a_run_by_minutes_ends_on_time_annealed_and_goes_on_when_given_more(corpus, tmp_path, monkeypatch):
    cfg = timed(corpus, 0.5, warmup_steps=1, schedule="linear", min_lr_ratio=0.0)
    trainer = make_trainer(tmp_path / "r", cfg)
    Clock(trainer, monkeypatch, step_s=1.5)
    assert fit(trainer) == 0
    assert (trainer.state.step, trainer.state.elapsed_s, trainer.share()) == (20, 30, 1)
    assert rates_of(trainer)[3:] == pytest.approx([cfg.train.lr * (1 - n / 20) for n in range(3, 20)])
    assert trainer.state.last_eval_step == 20
    folder = trainer.run.newest()
    longer = make_trainer(tmp_path / "r", timed(corpus, 1.0))
    longer.resume(folder, load_state(folder))
    Clock(longer, monkeypatch, step_s=1.5)
    assert longer.share() == 0.5 and fit(longer) == 0 and longer.state.step == 40


def test_a_run_by_minutes_too_short_for_its_warmup_ends_annealed_all_the_same(corpus, tmp_path, monkeypatch):
    cfg = timed(corpus, 0.1, warmup_steps=1000, schedule="linear", min_lr_ratio=0.0)
    trainer = make_trainer(tmp_path / "r", cfg)
    Clock(trainer, monkeypatch, step_s=0.25)
    fit(trainer)
    rates = rates_of(trainer)
    assert max(rates) > 0.85 * cfg.train.lr and rates[-1] < 0.05 * cfg.train.lr


def test_what_is_left_of_a_run_by_minutes_is_a_step_at_least(corpus, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "r", timed(corpus, 0.1, compile="on"))
    monkeypatch.setattr(trainer.model, "enable_compile", lambda *_: clock.pass_by(60))
    clock = Clock(trainer, monkeypatch, step_s=1)
    assert fit(trainer) == 0
    assert trainer.state.step == 1 and trainer.run.newest() is not None and trainer.state.last_eval_step == 1


def test_whether_compiling_pays_is_asked_of_the_minutes_that_are_left(corpus):
    cfg = timed(corpus, 5, compile="auto")
    runtime, model = device.resolve(cfg.train), build_model(cfg.model)
    pays = [wants_compile(cfg, model, runtime, elapsed_s) for elapsed_s in (0.0, 280.0)]
    assert pays == [device.has_compiler("cpu"), False]


def test_waiting_for_a_step_is_in_the_time_of_a_run(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(device.Runtime, "asynchronous", True)
    trainer = make_trainer(tmp_path / "r", tiny_config(corpus, max_steps=6, log_every=3))
    Clock(trainer, monkeypatch, step_s=0.0, read_s=1.0)
    fit(trainer)
    assert trainer.state.elapsed_s == 6
    assert [n["tokens_per_s"] for n in read_metrics(trainer.run.path / "metrics.jsonl") if "lr" in n] == [
        trainer.train.batch_size * trainer.cfg.model.block_size
    ] * 2


def test_where_the_optimiser_does_not_heed_it_a_bad_step_is_left_out_by_the_host(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(device.Runtime, "supports_found_inf", False)
    trainer = make_trainer(tmp_path / "r", tiny_config(corpus))
    for optimizer in trainer.optimizers:
        monkeypatch.setattr(optimizer, "step", lambda: pytest.fail("a step was done"))
    trainer.model.wte.weight.register_hook(lambda g: g * math.inf)
    trainer.train_step()
    assert trainer.state.skipped == 1


def test_compiling_is_in_the_time_of_a_run(corpus, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "r", tiny_config(corpus))
    monkeypatch.setattr(trainer.model, "enable_compile", lambda *_: time.sleep(0.3))
    assert trainer.compile() and trainer.state.elapsed_s > 0.3


def test_reading_each_step_while_the_next_one_runs_changes_no_bit_and_no_count(corpus, tmp_path, monkeypatch):
    digests, metrics = [], []
    for late in (False, True):
        monkeypatch.setattr(device.Runtime, "asynchronous", property(lambda self, late=late: late))
        trainer = make_trainer(tmp_path / str(late), tiny_config(corpus, max_steps=12, log_every=4, eval_every=6))

        def poison(grad, trainer=trainer):
            return grad * math.inf if trainer.state.step in (3, 4, 10) else grad

        hook = trainer.model.wte.weight.register_hook(poison)
        assert fit(trainer) == 0
        hook.remove()
        digests.append(trainer.digest())
        lines = read_metrics(trainer.run.path / "metrics.jsonl")
        timed = {"elapsed_s", "tokens_per_s"}
        metrics.append([{k: v for k, v in line.items() if k not in timed} for line in lines])
        assert trainer.state.skipped == 3
    assert digests[0] == digests[1] and metrics[0] == metrics[1]


def test_rows_are_read_ahead_and_are_the_same_when_the_position_jumps(corpus, tmp_path):
    read = []

    class Recorded(PackedBlocks):
        def rows(self, first, count):
            read.append((first, threading.current_thread() is threading.main_thread()))
            return super().rows(first, count)

    blocks = Recorded(Numbers(), 32, 7)
    prefetch = Prefetch(blocks)
    taken = [prefetch.take(range(p, p + 2), range(p + 2, p + 4)) for p in (0, 2, 10)]
    plain = PackedBlocks(Numbers(), 32, 7)
    for batch, first in zip(taken, (0, 2, 10), strict=True):
        assert np.array_equal(batch.idx, plain.rows(first, 2).idx)
    prefetch.take(range(12, 14), range(14, 16))
    prefetch._thread.shutdown(wait=True)
    assert [first for first, _ in read] == [0, 2, 4, 10, 12, 14] and not any(main for _, main in read)


# -- spikes -----------------------------------------------------------------------------------------------------------


def spoil(trainer, factor, rows):
    """Multiply the loss, and so the gradients, of the steps whose first row is one of `rows` by a factor."""

    def hook(module, args, output):
        return (output[0] * factor, output[1]) if trainer.state.row_index in rows else output

    trainer.model.register_forward_hook(hook)


def test_a_gradient_far_above_those_before_is_one_skipped_step(corpus, tmp_path):
    trainer = make_trainer(tmp_path / "r", tiny_config(corpus, max_steps=60))
    spoil(trainer, 1e4, {4 * 50})
    for _ in range(50):
        trainer.train_step()
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train_step()
    assert trainer.state.skipped == trainer.state.skipped_in_a_row == 1
    assert all(torch.equal(p, b) for p, b in zip(trainer.model.parameters(), before))
    trainer.train_step()
    assert trainer.state.skipped == 1 and trainer.state.skipped_in_a_row == 0
    assert not all(torch.equal(p, b) for p, b in zip(trainer.model.parameters(), before))


def test_outliers_are_left_alone_where_the_ratio_is_zero(corpus, tmp_path):
    trainer = make_trainer(tmp_path / "r", tiny_config(corpus, max_steps=60, spike_ratio=0))
    spoil(trainer, 1e4, {4 * 50})
    for _ in range(51):
        trainer.train_step()
    assert trainer.state.skipped == 0


def spoiled(path, corpus, steps=range(12, 15), **train):
    train = {"max_steps": 24, "save_every": 5, "eval_every": 100, "max_skipped_steps": 3, **train}
    trainer = make_trainer(path, tiny_config(corpus, **train))
    spoil(trainer, math.nan, {4 * step for step in steps})
    return trainer


def test_after_some_skipped_steps_the_run_goes_back_and_leaves_out_their_rows(corpus, tmp_path, capsys):
    trainer = spoiled(tmp_path / "r", corpus)
    assert fit(trainer) == 0
    assert trainer.state.step == 24 and trainer.state.skipped == 3 and trainer.state.rollbacks == 1
    assert trainer.state.excluded_rows == [(48, 60)] and trainer.state.row_index == 4 * 24 + 12
    assert (
        "3 steps in a row were skipped: back to step 10, without the 12 rows of those steps" in capsys.readouterr().err
    )
    logged = [line["step"] for line in read_metrics(tmp_path / "r" / "metrics.jsonl") if "loss" in line]
    assert logged == sorted(set(logged)) and logged[-1] == 24
    skipped = [json.loads(line)["step"] for line in (tmp_path / "r" / "skipped.jsonl").read_text().splitlines()]
    assert skipped == [13, 14, 15]


@pytest.mark.parametrize("first", [10, 12])  # the checkpoint is of step 10: right before the bad rows, or earlier
def test_a_run_that_went_back_is_the_run_that_never_had_those_rows(corpus, tmp_path, first):
    went_back = spoiled(tmp_path / "a", corpus, steps=range(first, first + 3))
    fit(went_back)
    assert went_back.state.skipped == 3 and went_back.state.rollbacks == 1
    never = make_trainer(tmp_path / "b", went_back.cfg)
    never.state.excluded_rows = [(4 * first, 4 * first + 12)]
    never.state.row_index = never.state.next_row(-4, 4)
    fit(never)
    assert went_back.digest() == never.digest()


def test_rows_to_avoid_and_the_norms_of_the_guard_are_restored(corpus, tmp_path):
    trainer = make_trainer(tmp_path / "r", tiny_config(corpus, max_steps=60))
    trainer.state.excluded_rows = [(200, 208)]
    for _ in range(45):
        trainer.train_step()
    trainer.save(required=True)
    again = make_trainer(tmp_path / "r", tiny_config(corpus, max_steps=60))
    folder = again.run.newest()
    again.resume(folder, load_state(folder))
    spoil(again, 1e4, {4 * 46})
    for _ in range(5):
        again.train_step()
    assert again.state.skipped == 1 and again.state.row_index == 208


def test_a_better_loss_on_a_skipped_step_does_not_cost_the_best_checkpoint(corpus, tmp_path):
    trainer = spoiled(tmp_path / "r", corpus, steps=range(11, 12), save_every=10, eval_every=1, keep_checkpoints=1)
    losses = iter([5.0 - n if n <= 12 else 9.0 for n in range(25)])
    trainer.validation = GivenFigures(lambda model: {"val_loss": next(losses)})
    fit(trainer)
    assert trainer.state.best["step"] == 11 and (tmp_path / "r" / "step_000011").is_dir()


def test_going_back_puts_later_checkpoints_out_of_the_way(corpus, tmp_path, capsys):
    trainer = spoiled(tmp_path / "r", corpus)
    later = trainer.run.save(
        14, trainer.model, trainer.saved_state()
    )  # as if a signal had come between the skipped steps
    fit(trainer)
    assert trainer.state.rollbacks == 1 and not later.exists()
    assert (tmp_path / "r" / "abandoned-step_000014").is_dir()
    assert "is kept as abandoned-step_000014" in capsys.readouterr().err


def test_a_run_by_minutes_whose_time_is_over_is_saved_and_does_not_go_back(corpus, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "r", timed(corpus, 0.1, max_skipped_steps=2))
    Clock(trainer, monkeypatch, step_s=1)
    spoil(trainer, math.nan, {4 * 4, 4 * 5})
    assert fit(trainer) == 0
    assert trainer.state.step == 6 and trainer.state.rollbacks == 0
    assert trainer.run.newest().name == "step_000006"


def test_a_run_that_went_back_resumes_bit_for_bit(corpus, tmp_path):
    whole = spoiled(tmp_path / "whole", corpus)
    fit(whole)
    again = spoiled(tmp_path / "whole", corpus)
    folder = again.run.newest(before=24)
    again.resume(folder, load_state(folder))
    assert again.state.step == 20 and again.state.excluded_rows == [(48, 60)] and again.state.rollbacks == 1
    fit(again)
    assert again.digest() == whole.digest()


def test_nothing_is_saved_between_skipped_steps_so_that_there_is_something_to_go_back_to(corpus, tmp_path):
    trainer = spoiled(tmp_path / "r", corpus, steps=range(13, 16), save_every=7, keep_checkpoints=9)
    fit(trainer)
    assert trainer.state.rollbacks == 1 and trainer.state.excluded_rows == [(52, 64)]
    saved = [folder.name for folder in trainer.run.checkpoints()]
    assert saved == ["step_000007", "step_000014", "step_000021", "step_000024"]


def large_from(path, corpus, step, **train):
    """Return a run whose gradients are 10,000 times as large from a step on."""
    train = {"max_steps": 60, "save_every": 100, "eval_every": 100, "max_skipped_steps": 3, **train}
    trainer = make_trainer(path, tiny_config(corpus, **train))
    spoil(trainer, 1e4, range(4 * step, 10**6))
    return trainer


def test_gradients_that_stay_large_wherever_the_run_goes_count_as_usual_in_the_end(corpus, tmp_path, capsys):
    trainer = large_from(tmp_path / "none", corpus, 45)
    assert fit(trainer) == 0
    assert trainer.state.step == 60 and trainer.state.skipped == 3 and trainer.state.rollbacks == 0
    assert "no checkpoint is from before them: from here on they are clipped to 1" in capsys.readouterr().err
    trainer = large_from(tmp_path / "some", corpus, 45, save_every=40)
    assert fit(trainer) == 0
    assert trainer.state.step == 60 and trainer.state.skipped == 4 * 3 and trainer.state.rollbacks == 3
    assert "the run has gone back 3 times already: from here on" in capsys.readouterr().err
    logged = [line["step"] for line in read_metrics(tmp_path / "some" / "metrics.jsonl") if "loss" in line]
    assert logged == sorted(set(logged))


@pytest.mark.parametrize("what", ["they are not clipped", "one of them is not finite"])
def test_gradients_that_stay_large_end_the_run_where(what, corpus, tmp_path):
    trainer = large_from(tmp_path / "r", corpus, 45, grad_clip=0.0 if what == "they are not clipped" else 1.0)
    if what == "one of them is not finite":
        spoil(trainer, math.nan, {4 * 46})
    with pytest.raises(TrainingError, match="but skipped 3 "):
        fit(trainer)


def test_a_good_step_in_flight_does_not_make_a_series_of_bad_ones_finite(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(device.Runtime, "asynchronous", True)
    trainer = spoiled(tmp_path / "r", corpus, steps=range(2, 5), save_every=50, log_every=50)  # no checkpoint is before
    with pytest.raises(TrainingError, match="but skipped 3 "):
        fit(trainer)
    assert trainer.state.step == 5


def test_a_run_that_goes_back_again_and_again_ends_with_a_way_out(corpus, tmp_path):
    trainer = spoiled(tmp_path / "r", corpus, steps=range(12, 1000))
    with pytest.raises(TrainingError, match="skipped 3 after 3 rollbacks"):
        fit(trainer)
    assert trainer.run.newest().name == "step_000010"

"""The work of two ranks in test_distributed.py. torchrun runs it; it writes the results of both to a file in the given folder."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from given_figures import GivenFigures

from config import IGNORE, Config, ModelConfig, TrainConfig
from kindling.data.shards import Batch
from kindling.device import Runtime, seed_all, seed_rank
from kindling.distributed import SINGLE_PROCESS, World, process_group
from kindling.runs.checkpoint import RunDirectory, load_state
from kindling.runs.fsdp import full_tensor
from kindling.runs.metrics import read_metrics
from kindling.training.loop import fit
from kindling.training.trainer import Trainer
from kindling.training.validation import mean_loss
from model import build_model

STEPS = 8


class Rows:
    """Pseudo-random rows, each a function of its position; some of their targets are not supervised."""

    n_rows = 1000

    def rows(self, first, count):
        rows = np.stack([np.random.default_rng(first + i).integers(0, 64, 17) for i in range(count)])
        targets = rows[:, 1:].copy()
        targets[np.arange(count), (first + np.arange(count)) % 16] = IGNORE
        targets[(first + np.arange(count)) % 5 == 0, :9] = IGNORE  # so that ranks have different numbers of targets
        return Batch(rows[:, :-1], targets)


def config(**train) -> Config:
    model = ModelConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=16)
    return Config(
        model=model,
        train=TrainConfig(
            **{
                "max_steps": STEPS,
                "batch_size": 8,
                "micro_batch_size": 2,
                "optimizer": "muon",
                "lr": 3e-3,
                "warmup_steps": 5,
                "eval_every": 1000,
                "save_every": 1000,
                "log_every": 1,
                "compile": "off",
                "precision": "fp32",
                "device": "cpu",
                **train,
            }
        ),
    )


def trainer_of(cfg: Config, folder: Path, world: World = SINGLE_PROCESS) -> Trainer:
    seed_all(0)
    model = build_model(cfg.model)
    folder.mkdir(parents=True, exist_ok=True)
    seed_rank(0, 0, world.rank)
    runtime = Runtime(torch.device("cpu"), "fp32", world)
    return Trainer(cfg, RunDirectory(folder), model, Rows(), GivenFigures(), runtime)


def curve(folder: Path, world: World = SINGLE_PROCESS, **train) -> list[float]:
    """Return the loss of each step of a whole run."""
    fit(trainer_of(config(**train), folder, world))
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def validation(world: World = SINGLE_PROCESS) -> tuple[float, int]:
    """Return loss and number of targets over five batches, which two ranks cannot share evenly."""
    trainer = trainer_of(config(), Path(os.devnull).parent / "shm", world)
    return mean_loss(trainer.model, [Rows().rows(4 * i, 4) for i in range(5)], trainer.runtime)


def resumed(folder: Path, world: World, **train) -> list[str]:
    """Return the digests of a run of six steps, and of one that was taken up after three."""
    cfg = config(max_steps=6, **train)
    cfg = replace(cfg, model=replace(cfg.model, dropout=0.2))
    whole = trainer_of(cfg, folder / "whole", world)
    fit(whole)
    first = trainer_of(cfg, folder / "parts", world)
    for _ in range(3):
        first.train_step()
    first.save(required=True)
    again = trainer_of(cfg, folder / "parts", world)
    saved = world.on_main(again.run.newest)
    again.resume(saved, load_state(saved))
    fit(again)
    return [whole.digest(), again.digest()]


def learned(trainer: Trainer) -> list[bytes]:
    """Return all that a step may change but the learning rates."""
    state = [t for o in trainer.optimizers for s in o.state.values() for t in s.values()]
    return [full_tensor(t.detach()).numpy().tobytes() for t in (*trainer.model.parameters(), *state)]


def poisoned(folder: Path, world: World, **train) -> dict:
    """Return what came of a NaN in the loss of the last rank alone, in one micro-batch of the third step."""
    trainer, calls = trainer_of(config(max_steps=5, **train), folder, world), []

    def poison(module, args, output):
        calls.append(0)
        bad = world.rank == world.size - 1 and len(calls) == 2 * 2 + 2  # two micro-batches a step
        return (output[0] * float("nan"), output[1]) if bad else output

    trainer.model.register_forward_hook(poison)
    unchanged = []
    for _ in range(5):
        before = learned(trainer)
        trainer.train_step()
        unchanged.append(learned(trainer) == before)
    return {"unchanged": unchanged, "skipped": trainer.state.skipped, "digest": trainer.digest()}


def by_the_clock(folder: Path, world: World) -> str:
    """Return the digest of a run of 0.6 s, of which the last rank's clock is ahead."""
    trainer = trainer_of(config(max_minutes=0.01, warmup_steps=0, save_every=1000), folder, world)
    trainer.state.elapsed_s = 0.3 * world.rank
    fit(trainer)
    return trainer.digest()


def unsaved(folder: Path, world: World, **train) -> list[bool]:
    """Return whether a checkpoint was saved when the main rank's disk was full, and when it was not."""
    trainer = trainer_of(config(**train), folder, world)
    trainer.train_step()

    def full() -> None:
        raise OSError(28, "No space left on device")

    if world.main:
        trainer.run._require_space = full
    first = trainer.save()
    trainer.run.__dict__.pop("_require_space", None)
    return [first, trainer.save()]


def gone_back(folder: Path, world: World, **train) -> dict:
    """Return what became of a run whose last rank has three bad steps in a row."""
    cfg = config(max_steps=12, save_every=4, max_skipped_steps=3, micro_batch_size=4, **train)
    trainer = trainer_of(cfg, folder, world)

    def poison(module, args, output):
        bad = world.rank == world.size - 1 and trainer.state.row_index in (48, 56, 64)
        return (output[0] * float("nan"), output[1]) if bad else output

    trainer.model.register_forward_hook(poison)
    fit(trainer)
    return {
        "step": trainer.state.step,
        "avoided": trainer.state.excluded_rows,
        "rollbacks": trainer.state.rollbacks,
        "digest": trainer.digest(),
    }


def signalled(folder: Path, world: World) -> dict:
    """Return where each rank stopped, and how it ends, after the last one alone got a SIGTERM in its fourth step."""
    trainer, calls = trainer_of(config(), folder, world), []

    def kill(module, args):
        calls.append(0)
        if world.rank == world.size - 1 and len(calls) == 2 + 3 * 2 + 1:  # the first two are the rehearsal's
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.model.register_forward_pre_hook(kill)
    code = fit(trainer)
    saved = [p.name for p in trainer.run.checkpoints()]
    return {"code": code, "step": trainer.state.step, "saved": saved}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    with process_group() as world:
        seen = {
            "rank": world.rank,
            "sum": world.sum([world.rank + 1.0, 10.0]),
            "max": world.max([float(world.rank)]),
            "gathered": world.gather(f"rank {world.rank}"),
            "from main": world.on_main(lambda: f"by {world.rank}"),
            "curve": curve(folder / "curve", world),
            "validation": validation(world),
            "resumed": resumed(folder / "resumed", world),
            "poisoned": poisoned(folder / "poisoned", world),
            "fsdp curve": curve(folder / "fsdp", world, parallel="fsdp", activation_checkpointing=True),
            "fsdp resumed": resumed(folder / "fsdp-resumed", world, parallel="fsdp"),
            "fsdp poisoned": poisoned(folder / "fsdp-poisoned", world, parallel="fsdp"),
            "by the clock": by_the_clock(folder / "clock", world),
            "unsaved": unsaved(folder / "unsaved", world),
            "fsdp unsaved": unsaved(folder / "fsdp-unsaved", world, parallel="fsdp"),
            "gone back": gone_back(folder / "back", world),
            "fsdp gone back": gone_back(folder / "fsdp-back", world, parallel="fsdp"),
            "signalled": signalled(folder / "signalled", world),
        }
        everyone = world.gather(seen)
        if world.main:
            (folder / "seen.json").write_text(json.dumps(everyone), encoding="utf-8")


if __name__ == "__main__":
    main()

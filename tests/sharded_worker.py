"""One of two training processes of test_fsdp.py: `sharded_worker.py FOLDER`, as torchrun starts it, writes RANK.json."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import IGNORE, ModelConfig, TrainConfig
from kindling.runs import fsdp
from kindling.training.optim import make_optimizers
from model import LanguageModel, build_model

WORLD, STEPS, SAVED_AT = 2, 5, 3
ROWS = 4  # a step, over all processes
# odd numbers of rows, which two processes cannot share evenly
SIZE = dict(block_size=16, vocab_size=257, n_layer=2, n_head=3, n_embd=36, d_ff=99)
ARCHITECTURES = {
    "gpt2": (ModelConfig(**SIZE), TrainConfig(lr=1e-3)),
    "llama": (
        ModelConfig(
            **SIZE, norm="rmsnorm", position="rope", activation="swiglu", bias=False, tie_embeddings=False, n_kv_head=1
        ),
        TrainConfig(lr=1e-3),
    ),
    "modern": (
        ModelConfig(
            **SIZE, norm="rmsnorm", position="rope", activation="relu2", bias=False, tie_embeddings=False, head_bias=True,
            qk_norm="learned", bigram_rows=33, residual_init="zero", document_mask=True,
        ),
        TrainConfig(lr=1e-3, optimizer="muon"),
    ),
}  # fmt: skip


class Run:
    """Training of a model of one architecture, on all processes or on one."""

    def __init__(self, name: str, world: int = 1, rank: int = 0, param_dtype: torch.dtype | None = None):
        cfg, train = ARCHITECTURES[name]
        torch.manual_seed(0)
        self.model: LanguageModel = build_model(cfg)
        self.world, self.rank, self.step, self.masked = world, rank, 0, cfg.document_mask
        if world > 1:
            fsdp.shard(self.model, world, param_dtype)
        self.optimizers = make_optimizers(self.model, train, torch.float32)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The step's rows of all processes; the later ones have fewer targets."""
        idx = torch.randint(0, 257, (ROWS, 17), generator=torch.Generator().manual_seed(self.step))
        targets = idx[:, 1:].clone()  # (B, T)
        for row in range(ROWS):
            targets[row, : 3 * row] = IGNORE
        positions = torch.cat((torch.arange(7), torch.arange(9))).expand(ROWS, 16) if self.masked else None
        return idx[:, :-1], targets, positions

    def train(self, steps: int = 1) -> list[float]:
        """Train steps in micro-batches of one row; return the losses over all processes."""
        return [self._train_step() for _ in range(steps)]

    def _train_step(self) -> float:
        total = self.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return total

    def backward(self) -> float:
        """Compute the clipped gradients of the next step; return its loss over all processes."""
        idx, targets, positions = self.batch()
        n_targets, total = (targets != IGNORE).sum(), torch.zeros(())
        mine = range(self.rank * ROWS // self.world, (self.rank + 1) * ROWS // self.world)
        for row in mine:
            fsdp.synchronize_gradients(self.model, last=row == mine[-1])
            part = slice(row, row + 1)
            loss, _ = self.model(idx[part], targets[part], None if positions is None else positions[part])
            (loss / n_targets).backward()
            total += loss.detach() / n_targets
        self.norm = float(fsdp.full_tensor(nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)))
        if self.world > 1:
            dist.all_reduce(total)
        return float(total)

    def validate(self) -> float:
        """Return the loss of the next step's rows, without gradients."""
        idx, targets, positions = self.batch()
        with torch.no_grad():
            return float(self.model(idx, targets, positions)[0])

    def digest(self) -> str:
        """Return a digest of weights and optimisers."""
        return fsdp.state_digest(self.model, self.optimizers)

    def save(self, folder: Path) -> None:
        """Save."""
        if self.rank == 0:
            fsdp.begin_sharded(folder, self.model, self.optimizers)
        if self.world > 1:
            dist.barrier()
        fsdp.save_sharded(folder, self.model, self.optimizers)

    def load(self, folder: Path) -> None:
        """Load the state that was saved in `folder`."""
        fsdp.load_sharded(folder, self.model, self.optimizers)
        self.step = SAVED_AT


def of_architecture(name: str, rank: int, folder: Path) -> dict:
    """Train, validate, save and train on; then resume from the checkpoint of two processes, and from that of one."""
    run, out = Run(name, WORLD, rank), {}
    out["is_sharded"] = fsdp.is_sharded(run.model)
    out["local_share"] = sum(p.to_local().numel() for p in run.model.parameters()) / run.model.n_parameters()
    losses = run.train(SAVED_AT)
    out["norm"] = run.norm
    out["validation_loss"] = run.validate()  # leaves the root's parameters gathered
    run.save(folder / f"{name}-by-2")
    out["saved_digest"] = run.digest()
    gathered = {n: fsdp.full_tensor(p.detach()) for n, p in run.model.named_parameters()}
    if rank == 0:
        torch.save(gathered, folder / f"{name}-gathered.pt")
    out["losses"] = losses + run.train(STEPS - SAVED_AT)
    out["digest"] = run.digest()
    for saved_by in (2, 1):
        resumed = Run(name, WORLD, rank)
        resumed.load(folder / f"{name}-by-{saved_by}")
        out[f"loaded_digest_of_{saved_by}"] = resumed.digest()
        out[f"resumed_losses_of_{saved_by}"] = resumed.train(STEPS - SAVED_AT)
        out[f"resumed_digest_of_{saved_by}"] = resumed.digest()
    return out


def roll_back(rank: int, folder: Path) -> dict:
    """Load an older state right after validation; the gathered parameters of the validation must not remain."""
    run = Run("gpt2", WORLD, rank)
    run.load(folder / "gpt2-by-2")
    run.train(1)
    run.validate()
    run.load(folder / "gpt2-by-2")
    return {"losses": run.train(STEPS - SAVED_AT)}


def bad_step(rank: int) -> dict:
    """Return whether the optimisers change anything on NaN gradients: with the flag for a bad step, and without it."""
    run = Run("modern", WORLD, rank)
    run.train(2)
    before = run.digest()
    run.backward()
    for p in run.model.parameters():
        p.grad.to_local().fill_(torch.nan)
    after = []
    for bad in (1.0, 0.0):
        for optimizer in run.optimizers:
            optimizer.found_inf = torch.tensor(bad)
            optimizer.step()
        after.append(run.digest() == before)
    return {"skipped_is_unchanged": after[0], "done_is_unchanged": after[1]}


def in_bfloat16(rank: int, name: str) -> dict:
    """Train with the blocks' parameters gathered in bfloat16."""
    run = Run(name, WORLD, rank, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        losses = run.train(STEPS)
    return {"losses": losses, "dtypes": sorted({str(p.dtype) for p in run.model.parameters()})}


def refusals(rank: int, folder: Path) -> dict:
    """Return the error that each process gets when only one of them has a problem."""
    run, out = Run("gpt2", WORLD, rank), {}
    taken = folder / "taken"
    if rank == 1:  # a folder where this process's file is to be
        (taken / "shard-00002-model-00001-of-00001.safetensors").mkdir(parents=True)
    dist.barrier()
    for what, call in (("save", lambda: fsdp.save_sharded(taken, run.model, [])), ("load", lambda: run.load(taken))):
        try:
            call()
            out[what] = ""
        except fsdp.CheckpointError as e:
            out[what] = str(e)
    return out


def main(folder: Path, rank: int) -> None:
    """Do everything, as process `rank` of two. The checkpoints of one process are in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    results = {name: of_architecture(name, rank, folder) for name in ARCHITECTURES}
    results |= {
        "roll_back": roll_back(rank, folder),
        "bf16": {name: in_bfloat16(rank, name) for name in ("gpt2", "llama")},
        "bad_step": bad_step(rank),
        "refusals": refusals(rank, folder),
    }
    (folder / f"{rank}.json").write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(os.environ["RANK"]))

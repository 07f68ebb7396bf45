"""Measure what each ingredient of the `demo` recipe buys: the recipe with one thing changed at a time, at equal tokens.

    python benchmarks/ablation.py                      # about 15 minutes; see that nothing else runs
    python benchmarks/ablation.py --tokens 20000 --only "AdamW" --results /tmp/try

Every run has the same tokens in the same order (of rows of its own length), its whole schedule in them, the same seed and the
same number of validation tokens. Bits per byte at equal tokens are free of the clock's noise; what a change costs or saves in
time is the other column, the median seconds of a step's token beside the recipe's, measured in turn with it. The validation
split alone is read: the test split is kept for time_to_loss.py. Nothing is compiled. Writes `ablation.json` and `.md` into
`benchmarks/results/local/`.

Limits: one seed, so a hundredth of a bit may be chance (the table has the recipe under another seed); few tokens, so what pays
only late, such as depth, looks worse than it is.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from machine import RESULTS

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

if TYPE_CHECKING:
    from config import Config
    from kindling.training.trainer import Trainer

CHANGES: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "the recipe, another seed": {"train.seed": 7},
    "no embedding of pairs": {"model.bigram_rows": 0},
    "one rate for embeddings and head too": {"train.embd_lr": None, "train.head_lr": None},
    "AdamW in place of Muon, rate 3e-3": {"train.optimizer": "adamw", "train.lr": 3e-3},
    "Muon's rate doubled": {"train.muon_lr": 0.04},
    "16 rows a step": {"train.batch_size": 16},
    "4 rows a step": {"train.batch_size": 4},
    "no QK-norm": {"model.qk_norm": False},
    "GELU": {"model.activation": "gelu_new"},
    "SwiGLU, d_ff 341": {"model.activation": "swiglu", "model.d_ff": 341},
    "projections not from zero": {"model.residual_init": "scaled"},
    "tied head, one rate": {"model.tie_embeddings": True, "train.embd_lr": None, "train.head_lr": None},
    "cosine to a tenth": {"train.schedule": "cosine", "train.min_lr_ratio": 0.1},
    "decay in the last half only": {"train.decay_fraction": 0.5},
    "no token sees another document": {"model.document_mask": True},
    "context 512, 4 rows a step": {"model.block_size": 512, "train.batch_size": 4},
    "192 wide": {"model.n_embd": 192, "model.n_head": 3},
}


def changed(cfg: Config, change: dict[str, Any], tokens: int) -> Config:
    """Return the config with the change, as long as so many tokens take, and of the shards' vocabulary."""
    sections = {"model": {}, "train": {}}
    for field, value in change.items():
        section, name = field.split(".")
        sections[section][name] = value
    cfg = replace(cfg, **{name: replace(getattr(cfg, name), **values) for name, values in sections.items()})
    steps = tokens // (cfg.train.batch_size * cfg.model.block_size)
    return replace(cfg, train=replace(cfg.train, max_steps=max(1, steps), max_minutes=None, compile="off"))


def trainer_of(cfg: Config, data: Path) -> Trainer:
    """Return a trainer at its first step, which writes nothing."""
    import os

    from kindling import device
    from kindling.data.examples import training_rows
    from kindling.data.shards import TokenDataset
    from kindling.runs.checkpoint import RunDirectory
    from kindling.training.start_or_resume import new_model
    from kindling.training.trainer import Trainer

    runtime = device.resolve(cfg.train)
    model, rows = new_model(cfg, runtime), training_rows(cfg, TokenDataset(data, "train"))
    model.train()
    return Trainer(cfg, RunDirectory(Path(os.devnull)), model, rows, None, runtime)


def measure(cfg: Config, data: Path, beside: Trainer) -> dict[str, Any]:
    """Train `cfg` to its end; return what it comes to, and the time of its tokens over those of `beside`, in turn with it."""
    from loss_worker import bits_per_byte, sparse, summed_loss_of

    from kindling.data.shards import TokenDataset

    trainer = trainer_of(cfg, data)
    ratios = []
    tokens = cfg.train.batch_size * cfg.model.block_size
    other = beside.train.batch_size * beside.cfg.model.block_size
    while trainer.share() < 1:
        seconds = timed(trainer.train_step) / tokens
        if trainer.state.step % 20 == 5:
            ratios.append(seconds / (timed(beside.train_step) / other))
    model, val = trainer.model, TokenDataset(data, "val")
    loss_of = summed_loss_of(model, trainer.runtime)
    return {
        "bits_per_byte": bits_per_byte(loss_of, val, cfg.model, sparse(val)),
        "time": statistics.median(ratios) if ratios else None,
        "parameters": model.n_parameters(),
        "steps": trainer.state.step,
        "skipped": trainer.state.skipped,
    }


def timed(work: Callable[[], Any]) -> float:
    """Return the seconds that it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def table(found: dict[str, dict[str, Any]], tokens: int) -> str:
    """Return the results as Markdown, the largest loss without an ingredient last."""
    recipe = found["the recipe"]["bits_per_byte"]
    lines = [
        "| the recipe with | bits per byte | beside the recipe | time of a token |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, row in sorted(found.items(), key=lambda item: item[1]["bits_per_byte"]):
        ratio = "" if row["time"] is None else f"{row['time']:.2f}"
        bits = row["bits_per_byte"]
        lines.append(f"| {name} | {bits:.3f} | {bits - recipe:+.3f} | {ratio} |")
    return (
        "\n".join([*lines, "", f"{tokens:,} tokens each; validation split; time of a token beside the recipe's own."])
        + "\n"
    )


def main() -> None:
    """Train every change and write the table, after each of them."""
    from machine import Watch

    from kindling.data.build import prepare
    from kindling.data.shards import read_manifest
    from kindling.files import write_atomic, write_json
    from presets import preset

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=250_000, help="tokens of each training")
    parser.add_argument(
        "--only", nargs="+", default=[], help="changes whose names hold one of these, beside the recipe"
    )
    parser.add_argument("--data", type=Path, help="a folder with shards; without it, the demo's are prepared")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to write")
    flags = parser.parse_args()
    base = preset("demo")
    data = flags.data or prepare(base)
    base = replace(base, model=replace(base.model, vocab_size=read_manifest(data)["vocab_size"]))
    chosen = {
        name: change
        for name, change in CHANGES.items()
        if not flags.only or not change or any(word in name for word in flags.only)
    }
    flags.results.mkdir(parents=True, exist_ok=True)
    beside = trainer_of(changed(base, {}, 10**12), data)
    found: dict[str, dict[str, Any]] = {}
    watch = Watch()
    for name, change in chosen.items():
        found[name] = measure(changed(base, change, flags.tokens), data, beside)
        print(f"{name}: {found[name]}", flush=True)
        out = {"machine": watch.describe(), "tokens": flags.tokens, "found": found}
        write_json(flags.results / "ablation.json", out)
        write_atomic(flags.results / "ablation.md", table(found, flags.tokens))


if __name__ == "__main__":
    from kindling.cli import run_script

    run_script(main)

"""Pre-train a model from random weights: prepare the data, train, evaluate, show samples.

    python main.py                                            # what config.RUN names
    python main.py --preset code-50m --train.max-steps 200

Starting the same run again resumes it from its newest checkpoint, bit for bit, and says so when it is complete.
`--fresh` starts over and keeps the old run under another name. `--dry-run` measures a few steps and stops.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cli import ConfigFlags, changed_fields, parse_cli, run_script
from config import Config, KindlingError
from data_pipeline import DATA, exit_on_terminate, prepare, require_documents

if TYPE_CHECKING:
    from checkpoint import RunDirectory
    from device import Runtime
    from model import LanguageModel
    from shards import TokenDataset
    from trainer import Trainer

# settings that a resumed run may change: without any effect on its bits, and with one that is said
HARMLESS = {"data.workers"} | {
    f"train.{field}"
    for field in ("sample_prompts", "log_every", "eval_every", "save_every", "keep_checkpoints", "max_skipped_steps")
}
ALLOWED = HARMLESS | {
    f"train.{field}" for field in ("max_steps", "threads", "device", "precision", "compile", "micro_batch_size")
}


@dataclass
class Flags:
    """The script's command line."""

    config: ConfigFlags
    fresh: bool = False
    """Start over; an old run of this name is kept as NAME.old-1."""
    dry_run: bool = False
    """Print parameters, memory, measured speed and time of the run, and stop."""


def reconcile(saved: Config, given: Config, run: RunDirectory) -> None:
    """Name every setting that differs from the run's own; refuse those that would make it another run."""
    changes = changed_fields(saved, given)
    changes.pop("name", None)
    said = {field: f"{field} {old!r} -> {new!r}" for field, (old, new) in changes.items()}
    refused = [text for field, text in said.items() if field not in ALLOWED]
    if refused:
        raise KindlingError(
            f"{run.path} must be resumed with the config that it was started with, but these differ: {'; '.join(refused)}; "
            f"take them back, or use another --name, or start over with --fresh"
        )
    for field, text in said.items():
        print(
            f"note: {text}"
            + ("" if field in HARMLESS else ": from here on the run differs from one without the change")
        )


def training_data(cfg: Config, run: RunDirectory | None) -> TokenDataset:
    """Open the training shards of `cfg`, or those that a started run began with; refuse if they would be others now."""
    from shards import DataError, TokenDataset, read_manifest

    if run is None:
        return TokenDataset(prepare(cfg), "train")
    manifest = read_manifest(run.data)
    folder = DATA / manifest["fingerprint"]
    if not folder.is_dir():
        folder = prepare(cfg)
    dataset = TokenDataset(folder, "train")
    if [s["sha256"] for s in dataset.info.shards] != [s["sha256"] for s in manifest["splits"]["train"]["shards"]]:
        raise DataError(
            f"{run.path} must be resumed on the data that it was started with ({manifest['fingerprint']}), but that is gone and "
            f"the sources have changed since; start over with --fresh, or use another --name"
        )
    return dataset


def new_model(cfg: Config, runtime: Runtime) -> LanguageModel:
    """Build the model with random weights of the config's seed."""
    import device
    from model import build_model

    device.seed_all(cfg.train.seed)
    return build_model(cfg.model).to(runtime.device)


def load_initial_weights(model: LanguageModel, source: str, tokenizer_sha256: str) -> None:
    """Replace the weights by those of the run `source`, if its token ids mean the same."""
    from checkpoint import CheckpointError, find_run, load_weights

    run = find_run(Path(source))
    folder = run.newest()
    if folder is None:
        raise CheckpointError(
            f"train.init_from must name a run with a checkpoint, but {run.path} has none; train it first"
        )
    if run.tokenizer().sha256 != tokenizer_sha256:
        raise CheckpointError(
            f"train.init_from must name a run with the same tokenizer, but that of {run.path} is another; use it here with "
            f"--tokenizer.kind pretrained --tokenizer.path {run.path / 'tokenizer.json'}"
        )
    load_weights(folder, model)


def samples(trainer: Trainer) -> str:
    """Return a continuation of each sample prompt, with the seed in the text so that it can be had again."""
    from generate import Sampling, complete

    tokenizer, model = trainer.run.tokenizer(), trainer.model.eval()
    out = []
    for seed, prompt in enumerate(trainer.train.sample_prompts):
        text = prompt + complete(model, tokenizer, prompt, Sampling(max_new_tokens=120, seed=seed))
        out.append(f"--- sample {seed + 1}, from {prompt!r}\n{text.rstrip()}\n")
    return "\n".join(out)


def take_up(cfg: Config, run: RunDirectory, fresh: bool) -> Trainer:
    """Return a trainer at the run's newest checkpoint, or at the beginning of a run that this creates."""
    import device
    from checkpoint import CheckpointError, find_run, load_state
    from shards import PackedBlocks
    from trainer import Trainer, validate

    started = run.exists() and not fresh
    if started:
        reconcile(run.config(), cfg, run)
    elif run.checkpoints() and not fresh:
        raise CheckpointError(
            f"{run.path} must have its config.yaml beside its checkpoints, but has none; restore it, or start over with --fresh"
        )
    require_documents(cfg)
    if cfg.train.init_from is not None and not started:
        find_run(Path(cfg.train.init_from))  # before the data are built, which may take long
    dataset = training_data(cfg, run if started else None)
    folder = run.newest() if started else None
    state = None if folder is None else load_state(folder)
    # by default the run's own number, as far as this machine has the cores; the trainer names a difference
    device.set_threads(
        cfg.train.threads or (min(state["environment"]["threads"], os.cpu_count() or 1) if state else None)
    )
    runtime = device.resolve(cfg.train)
    blocks = PackedBlocks(dataset, cfg.model.block_size, cfg.train.seed)
    model = new_model(cfg, runtime)
    if state is None and cfg.train.init_from is not None:
        load_initial_weights(model, cfg.train.init_from, dataset.manifest["tokenizer_sha256"])
    if not started:
        if fresh and run.path.exists():  # only now that nothing is left which could refuse the new run
            print(f"the old run is kept as {run.set_aside()}")
        run.create(cfg, dataset.folder)
    heldout = run.heldout("val")
    tokenizer_sha256 = run.tokenizer().sha256
    for split in (dataset, heldout):
        split.require_fits(cfg.model.vocab_size, tokenizer_sha256)
    eos_id = dataset.manifest["eos_id"]
    trainer = Trainer(cfg, run, model, blocks, lambda m: validate(m, heldout, runtime), runtime, eos_id)
    if folder is not None and state is not None:
        trainer.resume(folder, state)
    print(
        f"{run.path}: {model.n_parameters():,} parameters on {runtime.device.type} in {runtime.precision}, {cfg.tokens:,} "
        f"tokens in {cfg.train.max_steps:,} steps, {blocks.n_blocks * cfg.model.block_size:,} tokens an epoch"
    )
    return trainer


def pretrain(cfg: Config, fresh: bool) -> int:
    """Train or resume the run of `cfg`; return the exit code."""
    from checkpoint import RUNS, RunDirectory

    started = time.perf_counter()
    run = RunDirectory(RUNS / cfg.run_name)
    with run.lock():
        trainer = take_up(cfg, run, fresh)
        if trainer.step >= cfg.train.max_steps:
            print(f"the run is complete at step {trainer.step}; --train.max-steps N goes on, --fresh starts over")
        else:
            if trainer.step:
                print(f"resuming at step {trainer.step}")
            if code := trainer.fit():
                print(f"stopped and saved at step {trainer.step}; the same command resumes")
                return code
        if not trainer.last_eval:
            trainer.last_eval = trainer.evaluate(trainer.model)
    print(f"\n{samples(trainer)}")
    report(trainer, time.perf_counter() - started)
    return 0


def report(trainer: Trainer, seconds: float) -> None:
    """Print what the run reached, where it lies, and what comes next."""
    run, result = trainer.run, trainer.last_eval
    print(
        f"validation over the whole held-out split: loss {result['val_loss']:.4f}, perplexity {result['val_perplexity']:.2f}, "
        f"{result['val_bits_per_byte']:.4f} bits per byte"
    )
    skipped = f", {trainer.skipped} steps skipped" if trainer.skipped else ""
    print(
        f"{trainer.elapsed_s:.0f} s of training, {seconds:.0f} s since the start{skipped}; state sha256 {trainer.digest()[:16]}"
    )
    print(f"results in {run.path}; next: python evaluate.py {run.path}")
    print(f'        or: python generate.py {run.path} --prompt "def "')


def main(argv: list[str] | None = None) -> int:
    """Train the run of the command line, or measure it dry."""
    flags = parse_cli(Flags, __doc__ or "", argv)
    if flags.dry_run:
        import device
        from checkpoint import RUNS, RunDirectory
        from dry_run import dry_run

        device.set_threads(flags.config.train.threads)
        runtime = device.resolve(flags.config.train)
        saved = [] if flags.fresh else RunDirectory(RUNS / flags.config.run_name).checkpoints()
        done = int(saved[-1].name.removeprefix("step_")) if saved else 0
        print(dry_run(flags.config, new_model(flags.config, runtime), runtime, done))
        print(f"this was a dry run: nothing was written; next: python main.py --preset {flags.config.preset}")
        return 0
    return pretrain(flags.config, flags.fresh)


if __name__ == "__main__":
    exit_on_terminate()
    run_script(main)

"""Starts a run, or resumes it from its newest checkpoint, in pre-training and in fine-tuning.

In the order of the calls: `may_resume` decides between the two and checks the config, `training_data` and `training_rows`
open the data, `start_or_resume` makes the model and the trainer and loads the weights. KEEPS_EVERY_BIT and MAY_CHANGE
are the settings that a resumed run may change.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from config import Config, ModelConfig
from kindling import device
from kindling.config_io import changed_fields
from kindling.data.build import DATA, prepare
from kindling.data.examples import ExampleRows, Examples, open_split
from kindling.data.shards import DataError, PackedBlocks, SplitInfo, TokenDataset, read_manifest
from kindling.device import Runtime
from kindling.distributed import SINGLE_PROCESS, World
from kindling.errors import KindlingError
from kindling.formats import hf_format
from kindling.formats.hf_layout import MEANING, differing, load_into
from kindling.runs.checkpoint import CheckpointError, RunDirectory, load_state, load_weights, weights_sha256
from kindling.runs.loading import find_run, require_checkpoint
from kindling.tokenization.tokenizer import Tokenizer, load_json, load_pretrained
from kindling.training.trainer import Trainer, require_divisible_batch
from kindling.training.validation import validate
from model import LanguageModel, build_model

# settings that a resumed run may change. These keep every bit of the result
KEEPS_EVERY_BIT = {"data.workers"} | {
    f"train.{field}"
    for field in (
        "sample_prompts",
        "held_out_answers",
        "log_every",
        "eval_every",
        "save_every",
        "keep_checkpoints",
        "activation_checkpointing",
    )
}
# the others may change the result, and print a note
MAY_CHANGE = KEEPS_EVERY_BIT | {
    f"train.{field}"
    for field in (
        *("max_steps", "epochs", "max_minutes", "threads", "device", "precision", "compile", "micro_batch_size"),
        *("deterministic", "spike_ratio", "max_skipped_steps"),
    )
}


def may_resume(cfg: Config, run: RunDirectory, fresh: bool) -> bool:
    """Return True to resume the run, False to start a new one.

    Raises KindlingError, before any long work, if the run cannot be resumed with this config, or a new run cannot start.
    """
    device.resolve(cfg.train)
    device.require_threads(cfg.train.threads)
    resuming = run.exists() and not fresh
    if resuming:
        check_config_changes(run.config(), cfg, run)
    elif run.checkpoints() and not fresh:
        raise CheckpointError(
            f"{run.path} must have its config.yaml beside its checkpoints, but has none; restore it, or start over with --fresh"
        )
    elif cfg.train.init_from is not None:
        source = Path(cfg.train.init_from).expanduser()
        if hf_format.holds_model(source):
            _weights_of_hub(source, cfg.model)
            if cfg.tokenizer.kind == "pretrained":  # a tokenizer that is trained does not exist yet
                hf_format.require_same_tokenizer(source, load_pretrained(cfg.tokenizer))
        else:
            base = run_with_checkpoint(source)
            require_same_shape(base, cfg.model)
            if cfg.tokenizer.kind == "pretrained":
                require_tokenizer_of(base, load_pretrained(cfg.tokenizer))
    return resuming


def check_config_changes(saved: Config, given: Config, run: RunDirectory) -> None:
    """Print the settings that differ from the saved ones. Raises KindlingError if one of them must not change."""
    changes = changed_fields(saved, given)
    changes.pop("name", None)
    said = {field: f"{field} {old!r} -> {new!r}" for field, (old, new) in changes.items()}
    refused = [text for field, text in said.items() if field not in MAY_CHANGE]
    if refused:
        raise KindlingError(
            f"{run.path} must be resumed with the config that it was started with, but these differ: {'; '.join(refused)}; "
            f"undo these changes, or use another --name, or start over with --fresh"
        )
    for field, text in said.items():
        print(
            f"note: {text}"
            + ("" if field in KEEPS_EVERY_BIT else ": from here on the run differs from one without the change")
        )


@contextlib.contextmanager
def lock_run(cfg: Config, run: RunDirectory, fresh: bool, world: World) -> Iterator[bool]:
    """Hold the run's lock on the main rank, and yield the result of `may_resume` on every rank. Raises what either raises."""
    with contextlib.ExitStack() as stack:

        def lock_and_ask() -> bool:
            stack.enter_context(run.lock())
            return may_resume(cfg, run, fresh)

        yield world.on_main(lock_and_ask)


def training_data(cfg: Config, run: RunDirectory | None, tokenizer: Tokenizer | None = None) -> TokenDataset:
    """Open the training shards of `cfg`; build them first if they do not exist.

    A resumed `run` gets the shards that it was started with. `tokenizer` as in `build.prepare`. Raises DataError if those
    shards are gone and a new build gives others.
    """
    if run is None:
        return open_split(cfg, prepare(cfg, tokenizer), "train")
    manifest = read_manifest(run.data)
    folder = DATA / manifest["fingerprint"]
    if not folder.is_dir():
        folder = prepare(cfg, tokenizer)
    dataset = open_split(cfg, folder, "train")
    # shards of old versions have no table of documents; training does not read it
    began, found = (replace(SplitInfo(**m["splits"]["train"]), table=None) for m in (manifest, dataset.manifest))
    if began != found:
        raise DataError(
            f"{run.path} must be resumed on the data that it was started with ({manifest['fingerprint']}), but that is gone and "
            f"the sources have changed since; start over with --fresh, or use another --name"
        )
    return dataset


def training_rows(cfg: Config, dataset: TokenDataset) -> PackedBlocks | ExampleRows:
    """Return the rows that a run of `cfg` trains on, in their order."""
    model, train = cfg.model, cfg.train
    if isinstance(dataset, Examples):
        return ExampleRows(dataset, model.block_size, train.seed, train.packing, train.batch_size)
    return PackedBlocks(dataset, model.block_size, train.seed, model.document_mask)


def start_or_resume(
    cfg: Config,
    run: RunDirectory,
    resuming: bool,
    dataset: TokenDataset,
    rows: PackedBlocks | ExampleRows,
    world: World = SINGLE_PROCESS,
) -> Trainer:
    """Return a trainer at the run's newest whole checkpoint, or at step 0. The folder of a new run is created.

    Every rank of `world` must call it.
    """
    folder = world.on_main(run.newest) if resuming else None
    saved = None if folder is None else load_state(folder)
    device.set_threads(cfg.train.threads or (None if saved is None else _saved_threads(saved["environment"], world)))
    runtime = device.resolve(cfg.train, world)
    require_divisible_batch(cfg, runtime)
    if saved is not None:
        require_same_initial_weights(run, cfg.train.init_from, saved.get("initial_sha256"))
    model = new_model(cfg, runtime)
    initial_sha256 = None
    if saved is None and cfg.train.init_from is not None:
        tokenizer = load_json(dataset.folder / "tokenizer.json", cfg.tokenizer)
        initial_sha256 = load_initial_weights(model, cfg.train.init_from, tokenizer)
    if not resuming:
        world.on_main(lambda: _create(cfg, run, dataset))
    heldout = run.heldout("val")
    tokenizer_sha256 = run.tokenizer().sha256
    for split in (dataset, heldout):
        split.require_fits(cfg.model.vocab_size, tokenizer_sha256)
    cfg = cfg.with_steps(rows.n_rows)
    n_rows = cfg.train.evaluation_rows
    trainer = Trainer(cfg, run, model, rows, lambda m: validate(m, heldout, runtime, n_rows), runtime)
    trainer.state.initial_sha256 = initial_sha256
    if folder is not None and saved is not None:
        trainer.resume(folder, saved)
    elif world.rank:  # ranks have the same weights, but different dropout
        device.seed_rank(cfg.train.seed, 0, world.rank)
    return trainer


def _saved_threads(environment: dict[str, Any], world: World) -> int | None:
    """Return the run's earlier number of threads, at most this machine's cores; None if the number of ranks changed."""
    if environment.get("world_size", 1) != world.size:
        return None
    return min(environment["threads"], os.cpu_count() or 1)


def new_model(cfg: Config, runtime: Runtime) -> LanguageModel:
    """Return the model on its device, with random weights from the config's seed."""
    device.seed_all(cfg.train.seed)
    return build_model(cfg.model).to(runtime.device)


def load_initial_weights(model: LanguageModel, source: str, tokenizer: Tokenizer) -> str:
    """Load the weights of the run or hub folder `source` into the model; return their sha256.

    Raises CheckpointError if `source` has none, or has another tokenizer.
    """
    if hf_format.holds_model(hub := Path(source).expanduser()):
        hf_format.require_same_tokenizer(hub, tokenizer)
        load_into(model, _weights_of_hub(hub, model.cfg))
        return hf_format.weights_sha256(hub)
    run = run_with_checkpoint(Path(source).expanduser())
    require_tokenizer_of(run, tokenizer)
    folder = require_checkpoint(run)
    load_weights(folder, model)
    return weights_sha256(folder)


def run_with_checkpoint(source: Path) -> RunDirectory:
    """Return the run that `train.init_from` names. Raises CheckpointError if there is none, or it has no checkpoint."""
    run = find_run(source)
    if not run.checkpoints():
        raise CheckpointError(
            f"train.init_from must name a run with a checkpoint, but {run.path} has none; train it first"
        )
    return run


def require_tokenizer_of(run: RunDirectory, tokenizer: Tokenizer) -> None:
    """Raise CheckpointError unless a run has this tokenizer."""
    if run.tokenizer().sha256 != tokenizer.sha256:
        raise CheckpointError(
            f"train.init_from must name a run with the same tokenizer, but {run.path} has another one; use that one with "
            f"--tokenizer.kind pretrained --tokenizer.path {run.path / 'tokenizer.json'}"
        )


def require_same_shape(run: RunDirectory, cfg: ModelConfig) -> None:
    """Raise CheckpointError, with the flags to set, if the weights of a run do not fit a model of `cfg`."""
    shape = run.config().model
    if weight_settings(shape) != weight_settings(cfg):
        raise CheckpointError(_other_shape(shape, cfg, run.path))


def weight_settings(cfg: ModelConfig) -> tuple[object, ...]:
    """Return what the names and shapes of a model's weights depend on; making the model to compare them takes seconds."""
    return (
        *(
            cfg.vocab_size,
            cfg.n_layer,
            cfg.n_embd,
            cfg.kv_heads * cfg.head_dim,
            cfg.ff_width,
            cfg.activation == "swiglu",
        ),
        *(cfg.bias, cfg.bias and cfg.norm == "layernorm", cfg.final_norm, cfg.attn_out_proj, cfg.bigram_rows),
        *(cfg.tie_embeddings, cfg.head_bias, cfg.block_size if cfg.position == "learned" else None, cfg.backbone),
    )


def _weights_of_hub(folder: Path, cfg: ModelConfig) -> dict[str, Tensor]:
    """Return the weights of a hub folder. Raises CheckpointError, with the flags to set, if its shape differs from `cfg`."""
    shape, weights = hf_format.read(folder)
    if any(name != "block_size" or "learned" in (shape.position, cfg.position) for name in differing(shape, cfg)):
        raise CheckpointError(_other_shape(shape, cfg, folder))
    return weights


def _other_shape(shape: ModelConfig, cfg: ModelConfig, folder: Path) -> str:
    """Return the error text for weights in `folder`, of another shape than the run's `cfg`."""
    names = differing(shape, cfg)
    if "learned" not in (shape.position, cfg.position):  # without learned positions no weight depends on block_size
        names = [name for name in names if name != "block_size"]
    names = names or ["backbone"]  # the only other setting that names of weights depend on
    its, ours = ([getattr(c, MEANING.get(name, name)) for name in names] for c in (shape, cfg))
    said = ", ".join(f"{name} {value} for {own}" for name, value, own in zip(names, its, ours))
    flags = " ".join(f"--model.{name.replace('_', '-')} {value}" for name, value in zip(names, its))
    return f"train.init_from must name weights of the run's shape, but {folder} has {said}; set {flags}"


def require_same_initial_weights(run: RunDirectory, source: str | None, began_with: str | None) -> None:
    """Raise CheckpointError if `source` now has other weights than the run started from. It may also be gone."""
    if source is None or began_with is None:
        return
    try:
        now = _initial_sha256(source)
    except KindlingError:
        return
    if now is not None and now != began_with:
        raise CheckpointError(
            f"{run.path} must go on from the weights that it started from, but {source} has been trained since; start over with "
            f"--fresh, which keeps this one under another name, or use another --name"
        )


def _initial_sha256(source: str) -> str | None:
    """Return the sha256 of the weights that a run or hub folder has now; None if a run has none."""
    if hf_format.holds_model(Path(source).expanduser()):
        return hf_format.weights_sha256(Path(source).expanduser())
    folder = find_run(Path(source).expanduser()).newest()
    return None if folder is None else weights_sha256(folder)


def _create(cfg: Config, run: RunDirectory, dataset: TokenDataset) -> None:
    if run.exists() or run.checkpoints():  # move the old run only after all checks passed
        print(f"the old run is kept as {run.keep_as_old()}")
    run.create(cfg, dataset.folder)

"""Starts a run, or resumes it from its newest checkpoint, in pre-training and in fine-tuning.

In the order of the calls, which are all in stage.py: `check_config_changes` and `data_of_run`, or for a new run
`check_new_run`; then `start_or_resume` makes the model and the trainer and loads the weights.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from config import Config, ModelConfig
from kindling import device
from kindling.data.build import DATA, prepare
from kindling.data.examples import open_split
from kindling.data.shards import DataError, SplitInfo, TokenDataset, TrainingRows, read_manifest
from kindling.device import Runtime
from kindling.distributed import SINGLE_PROCESS, World
from kindling.errors import CheckpointError, KindlingError, require
from kindling.formats import hf_format
from kindling.formats.hf_layout import MEANING, differing, load_into
from kindling.paths import holds_hub_model
from kindling.runs.checkpoint import RunDirectory, load_state, load_weights, weights_sha256
from kindling.runs.loading import find_run, require_checkpoint
from kindling.tokenization.pretrained import load_pretrained
from kindling.tokenization.tokenizer import Tokenizer, load_json
from kindling.training.early_checks import KEEPS_EVERY_BIT, config_changes, init_path, run_with_checkpoint
from kindling.training.trainer import Trainer
from kindling.training.validation import Validation
from model import LanguageModel, build_model


def check_new_run(cfg: Config, run: RunDirectory, fresh: bool) -> None:
    """Raise KindlingError, before any long work, if a new run cannot start."""
    if run.checkpoints() and not fresh:
        raise CheckpointError(
            f"{run.path} must have its config.yaml beside its checkpoints, but has none; restore it, or start over with --fresh"
        )
    if cfg.train.init_from is not None:
        source = init_path(cfg.train.init_from)
        if holds_hub_model(source):
            _weights_of_hub(source, cfg.model)
            if cfg.tokenizer.kind == "pretrained":  # a tokenizer that is trained does not exist yet
                hf_format.require_same_tokenizer(source, load_pretrained(cfg.tokenizer))
        else:
            base = run_with_checkpoint(source)
            require_same_shape(base, cfg.model)
            if cfg.tokenizer.kind == "pretrained":
                require_tokenizer_of(base, load_pretrained(cfg.tokenizer))


def check_config_changes(saved: Config, given: Config, run: RunDirectory) -> None:
    """Print the settings that differ from the saved ones. Raises KindlingError if one of them must not change."""
    for field, text in config_changes(saved, given, run).items():
        print(
            f"note: {text}"
            + ("" if field in KEEPS_EVERY_BIT else ": from here on the run differs from one without the change")
        )


def data_of_run(cfg: Config, run: RunDirectory, tokenizer: Tokenizer | None = None) -> TokenDataset:
    """Open the training shards that a run was started with. If they are gone, build them again.

    `tokenizer` as in `build.prepare`. Raises DataError if the new build gives other shards.
    """
    manifest = read_manifest(run.data)
    folder = DATA / manifest["fingerprint"]
    if not folder.is_dir():
        own = run.tokenizer()
        if tokenizer is None and own.fim is None and cfg.tokenizer.kind != "pretrained":
            tokenizer = own  # an earlier version trained it, and this one would train another on the same text
        folder = prepare(cfg, tokenizer)
    dataset = open_split(cfg, folder, "train")
    # shards of old versions have no table of documents; training does not read it
    began, found = (replace(SplitInfo(**m["splits"]["train"]), table=None) for m in (manifest, dataset.manifest))
    if began != found:
        way = "start over with --fresh, or use another --name"
        if cfg.train.extend is not None:  # neither helps: a new run, too, goes on with the same data
            way = f"start from the last weights with --train.init-from {run.path}"
        raise DataError(
            f"{run.path} must be resumed on the data that it was started with ({manifest['fingerprint']}), but that is gone and "
            f"the sources have changed since; {way}"
        )
    return dataset


def start_or_resume(
    cfg: Config,
    run: RunDirectory,
    resuming: bool,
    dataset: TokenDataset,
    rows: TrainingRows,
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
    validation = Validation(heldout, runtime, cfg.train.evaluation_rows)
    trainer = Trainer(cfg, run, model, rows, validation, runtime)
    trainer.state.initial_sha256 = initial_sha256
    if folder is not None and saved is not None:
        trainer.resume(folder, saved)
    elif world.rank:  # ranks have the same weights, but different dropout
        device.seed_rank(cfg.train.seed, 0, world.rank)
    return trainer


def require_divisible_batch(cfg: Config, runtime: Runtime) -> None:
    """Raise ConfigError if the batch cannot be divided by the number of ranks, or if fp16 is combined with FSDP."""
    ranks, train = runtime.world.size, cfg.train
    must = f"a multiple of the {ranks} ranks"
    mend = "set --train.batch-size, or start another number of ranks"
    require(train.batch_size % ranks == 0, "train.batch_size", must, train.batch_size, mend)
    half_sharded = ranks > 1 and train.parallel == "fsdp" and runtime.precision == "fp16"
    require(
        not half_sharded, "train.precision", "bf16 or fp32 with --train.parallel fsdp", "fp16", "set --train.precision"
    )


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
    path = init_path(source)
    if holds_hub_model(path):
        hf_format.require_same_tokenizer(path, tokenizer)
        load_into(model, _weights_of_hub(path, model.cfg))
        return hf_format.weights_sha256(path)
    run = run_with_checkpoint(path)
    require_tokenizer_of(run, tokenizer)
    folder = require_checkpoint(run)
    load_weights(folder, model)
    return weights_sha256(folder)


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
            cfg.n_head * cfg.head_dim,
            cfg.kv_heads * cfg.head_dim,
            cfg.ff_width,
        ),
        *(cfg.activation == "swiglu", cfg.qk_norm == "learned"),
        *(
            cfg.bias,
            cfg.has_qkv_bias,
            cfg.bias and cfg.norm == "layernorm",
            cfg.final_norm,
            cfg.attn_out_proj,
            cfg.bigram_rows,
        ),
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
    path = init_path(source)
    if holds_hub_model(path):
        return hf_format.weights_sha256(path)
    folder = find_run(path).newest()
    return None if folder is None else weights_sha256(folder)


def _create(cfg: Config, run: RunDirectory, dataset: TokenDataset) -> None:
    if run.exists() or run.checkpoints():  # move the old run only after all checks passed
        print(f"the old run is kept as {run.keep_as_old()}")
    run.create(cfg, dataset.folder)

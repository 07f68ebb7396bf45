"""Opens a run to be served with PyTorch."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, cast

from kindling.device import resolve
from kindling.generation.inference import prepare_for_inference
from kindling.runs.checkpoint import RunDirectory
from kindling.runs.loading import chat_of, load_model
from kindling.serving.open_export import MOST_ROWS, NO_CHAT, Opened, about
from kindling.serving.torch_engine import CACHE_BYTES, TorchEngine, TorchVocabulary, rows_for


def open_run(run: RunDirectory, device: str, precision: str, cache_bytes: int | None) -> Opened:
    """Open a run with PyTorch. Raises KindlingError."""
    cfg = run.config()
    runtime = resolve(replace(cfg.train, device=cast(Any, device)), flag="--device")
    loaded, checkpoint = load_model(run, runtime.device)
    model = prepare_for_inference(loaded, cast(Any, precision))
    engine = TorchEngine(model, min(MOST_ROWS, rows_for(model, CACHE_BYTES if cache_bytes is None else cache_bytes)))
    vocabulary = TorchVocabulary(run.tokenizer(), model.cfg.vocab_size, cfg.data.fim_rate > 0)
    _ = vocabulary.spellings  # now, and not while the first client waits
    name = run.path.resolve().name
    said = {"kind": "a run in PyTorch", "source": f"{name}, {checkpoint.name}", "precision": precision}
    said |= about(asdict(cfg.model), cfg.model.n_parameters, checkpoint / "model.safetensors", engine, run.path)
    return Opened(name, engine, vocabulary, *(chat_of(run) or NO_CHAT), said)

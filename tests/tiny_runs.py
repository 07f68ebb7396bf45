"""Run folders like those of a fine-tuning, made in a moment, with a model whose output is known."""

from pathlib import Path

import torch

from config import Config, DataConfig, ModelConfig, SourceConfig
from kindling.data.ledger import Ledger
from kindling.data.prompts import rendered_template
from kindling.data.shards import FORMAT
from kindling.files import write_json
from kindling.runs.checkpoint import RunDirectory
from kindling.tokenization.tokenizer import Tokenizer
from model import GPT


def bigram_model(tokenizer: Tokenizer, follows: dict[str, str | None], block_size: int) -> GPT:
    """Return a model that always writes `follows[c]` after the character c; None means the end of text."""
    V = tokenizer.vocab_size
    cfg = ModelConfig(
        block_size=block_size, vocab_size=V, n_layer=1, n_head=1, n_embd=V, tie_embeddings=False, final_norm=False
    )
    model = GPT(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()  # so the block adds nothing
        model.wte.weight.copy_(torch.eye(V))
        for c, after in follows.items():
            (one,) = tokenizer.encode(c)
            (other,) = [tokenizer.eos_id] if after is None else tokenizer.encode(after)
            model.head.weight[other, one] = 1000.0
    return model


def make_run(folder: Path, tokenizer: Tokenizer, model: GPT, kind: str = "docstrings", **manifest) -> RunDirectory:
    """Write a run like that of a fine-tuning: config, tokenizer, manifest, one checkpoint."""
    data = folder.parent / f".{folder.name}-data"
    data.mkdir(parents=True)
    splits = {name: {"tokens": 0, "documents": 0, "bytes": 0, "max_id": -1, "shards": []} for name in ("val", "test")}
    about = {
        "format": FORMAT,
        "fingerprint": "tiny",
        "dtype": "uint16",
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "splits": splits,
        "max_exchanges": 1,
        "template": rendered_template("alpaca"),
    }
    write_json(data / "manifest.json", {**about, **manifest})
    Ledger(["tiny"], [1.0]).write(data)
    (data / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    run = RunDirectory(folder)
    run.create(Config(preset="docstrings", model=model.cfg, data=DataConfig(sources=(SourceConfig(kind=kind),))), data)
    run.save(1, model, {"best": None})
    return run

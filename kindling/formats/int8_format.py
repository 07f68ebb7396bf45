"""Writes a run's weights as int8 for `autocomplete.py`, which reads them without torch.

    write(folder, model, tokenizer, "runs/demo, step 1100")

Each row of a matrix has one scale, its largest absolute value over 127 (symmetric, rounded to nearest). Norms, biases and
positions stay float32. One safetensors file holds everything under the names of a checkpoint, and the scales as
`NAME.scale`. Limit: no SentencePiece tokenizers, because `tokenizers` must read them.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from kindling.config_io import by_old_names
from kindling.data.prompts import rendered_template
from kindling.errors import KindlingError
from kindling.files import sha256_file, write_json
from kindling.formats.parity import Difference, compare
from kindling.int8.model import CONFIG, FORMAT, TOKENIZER, WEIGHTS, Model
from kindling.int8_rounding import quantize
from kindling.runs.loading import Chat
from kindling.tokenization.tokenizer import SentencePieceTokenizer, Tokenizer
from model import GPT


class Int8Error(KindlingError):
    """A run that cannot be exported to int8."""


def tensors(model: GPT) -> dict[str, Tensor]:
    """Return the tensors of the export, by name."""
    out: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        if p.dim() == 2 and name != "wpe.weight":
            out[name], out[f"{name}.scale"] = quantize(p.detach())
        else:
            out[name.removesuffix(".weight") if name == "wpe.weight" else name] = p.detach().float()
    if model.cfg.position == "sinusoidal":
        out["wpe"] = model.positions
    return {name: t.cpu().contiguous() for name, t in out.items()}


def require_tokenizer(tokenizer: Tokenizer) -> None:
    """Raise Int8Error if the format cannot hold the tokenizer."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        raise Int8Error(
            "a run must have a tokenizer that `tokenizers` reads to be exported to int8, but tokenizer.kind is 'sentencepiece'; "
            "train one with --tokenizer.kind bpe"
        )


def write(
    folder: Path, model: GPT, tokenizer: Tokenizer, source: str, infills: bool = False, chat: Chat | None = None
) -> None:
    """Write config, weights and tokenizer into an existing folder; raises Int8Error for a SentencePiece tokenizer.

    `infills`: the model was trained to fill in the middle. `chat`: how a model that was fine-tuned on instructions is asked.
    """
    from safetensors.torch import save_file

    require_tokenizer(tokenizer)
    save_file(tensors(model), folder / WEIGHTS)
    (folder / TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
    meta = {
        "format": FORMAT,
        "source": source,
        "model": by_old_names(asdict(model.cfg)),
        "eos_id": tokenizer.eos_id,
        "end_ids": list(tokenizer.end_ids),
        "bos_id": tokenizer.bos_id,
        "lossy": tokenizer.may_rewrite,
        "infills": infills,
        "chat": None if chat is None else {**chat._asdict(), "rendered": rendered_template(chat.template)},
        "weights_sha256": sha256_file(folder / WEIGHTS),
    }
    write_json(folder / CONFIG, meta)


def difference(folder: Path, model: GPT, rows: Tensor) -> Difference:
    """Compare the model with its export, run in NumPy, on rows (B, T) of at least 2 tokens."""
    exported = Model(folder)
    return compare(model, lambda row: torch.from_numpy(exported.logits(row.tolist())), rows)

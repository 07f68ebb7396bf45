"""Checks before a build what would otherwise be found during it or after it: hub, tokenizer, context, disk.

tokenizer = require_possible(cfg, files, tokenizer, Path("data"))
"""

from __future__ import annotations

import shutil
from pathlib import Path

from config import Config, TokenizerConfig
from kindling.data.prompts import Exchange, encode
from kindling.data.shards import DataError, token_dtype
from kindling.data.sources import WHOLE_FILES, SourceFiles, require_answer
from kindling.errors import TokenizerError
from kindling.paths import expand_home
from kindling.public_paths import is_hub_tokenizer
from kindling.tokenization.pretrained import load_pretrained
from kindling.tokenization.tokenizer import Tokenizer
from kindling.tokenization.train_tokenizer import require_room

BYTES_PER_TOKEN = 5  # of text: more than tokenizers have on average, so that the estimate is rather too small


def require_possible(cfg: Config, files: SourceFiles, tokenizer: Tokenizer | None, data: Path) -> Tokenizer | None:
    """Return the tokenizer of a build if it is known before it; `tokenizer` is the run's own in fine-tuning.

    Raises KindlingError if the hub is needed and does not answer, if the tokenizer is missing or does not fit, if no block or
    no example fits, or if the disk under `data` has too little room.
    """
    for source in cfg.data.sources:
        with require_answer(source):
            pass
    if tokenizer is None and cfg.tokenizer.kind == "pretrained":
        tokenizer = load_pretrained(cfg.tokenizer)
    if tokenizer is None:
        require_room(cfg.tokenizer, cfg.model.vocab_size)
    else:
        require_fits(tokenizer, cfg.model.vocab_size)
    if cfg.data.instructions and tokenizer is not None:
        _require_room_for_examples(cfg, tokenizer)
    elif not cfg.data.instructions:
        _require_a_block(cfg, files)
    _require_disk(cfg, files, data)
    return tokenizer


def require_tokenizer_file(cfg: TokenizerConfig) -> None:
    """Raise TokenizerError if a pretrained tokenizer must be a file and does not exist, before any source is listed."""
    path = expand_home(cfg.path or "", "tokenizer.path")
    if cfg.kind == "pretrained" and not is_hub_tokenizer(cfg) and not path.exists():
        load_pretrained(cfg)


def require_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise TokenizerError if a tokenizer has more tokens than the model."""
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"model.vocab_size must be at least the tokenizer's {tokenizer.vocab_size}, but is {vocab_size}; "
            f"set --model.vocab-size"
        )


def _require_room_for_examples(cfg: Config, tokenizer: Tokenizer) -> None:
    """Raise DataError if the template leaves no room for a response, whatever the instruction is."""
    (segment,) = encode(cfg.data.template, [Exchange("x")], tokenizer)
    needed = len(segment.prompt) + 1  # a token of the response; the end-of-text after it is only a target
    if needed > cfg.model.block_size:
        raise DataError(
            f"the context must have room for the template and a response, at least {needed} tokens, but model.block_size is "
            f"{cfg.model.block_size}; fine-tune a run with a longer context, or choose another --data.template"
        )


def _require_a_block(cfg: Config, files: SourceFiles) -> None:
    """Raise DataError if the files of the one source are too small for a block, as a token has at least one byte."""
    (source, *others), (found, *_) = cfg.data.sources, files
    exact = cfg.tokenizer.kind in ("bpe", "handwritten") and cfg.tokenizer.normalizer == "none"
    if others or found is None or source.kind not in WHOLE_FILES or not exact:
        return
    most = sum(f.size + 1 for f in found)  # a document ends with one more token
    most += len(found) if cfg.tokenizer.bos_token is not None else 0
    if most <= cfg.model.block_size:
        raise DataError(
            f"the train split must hold at least one block of {cfg.model.block_size + 1} tokens, but the files of "
            f"{source.label} have at most {most}; add files, or lower --model.block-size"
        )


def estimated_bytes(cfg: Config, files: SourceFiles) -> int:
    """Return about how large the shards become, rather too small; 0 if nothing is known, as of a data set on the hub."""
    sizes = [None if found is None else sum(f.size for f in found) for found in files]
    limits = [(size, s.max_bytes) for size, s in zip(sizes, cfg.data.sources)]
    known = [min(x for x in pair if x is not None) for pair in limits if pair != (None, None)]
    tokens = sum(known) // BYTES_PER_TOKEN
    if cfg.data.max_tokens is not None:
        tokens = min(tokens, cfg.data.max_tokens) if None not in sizes else cfg.data.max_tokens
    return tokens * token_dtype(cfg.model.vocab_size).itemsize


def _require_disk(cfg: Config, files: SourceFiles, data: Path) -> None:
    """Raise DataError if the disk has less room than the shards need by an estimate from the sizes of the files."""
    place = next(folder for folder in (data.absolute(), *data.absolute().parents) if folder.is_dir())
    needed, free = estimated_bytes(cfg, files), shutil.disk_usage(place).free
    if needed > free:
        raise DataError(
            f"{data}/ must have room for the shards, about {needed / 1e9:.2f} GB by the sizes of the files, but its disk has "
            f"{free / 1e9:.2f} GB free; free some space, run from a folder on another disk, or set --data.max-tokens"
        )


def require_documents(cfg: Config) -> None:
    """Raise DataError if a source holds instructions and answers, which only fine-tuning can use."""
    for source in cfg.data.sources:
        if source.is_instructions:
            raise DataError(
                f"preset {cfg.preset} must train on documents, but its source {source.label} holds instructions and answers; "
                f"it is for fine-tuning: pre-train with another --preset, then run `python sft_train.py --preset {cfg.preset}`"
            )

"""One dial from a seed's sizes down to what fits the time: shapes, vocabulary, context, batch, learning rate.

    cfg = shrink(preset("code-50m"), 1 / 4)       # a quarter of the width and of the layers
    arguments = flags_of(cfg)                     # ("--preset", "code-50m", "--model.n-layer", "2", ...)

The vocabulary falls with the square of the dial, so that embeddings and blocks keep about their shares; one that is smaller than
a pretrained tokenizer's is trained. Tokens, and how many are built, follow from the parameters, in the seed's ratio. The learning
rate rises as the width falls, up to a limit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from config import Config, TokenizerConfig
from kindling.config_io import changed_fields
from kindling.tables import short_number
from presets import preset

LADDER = tuple(2 ** (-k / 8) for k in range(41))  # 1, 0.92, ... 1/32
VOCABULARY, CONTEXT, ROWS, STEPS = 2048, 256, 8, 60  # at least
RATE = 5e-3  # at most
HELD_OUT, DOCUMENTS = (
    0.04,
    2000,
)  # of the documents, at most, for each split; of a source that has a limit of them, at least


def shrink(cfg: Config, scale: float, context: int = CONTEXT) -> Config:
    """Return a config at `scale` of its size, with tokens in its own ratio to the parameters. At 1 it is unchanged."""
    if scale == 1:
        return cfg
    model = cfg.model
    n_head = max(1, round(model.n_head * scale))
    n_embd = 2 * n_head * max(4, round(model.n_embd * scale / n_head / 2))
    small = replace(
        model,
        n_layer=max(2, round(model.n_layer * scale)),
        n_head=n_head,
        n_kv_head=None if model.n_kv_head is None else n_head,
        n_embd=n_embd,
        d_ff=None if model.d_ff is None else n_embd * model.d_ff // model.n_embd,
        vocab_size=min(model.vocab_size, max(VOCABULARY, 256 * round(model.vocab_size * scale**2 / 256))),
        block_size=min(model.block_size, max(context, 64 * round(model.block_size * scale / 64))),
    )
    return data_in_ratio(in_ratio(replace(cfg, model=small), cfg, scale), cfg)


def in_ratio(small: Config, seed: Config, scale: float) -> Config:
    """Return the config with batch, steps and rates for its size: as many tokens for each parameter as in the seed's."""
    train = seed.train
    rows = max(min(ROWS, train.batch_size), round(train.batch_size * scale**2))
    micro = min(rows, train.micro_batch)
    rows -= rows % micro
    tokens = seed.tokens * small.model.n_parameters / seed.model.n_parameters
    steps = max(STEPS, round(tokens / (rows * small.model.block_size)))
    warmup = max(5, round(train.warmup_steps * steps / (train.max_steps or steps)))
    return replace(
        small,
        train=replace(
            train, batch_size=rows, micro_batch_size=None if micro == rows else micro, max_steps=steps,
            warmup_steps=min(train.warmup_steps, warmup), lr=float(f"{max(train.lr, min(RATE, train.lr / scale)):.2g}"),
            save_every=saved_every(steps), sample_every=None,
        ),
    )  # fmt: skip


def data_in_ratio(small: Config, seed: Config) -> Config:
    """Return the config with as many tokens or documents to build as it reads, and with a tokenizer of its vocabulary.

    The held-out splits keep about the seed's size, so that they are not left without a document.
    """
    share, data, tokenizer = small.tokens / seed.tokens, small.data, small.tokenizer
    if data.max_tokens is not None:
        held_out = {name: max(getattr(data, name), min(HELD_OUT, getattr(data, name) / share))
                    for name in ("val_fraction", "test_fraction")}  # fmt: skip
        data = replace(data, max_tokens=max(1, round(data.max_tokens * share)), **held_out)
    sources = tuple(
        source if source.max_documents is None
        else replace(source, max_documents=min(source.max_documents, max(DOCUMENTS, round(source.max_documents * share))))
        for source in data.sources
    )  # fmt: skip
    data = replace(data, sources=sources)
    if tokenizer.kind == "pretrained" and small.model.vocab_size < seed.model.vocab_size:
        tokenizer = TokenizerConfig()
    return replace(small, data=data, tokenizer=tokenizer)


def saved_every(steps: int) -> int:
    """Return after how many steps a run is saved: one that is killed loses an eighth of it, or 25 steps."""
    return max(25, steps // 8)


def flags_of(cfg: Config, sources: str | None = None) -> tuple[str, ...]:
    """Return the flags that make a config from its preset. `sources` names a file of `--config` that has the sources."""
    out = ["--preset", cfg.preset, *(() if sources is None else ("--config", sources))]
    for field, (_, value) in changed_fields(preset(cfg.preset), cfg).items():
        if sources is not None and field.startswith("data.sources."):
            continue
        if isinstance(value, tuple) and not all(isinstance(item, str) for item in value):
            raise ValueError(f"{field} is not a flag")  # such as another number of sources
        out += [f"--{field.replace('_', '-')}", *(value if isinstance(value, tuple) else [_text(value)])]
    return tuple(out)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def size_text(cfg: Config, tokens: float | None = None) -> str:
    """Return the size of a run in words, for the plan."""
    of_tokens = short_number(cfg.tokens if tokens is None else tokens)
    return f"{short_number(cfg.model.n_parameters)} parameters, {of_tokens} tokens"

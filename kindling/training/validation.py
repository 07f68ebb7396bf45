"""The loss of a model on a batch, and on a held-out split or a part of it. Several ranks share the work.

validate(model, run.heldout("val"), runtime)["val_bits_per_byte"]
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kindling import device
from kindling.data.shards import Batch, TokenDataset
from kindling.device import Runtime
from kindling.distributed import World
from model import LanguageModel

VALIDATION_ROWS = 16


def summed_loss(model: nn.Module, batch: Batch, runtime: Runtime) -> tuple[Tensor, Tensor]:
    """Return the summed loss of a batch and its number of supervised tokens, for training and for validation."""
    # (B, T) each
    idx, targets, position_ids = (None if rows is None else device.to_device(rows, runtime) for rows in batch)
    inner: Any = getattr(model, "module", model)  # DDP wraps the model
    full = batch.idx.shape[1] == inner.cfg.block_size  # padded examples are as wide as the longest of them needs
    with runtime.autocast(), device.attention_of_fixed_shapes(runtime) if full else nullcontext():
        return model(idx, targets, position_ids)


def batches_of_rank(batches: Iterable[Batch], world: World) -> Iterator[tuple[Batch, bool]]:
    """Yield the batches of this rank, every `world.size`-th one, each with True.

    All ranks get the same number, since all take part in every pass of a sharded model. If the last round is short, spare
    ranks get a batch with False: it is computed but not counted.
    """
    turn: list[Batch] = []
    for batch in batches:
        turn.append(batch)
        if len(turn) == world.size:
            yield turn[world.rank], True
            turn = []
    if turn:
        yield turn[min(world.rank, len(turn) - 1)], world.rank < len(turn)


@torch.no_grad()
def mean_loss(model: LanguageModel, batches: Iterable[Batch], runtime: Runtime) -> tuple[float, int]:
    """Return the mean loss in nats over all supervised tokens of `batches`, and their number."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    shown = None if runtime.world.main else True  # None: shown if there is a terminal
    share = batches_of_rank(batches, runtime.world)
    for batch, counts in tqdm(share, desc="evaluating", unit="batch", leave=False, disable=shown):
        loss, n = summed_loss(model, batch, runtime)
        if counts:
            total, count = total + float(loss), count + int(n)
    model.train(was_training)
    total, all_count = runtime.world.sum([total, count])
    return total / max(1, all_count), int(all_count)


def validate(
    model: LanguageModel,
    dataset: TokenDataset,
    runtime: Runtime,
    n_rows: int = VALIDATION_ROWS,
    part: int | None = None,
) -> dict[str, float]:
    """Return loss (nats a token), perplexity, bits per byte and supervised tokens of one split, `n_rows` rows at a time.

    The figures are of the whole split, or of `part` of its rows, evenly spaced. Bits per byte divides the loss of all supervised
    tokens, with end-of-text, by the UTF-8 bytes of the documents (of the responses, if the split has examples). So it can be
    compared across tokenizers. A part is assumed to have as many bytes to a token as the whole split.
    """
    loss, count = mean_loss(model, dataset.in_order(model.cfg, n_rows, part), runtime)
    bits_per_byte = loss * dataset.n_targets / math.log(2) / dataset.info.bytes
    perplexity = math.exp(min(loss, 700.0))
    return {"val_loss": loss, "val_perplexity": perplexity, "val_bits_per_byte": bits_per_byte, "val_tokens": count}


class Validation:
    """Evaluates the model of a run on its validation split: on the same part of it each time, and on the whole."""

    def __init__(self, dataset: TokenDataset, runtime: Runtime, n_rows: int = VALIDATION_ROWS):
        """`n_rows` rows are predicted at a time. The part is the whole split, until `part` is set to a number of rows."""
        self.dataset, self.runtime, self.n_rows = dataset, runtime, n_rows
        self.part: int | None = None

    def n_rows_of_split(self, model: LanguageModel) -> int:
        """Return the number of rows of the whole split."""
        return self.dataset.n_rows_in_order(model.cfg)

    def __call__(self, model: LanguageModel) -> dict[str, float]:
        """Return the figures of the part."""
        return validate(model, self.dataset, self.runtime, self.n_rows, self.part)

    def whole(self, model: LanguageModel) -> dict[str, float]:
        """Return the figures of the whole split."""
        return validate(model, self.dataset, self.runtime, self.n_rows)

    def row_s(self, model: LanguageModel) -> float:
        """Return the seconds that a row takes, on the slowest rank."""
        rows = min(self.n_rows * self.runtime.world.size, self.n_rows_of_split(model))
        for _ in range(2):  # the first pass allocates memory, or compiles
            started = time.perf_counter()
            validate(model, self.dataset, self.runtime, self.n_rows, rows)
            seconds = time.perf_counter() - started
        return self.runtime.world.max([seconds / rows])[0]

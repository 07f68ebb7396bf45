"""The loss of a model on a batch, and on a whole held-out split. Several ranks share the work.

validate(model, run.heldout("val"), runtime)["val_bits_per_byte"]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

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
    with runtime.autocast():
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
    model: LanguageModel, dataset: TokenDataset, runtime: Runtime, n_rows: int = VALIDATION_ROWS
) -> dict[str, float]:
    """Return loss (nats a token), perplexity and bits per byte over the whole of one split, `n_rows` rows at a time.

    Bits per byte divides the loss of all supervised tokens, with end-of-text, by the UTF-8 bytes of the documents (of the
    responses, if the split has examples). So it can be compared across tokenizers.
    """
    loss, count = mean_loss(model, dataset.in_order(model.cfg, n_rows), runtime)
    bits_per_byte = loss * count / math.log(2) / dataset.info.bytes
    return {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700.0)), "val_bits_per_byte": bits_per_byte}

"""The difference between a model and its export, in logits and in loss.

difference = compare(model, lambda row: exported.logits(row), rows)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model import LanguageModel


class Difference(NamedTuple):
    """How a model and its export differ on the same rows; NaN if a logit of either is NaN."""

    largest: float
    """Largest absolute difference of a logit."""
    loss: float
    """Loss of the model, in nats per token."""
    changed: float
    """Loss of the export."""


@torch.no_grad()
def compare(model: LanguageModel, its_logits: Callable[[Tensor], Tensor], rows: Tensor) -> Difference:
    """Compare on rows (B, T) of tokens; `its_logits` returns the export's logits (T, V) for one row (T,)."""
    was_training = model.training
    model.eval()
    rows = rows.to(model.head.weight.device)
    largest, nll = [], torch.zeros(2, dtype=torch.float64)
    for row in rows:  # one at a time: logits are large
        logits = model(row[None])[0].float().cpu(), its_logits(row).float().cpu()  # (T, V) each
        largest.append((logits[0] - logits[1]).abs().max())
        nll += torch.stack([F.cross_entropy(x[:-1].double(), row[1:].cpu(), reduction="sum") for x in logits])
    model.train(was_training)
    loss, changed = (nll / (rows.size(0) * (rows.size(1) - 1))).tolist()
    return Difference(float(torch.stack(largest).max()), loss, changed)  # max is NaN if any is

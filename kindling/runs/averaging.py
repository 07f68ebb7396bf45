"""The mean of the weights at a run's last checkpoints, in place of the last weights alone.

    folders = checkpoints_to_average(run, 8)
    model = load_average(run, folders, device)

The checkpoints of one run lie close enough together for their mean to be a good model, often a better one where the data are
read several times (Izmailov et al. 2018, arXiv:1803.05407; of the last checkpoints: Kaddour 2022, arXiv:2209.14981).
docs/evaluation.md has figures.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kindling.errors import CheckpointError
from kindling.files import sha256_text
from kindling.runs.checkpoint import RunDirectory, load_weights, verify
from kindling.runs.loading import PretrainedFolder, load_model, require_checkpoint, sha256_of_weights

if TYPE_CHECKING:
    import torch

    from model import LanguageModel


def checkpoints_to_average(run: RunDirectory, n: int) -> list[Path]:
    """Return the run's last `n` checkpoints, verified, the oldest first; of 1 the newest whole one.

    Raises CheckpointError if there are fewer, or if one of several is damaged.
    """
    newest = require_checkpoint(run)
    if n == 1:
        return [newest]
    kept = 1 if isinstance(run, PretrainedFolder) else len(run.checkpoints())
    if not 1 < n <= kept:
        raise CheckpointError(
            f"--average must be from 1 to the {kept} checkpoints that {run.path} has, but is {n}; keep more with "
            f"--train.keep-checkpoints {max(2, n)} and a smaller --train.save-every"
        )
    folders = run.checkpoints()[-n:]
    for folder in folders:
        if folder != newest:  # that one is verified
            verify(folder)
    return folders


def average_name(folders: Sequence[Path]) -> str:
    """Return what is evaluated or exported, for tables: a checkpoint's name, or that it is a mean."""
    if len(folders) == 1:
        return folders[0].name
    return f"mean of {len(folders)} checkpoints, {folders[0].name} to {folders[-1].name}"


def average_sha256(run: RunDirectory, folders: Sequence[Path]) -> str:
    """Return what tells these weights from others: their sha256, or of a mean that of the sha256 of all, in order."""
    found = [sha256_of_weights(run, folder) for folder in folders]
    return found[0] if len(found) == 1 else sha256_text("".join(found))


def load_average(run: RunDirectory, folders: Sequence[Path], device: torch.device) -> LanguageModel:
    """Return the model whose weights are the mean of those at these checkpoints, ready for inference.

    The mean is taken in float32, one checkpoint after the other, so two models are in memory.
    """
    import torch

    model, _ = load_model(run, device, folders[0])
    if len(folders) == 1:
        return model
    one = copy.deepcopy(model)
    with torch.no_grad():
        for number, folder in enumerate(folders[1:], 2):
            load_weights(folder, one)
            for mean, weight in zip(model.parameters(), one.parameters()):
                mean.add_((weight - mean) / number)
    return model

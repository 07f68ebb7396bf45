"""Finds a run, by its folder, its name, or as the newest one, and loads its model.

run = find_run(Path("demo"))                    # or find_run(None): the newest run
model, checkpoint = load_model(run, device)
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from kindling.errors import KindlingError
from kindling.runs.checkpoint import RUNS, CheckpointError, RunDirectory, load_weights
from model import LanguageModel, build_model


def find_run(path: Path | None, pretrained: bool = False) -> RunDirectory:
    """Return the run at `path`, a folder or a name under runs/. None: the newest run, or the newest pre-trained one."""
    if path is None:
        found = [p.parent for p in RUNS.glob("*/config.yaml") if ".old-" not in p.parent.name]
        if pretrained:
            found = [folder for folder in found if _is_pretrained(folder)]
        if not found:
            raise CheckpointError(
                f"there must be a {'pre-trained ' if pretrained else ''}run under {RUNS}/, but there is none; "
                f"train one with `python main.py`"
            )
        return RunDirectory(max(found, key=lambda p: max((c.stat().st_mtime for c in p.glob("step_*")), default=0.0)))
    for candidate in (path, RUNS / path):
        if (candidate / "config.yaml").is_file():
            return RunDirectory(candidate)
    names = ", ".join(sorted(str(p.parent) for p in RUNS.glob("*/config.yaml"))) or "none"
    raise CheckpointError(f"{path} must be the folder of a run, with a config.yaml, but is not; there are: {names}")


def _is_pretrained(folder: Path) -> bool:
    """Return whether a run was trained on documents. If its config cannot be read, warn and return False."""
    try:
        return not RunDirectory(folder).config().data.instructions
    except KindlingError as e:
        print(f"warning: {e}; {folder} is ignored", file=sys.stderr)
        return False


def require_checkpoint(run: RunDirectory) -> Path:
    """Return the folder of a run's newest whole checkpoint. Raises CheckpointError if there is none."""
    folder = run.newest()
    if folder is None:
        cfg = run.config()
        command = f"sft_train.py {cfg.train.init_from}" if cfg.data.instructions else "main.py"
        raise CheckpointError(
            f"{run.path} must have a checkpoint, but has none yet; "
            f"train on with `python {command} --preset {cfg.preset} --name {run.path.name}`"
        )
    return folder


def load_model(run: RunDirectory, device: torch.device, folder: Path | None = None) -> tuple[LanguageModel, Path]:
    """Return the model of a verified checkpoint, ready for inference, and its folder. Default: the newest whole one."""
    folder = folder or require_checkpoint(run)
    model = build_model(run.config().model)
    load_weights(folder, model)
    return model.to(device).eval(), folder

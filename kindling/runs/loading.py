"""Finds a run, by its folder, its name, or as the newest one, and loads its model.

run = find_run(Path("demo"))                    # or find_run(None): the newest run
model, checkpoint = load_model(run, device)

Only `load_model` imports torch.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from config import Config
from kindling.data.build import DATA
from kindling.data.examples import require_template
from kindling.data.jinja_chat import is_jinja
from kindling.data.shards import DataError, read_manifest
from kindling.errors import CheckpointError, KindlingError
from kindling.paths import newest_run, require_run, runs_by_age
from kindling.runs.checkpoint import RUNS, RunDirectory, load_weights, weights_sha256

if TYPE_CHECKING:
    import torch

    from model import LanguageModel


class PretrainedFolder(RunDirectory):
    """The folder of a model that others trained, in the place of a run. formats/hf_import.py reads one."""

    def read_weights(self) -> Mapping[str, torch.Tensor]:
        """Return the folder's weights. Raises KindlingError unless they fit its config."""
        raise NotImplementedError

    def load_weights(self, model: LanguageModel, weights: Mapping[str, torch.Tensor]) -> None:
        """Load what `read_weights` returned into a model of the folder's shape."""
        raise NotImplementedError

    def weights_sha256(self) -> str:
        """Return the hash of the folder's weights."""
        raise NotImplementedError

    def require_context(self, block_size: int) -> None:
        """Raise KindlingError unless the model can be trained with a context of so many tokens."""
        raise NotImplementedError


def sha256_of_weights(run: RunDirectory, folder: Path) -> str:
    """Return the hash of the weights of a run's verified checkpoint."""
    return run.weights_sha256() if isinstance(run, PretrainedFolder) else weights_sha256(folder)


def find_run(path: Path | None, pretrained: bool = False) -> RunDirectory:
    """Return the run at `path`, a folder or a name under runs/. None: the newest run, or the newest pre-trained one.

    A name is looked for in the working directory, then beside the scripts; the newest run only in the working directory.
    """
    if path is None:
        if not pretrained:
            return RunDirectory(newest_run())
        newest = next(filter(_is_pretrained, runs_by_age()), None)
        if newest is None:
            raise CheckpointError(
                f"there must be a pre-trained run under {RUNS.absolute()}/, but there is none; "
                f"name a run, or train one with `python main.py`"
            )
        return RunDirectory(newest)
    return RunDirectory(require_run(path))


def build_of_run(path: Path) -> tuple[Config, Path]:
    """Return the config of the run at `path`, and the data folder that it was trained on; say on stderr which it is.

    Raises KindlingError if there is no such run, or its data folder is gone.
    """
    run = find_run(path)
    name = read_manifest(run.data)["fingerprint"]
    places = [DATA / name, run.path.absolute().parent.parent / DATA / name]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        looked = " and ".join(dict.fromkeys(str(place.parent.absolute()) for place in places))
        raise DataError(
            f"{run.path} must be explained from the build that it was trained on, {name}, but that is gone (looked in "
            f"{looked}); copy it back, or leave out --run for a build of the same settings"
        )
    print(f"reading {found}, which {run.path} was trained on", file=sys.stderr)
    return run.config(), found


def _is_pretrained(folder: Path) -> bool:
    """Return whether a run was trained on documents. If its config cannot be read, warn and return False."""
    try:
        return not RunDirectory(folder).config().data.instructions
    except KindlingError as e:
        print(f"warning: {e}; {folder} is ignored", file=sys.stderr)
        return False


class Chat(NamedTuple):
    """How a run that was fine-tuned on instructions is asked."""

    template: str
    remembers: bool
    """It was fine-tuned on conversations of several exchanges."""


def chat_of(run: RunDirectory) -> Chat | None:
    """Return how a run is asked, or None for one that saw only documents. Raises DataError if the template has changed."""
    data = run.config().data
    if isinstance(run, PretrainedFolder):
        return Chat(data.template, True) if is_asked(run) else None
    if not data.instructions:
        return None
    manifest = read_manifest(run.data)
    require_template(manifest, data.template)
    return Chat(data.template, manifest["max_exchanges"] > 1)


def manifest_of(run: RunDirectory) -> dict[str, Any] | None:
    """Return what is known of a run's data; None for a model of others."""
    return None if isinstance(run, PretrainedFolder) else read_manifest(run.data)


def is_asked(run: RunDirectory) -> bool:
    """Return whether a run's model is asked in a template, as one that was fine-tuned on instructions."""
    data = run.config().data
    return is_jinja(data.template) if isinstance(run, PretrainedFolder) else data.instructions


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
    from model import build_model

    folder = folder or require_checkpoint(run)
    if isinstance(run, PretrainedFolder):
        weights = run.read_weights()  # first, as a wrong config may ask for a model that fits no memory
        model = build_model(run.config().model)
        run.load_weights(model, weights)
    else:
        model = build_model(run.config().model)
        load_weights(folder, model)
    return model.to(device).eval(), folder

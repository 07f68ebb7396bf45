"""Run directories: all that a later stage needs from a run, written so that nothing saved can be lost.

    runs/NAME/config.yaml  tokenizer.json  metrics.jsonl  metrics.csv  skipped.jsonl  tensorboard/
    runs/NAME/data/   (held-out shards, manifest)
    runs/NAME/step_001000/model.safetensors  state.pt  manifest.json
    runs/NAME/step_001000/sharded/  state.pt  manifest.json   (with --train.parallel fsdp; every rank writes its part)

A checkpoint is written to a temporary directory, synced to disk, and renamed: under its final name it is always whole. Its
manifest holds size and sha256 of each file, since neither torch.load nor safetensors notices a flipped byte. Loading
verifies these first, falls back to the checkpoint before with a warning, and never unpickles code.

torch is imported by the functions that need it, so a script can find a run and check its flags without waiting for torch.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import Config
from kindling.config_io import from_yaml, to_yaml
from kindling.data.examples import open_split
from kindling.data.shards import SplitInfo, TokenDataset, read_manifest
from kindling.distributed import SINGLE_PROCESS, MainRankFailed, World
from kindling.errors import CheckpointError, one_line
from kindling.files import (
    checksum_matches,
    locked,
    sha256_file,
    sha256_text,
    sync,
    with_checksum,
    write_atomic,
    write_json,
)
from kindling.paths import RUNS as RUNS
from kindling.tokenization.tokenizer import Tokenizer, load_json

if TYPE_CHECKING:
    import torch
    from torch import nn

WEIGHTS, STATE, MANIFEST = "model.safetensors", "state.pt", "manifest.json"
SHARDED = "sharded"  # the folder that holds weights and optimiser state of a run with `train.parallel` fsdp
SEAL = "# sha256 of the lines below: "  # the first line of a config.yaml


class RunDirectory:
    """One run's folder, and the checkpoints in it."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def data(self) -> Path:
        """The folder of the held-out shards, with the manifest of all data."""
        return self.path / "data"

    def create(self, cfg: Config, data_folder: Path) -> None:
        """Write config, tokenizer and held-out shards. Evaluation then needs nothing outside this folder.

        Raises CheckpointError if the folder cannot be written.
        """
        try:
            self.data.mkdir(parents=True, exist_ok=True)
            manifest = json.loads((data_folder / MANIFEST).read_text(encoding="utf-8"))
            for split in manifest["splits"].keys() - {"train"}:
                for name in SplitInfo(**manifest["splits"][split]).files:
                    shutil.copyfile(data_folder / name, self.data / name)
            shutil.copyfile(data_folder / "tokenizer.json", self.path / "tokenizer.json")
            shutil.copyfile(data_folder / "ledger.json", self.data / "ledger.json")
            write_json(self.data / MANIFEST, manifest)
            text = to_yaml(cfg)
            text = f"{SEAL}{sha256_text(text)}\n{text}"
            write_atomic(self.path / "config.yaml", text)  # last: a folder with a config is a run
        except OSError as e:
            raise CheckpointError(
                f"{self.path} must be writable, but writing failed: {e}; free some space or choose another --name"
            ) from None

    def exists(self) -> bool:
        """Return whether the run was started."""
        return (self.path / "config.yaml").is_file()

    def config(self) -> Config:
        """Return the config that the run was started with. Raises CheckpointError if the file has changed.

        An edited number may load without an error but give another model: weight shapes do not show `rope_theta`.
        """
        try:
            text = (self.path / "config.yaml").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise CheckpointError(
                f"{self.path} must be a run with a readable config.yaml, but is not ({e}); "
                f"train one with `python main.py`"
            ) from None
        first, _, rest = text.partition("\n")
        if first.startswith(SEAL) and first != SEAL + sha256_text(rest):
            raise CheckpointError(
                f"{self.path / 'config.yaml'} must be as it was written, but has changed; take the change back, "
                f"or delete the first line if it is meant"
            )
        return from_yaml(text, str(self.path / "config.yaml"))

    def tokenizer(self) -> Tokenizer:
        """Return the run's tokenizer. Raises CheckpointError if the file is missing or has changed."""
        path, manifest = self.path / "tokenizer.json", read_manifest(self.data)
        tokenizer = load_json(path, self.config().tokenizer) if path.is_file() else None
        if tokenizer is None or tokenizer.sha256 != manifest["tokenizer_sha256"]:
            raise CheckpointError(
                f"{path} must be the tokenizer that the run was trained with, but is {'another' if tokenizer else 'missing'}; "
                f"copy it back from data/{manifest['fingerprint']}"
            )
        return tokenizer

    def heldout(self, split: str) -> TokenDataset:
        """Open the run's validation or test split, verified."""
        return open_split(self.config(), self.data, split)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run's lock. Raises CheckpointError if another process is training the run."""
        busy = CheckpointError(
            f"{self.path} must be trained by one process at a time, but another one is training it; "
            f"wait for it, or choose another --name"
        )

        def unwritable(e: OSError) -> CheckpointError:
            return CheckpointError(
                f"{self.path.parent}/ must be a folder that can be written, but is not ({e}); run from another folder"
            )

        with locked(self.path.with_name(f".{self.path.name}.lock"), busy, unwritable):
            yield

    def keep_as_old(self) -> Path:
        """Rename the run to NAME.old-1, or the next free number, and return the new path. Nothing is deleted."""
        number = 1
        while (target := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        self.path.rename(target)
        return target

    def checkpoints(self) -> list[Path]:
        """Return the checkpoint folders, oldest first, not verified."""
        folders = (p for p in self.path.glob("step_*") if p.is_dir() and p.name.removeprefix("step_").isdigit())
        return sorted(folders, key=step_of)

    def save(self, step: int, model: nn.Module, state: dict[str, Any]) -> Path:
        """Write the checkpoint of `step` and return its folder. If this fails, the older checkpoints are unchanged.

        `state` must load with `weights_only=True`. Raises CheckpointError, for example if the disk is full.
        """
        from safetensors.torch import save_file

        with self._writing(step) as partial:
            self._begin(partial)
            # named_parameters lists a tied matrix once, and there are no persistent buffers
            save_file({k: p.detach().cpu().contiguous() for k, p in model.named_parameters()}, partial / WEIGHTS)
            sync(partial / WEIGHTS)
            return self._finish(partial, step, state)

    def save_sharded(
        self, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer], state: dict[str, Any], world: World
    ) -> Path:
        """Write the checkpoint of a model that may be sharded, as `save` does. Every rank must call it.

        `optimizers` are saved beside the weights, and need not be in `state`. Raises CheckpointError on every rank.
        """
        from kindling.runs import fsdp

        with self._writing(step, world) as partial:

            def begin() -> None:
                self._begin(partial)
                fsdp.begin_sharded(partial / SHARDED, model, optimizers)

            world.on_main(begin)
            fsdp.save_sharded(partial / SHARDED, model, optimizers)
            world.on_main(lambda: sync(partial / SHARDED))
            return world.on_main(lambda: self._finish(partial, step, state))

    @contextlib.contextmanager
    def _writing(self, step: int, world: World = SINGLE_PROCESS) -> Iterator[Path]:
        """Yield the folder to write the checkpoint of `step` to. Turn every failure into a CheckpointError."""
        from safetensors import SafetensorError

        partial = self.path / f".partial-step_{step:06d}"
        try:
            yield partial
        # a full disk can raise any of these
        except (OSError, RuntimeError, SafetensorError, CheckpointError, MainRankFailed) as e:
            if world.main:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of step {step} must fit on the disk of {self.path}, but writing it failed: "
                f"{one_line(e)}; free some space, the older checkpoints are untouched"
            ) from None

    def _begin(self, partial: Path) -> None:
        for remains in (*self.path.glob(".partial-step_*"), *self.path.glob(".deleted-step_*")):
            shutil.rmtree(remains, ignore_errors=True)  # left by a process that was killed
        partial.mkdir(parents=True)
        self._require_space()

    def _finish(self, partial: Path, step: int, state: dict[str, Any]) -> Path:
        """Write the training state and the manifest, and rename the folder: under its final name it is whole."""
        import torch

        torch.save(state, partial / STATE)
        sync(partial / STATE)
        files = {
            path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        }
        write_json(partial / MANIFEST, with_checksum({"step": step, "best": state.get("best"), "files": files}))
        sync(partial)
        final = self.path / f"step_{step:06d}"
        if final.exists():  # the same step again, after falling back to an older checkpoint
            shutil.rmtree(final)
        partial.rename(final)
        sync(self.path)
        return final

    def _require_space(self) -> None:
        newest = self.checkpoints()[-1:]  # a new run has none
        needed = int(1.5 * sum(f.stat().st_size for folder in newest for f in folder.rglob("*")))
        if (free := shutil.disk_usage(self.path).free) < needed:
            raise OSError(f"{free / 1e6:,.0f} MB are free and {needed / 1e6:,.0f} MB are needed")

    def copy_checkpoint(self, folder: Path, state: dict[str, Any]) -> Path:
        """Write a copy of another run's verified checkpoint, with the training state `state`. Raises CheckpointError."""
        with self._writing(step_of(folder)) as partial:
            self._begin(partial)
            shutil.copytree(folder, partial, ignore=shutil.ignore_patterns(STATE, MANIFEST), dirs_exist_ok=True)
            for path in partial.rglob("*"):
                sync(path)
            return self._finish(partial, step_of(folder), state)

    def prune(self, keep: int, best_step: int | None, newest_step: int, decay_step: int = 0) -> None:
        """Delete checkpoints up to `newest_step`, except the best, the newest `keep` and the newest up to `decay_step`."""
        steps = [step_of(folder) for folder in self.checkpoints()]
        kept = {best_step, max((step for step in steps if step <= decay_step), default=None)}
        for old in [f for f in self.checkpoints() if step_of(f) <= newest_step][:-keep]:  # later ones are damaged
            if step_of(old) not in kept:
                doomed = old.with_name(f".deleted-{old.name}")
                with contextlib.suppress(OSError):  # a folder that cannot be deleted stays, and costs only space
                    # before deleting: a kill in between must not leave half a checkpoint under its name
                    old.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def newest(self, before: int | None = None) -> Path | None:
        """Return the newest checkpoint whose files are unchanged, or None if there are no checkpoints.

        With `before`, only those of earlier steps count. Warns about each damaged one that is newer. Raises CheckpointError
        if all are damaged.
        """
        folders = [p for p in self.checkpoints() if before is None or step_of(p) < before]
        problems = []
        for folder in reversed(folders):
            try:
                verify(folder)
            except CheckpointError as e:
                problems.append(str(e))
                continue
            for problem in problems:
                print(f"warning: {problem}; falling back to {folder.name}", file=sys.stderr)
            return folder
        if folders:
            raise CheckpointError(
                f"{problems[0]}; no older checkpoint is whole either: start over with --fresh, which keeps this folder"
            )
        return None

    def abandon_from(self, step: int) -> None:
        """Rename the checkpoints of `step` and later steps, so that no run resumes them."""
        for later in self.checkpoints():
            if step_of(later) >= step:
                target = later.with_name(f"abandoned-{later.name}")
                shutil.rmtree(target, ignore_errors=True)
                later.rename(target)
                print(
                    f"note: {later.name} is of steps that are left out now, and is kept as {target.name}",
                    file=sys.stderr,
                )


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint, from the name of its folder."""
    return int(folder.name.removeprefix("step_"))


def verify(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest. Raises CheckpointError unless every file has the size and sha256 listed there."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected = {name: (f["bytes"], f["sha256"]) for name, f in manifest["files"].items()}
        found = {name: ((folder / name).stat().st_size, sha256_file(folder / name)) for name in expected}
        step = int(manifest["step"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(
            f"checkpoint {folder} must be whole, but cannot be read ({type(e).__name__}: {e})"
        ) from None
    if not checksum_matches(manifest):
        raise CheckpointError(f"checkpoint {folder} must be as it was written, but its {MANIFEST} has changed")
    weights = {WEIGHTS} if WEIGHTS in expected else {name for name in expected if name.startswith(f"{SHARDED}/")}
    if not weights or set(expected) != weights | {STATE} or f"step_{step:06d}" != folder.name:
        raise CheckpointError(f"checkpoint {folder} must have a manifest of its own files, but has another's")
    for name in expected:
        if expected[name] != found[name]:
            raise CheckpointError(f"checkpoint {folder} must be as it was written, but {name} has changed")
    return manifest


def weights_sha256(folder: Path) -> str:
    """Return the sha256 of a verified checkpoint's weights, from its manifest.

    Equal weights have equal hashes. That of a sharded checkpoint is the hash of its parts, so it depends on the number of ranks.
    """
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    if WEIGHTS in files:
        return files[WEIGHTS]["sha256"]
    parts = [files[name]["sha256"] for name in sorted(files) if name.startswith(f"{SHARDED}/")]
    return sha256_text("".join(parts))


def is_sharded_checkpoint(folder: Path) -> bool:
    """Return whether a checkpoint is sharded: weights and optimiser state in parts."""
    return (folder / SHARDED).is_dir()


def load_weights(folder: Path, model: nn.Module) -> None:
    """Load a verified checkpoint's weights into the model. Raises CheckpointError unless names and shapes match."""
    if is_sharded_checkpoint(folder):
        load_sharded_checkpoint(folder, model)
        return
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights, parameters = load_file(folder / WEIGHTS), dict(model.named_parameters())
    except (OSError, SafetensorError, ValueError, KeyError) as e:
        raise CheckpointError(
            f"{folder / WEIGHTS} must be a whole safetensors file, but is not ({one_line(e, 120)}); "
            f"delete {folder} to fall back to the checkpoint before, or start over with --fresh"
        ) from None
    if weights.keys() != parameters.keys():
        differing = sorted(weights.keys() ^ parameters.keys())
        raise CheckpointError(
            f"the weights of {folder} must be of the model's shape, but {differing[0]} is in only one of them; "
            f"use the run's own config.yaml"
        )
    with torch.no_grad():
        for name, p in parameters.items():
            if weights[name].shape != p.shape:
                raise CheckpointError(
                    f"the weights of {folder} must be of the model's shape, but {name} is {tuple(weights[name].shape)} "
                    f"and not {tuple(p.shape)}; use the run's own config.yaml"
                )
            p.copy_(weights[name])


def load_sharded_checkpoint(folder: Path, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
    """Load a verified sharded checkpoint into a model, sharded or not, and into its optimisers.

    Every rank of a sharded model must call it. Raises CheckpointError as `load_weights` does.
    """
    from kindling.runs import fsdp

    fsdp.load_sharded(folder / SHARDED, model, optimizers)


def load_state(folder: Path, mapped: bool = False) -> dict[str, Any]:
    """Return a verified checkpoint's training state, without executing any code in it.

    With `mapped`, tensors (twice the size of the weights) are read from the file only when they are used. Raises
    CheckpointError if the file cannot be loaded.
    """
    import torch

    try:
        return torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as e:
        raise CheckpointError(
            f"{folder / STATE} must hold tensors and plain values only, but does not ({one_line(e, 120)}); "
            f"delete {folder} to fall back to the checkpoint before, or start over with --fresh"
        ) from None

"""Paths that a person gave: expands `~`, and finds the folder of a run; imports no heavy library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kindling.errors import KindlingError

RUNS = Path("runs")
PROJECT = Path(__file__).resolve().parent.parent  # the folder of the scripts


def expand_home(path: Path | str, flag: str) -> Path:
    """Return a path with `~` or `~user` expanded; raises KindlingError if there is no such user. `flag` named it."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0]
        raise KindlingError(
            f"{flag} must begin with the home of a user, but {str(path)!r} begins with {user}, and there is no such user; "
            f"write the whole path"
        ) from None


def places_of_run(path: Path) -> Iterator[Path]:
    """Yield where a run may be: a folder, or a name under runs/; here, then beside the scripts."""
    for folder in (Path(), PROJECT):
        yield from (folder / path, folder / RUNS / path)
        if path.is_absolute() or Path().resolve() == PROJECT:
            return


def holds_hub_model(folder: Path) -> bool:
    """Return whether a folder has the layout of a model on the hub, and is not a run."""
    return (folder / "config.json").is_file() and not (folder / "config.yaml").is_file()


def require_run(path: Path) -> Path:
    """Return the folder of the run that a person named. Raises KindlingError, which says where it was looked for."""
    places = list(dict.fromkeys(places_of_run(path)))
    for place in places:
        if (place / "config.yaml").is_file():
            return place
    if any(map(holds_hub_model, places)):
        raise KindlingError(
            f"{path} must be a run that was trained here, but is a model of others; fine-tune it first with "
            f"`python sft_train.py {path}`"
        )
    if path.is_file():
        raise KindlingError(
            f"{path} must be the folder of a run or of a model, but is a file; name the folder that it is in, with all its files"
        )
    folders = dict.fromkeys(place.parent for place in places if place.parent.name == RUNS.name)
    known = sorted(str(found.parent) for folder in folders for found in folder.glob("*/config.yaml"))
    raise KindlingError(
        f"{path} must be the folder of a run, with a config.yaml, or of a model with a config.json, but is neither; looked in "
        f"{', '.join(str(place.absolute()) for place in places)}; there are: {', '.join(known) or 'none'}"
    )


def runs_by_age() -> list[Path]:
    """Return the folders of the runs under runs/, the one with the newest checkpoint first."""
    found = [p.parent for p in RUNS.glob("*/config.yaml") if ".old-" not in p.parent.name]
    return sorted(found, key=lambda p: max((c.stat().st_mtime for c in p.glob("step_*")), default=0.0), reverse=True)


def newest_run() -> Path:
    """Return the folder of the newest run. Raises KindlingError if there is none."""
    if not (found := runs_by_age()):
        raise KindlingError(
            f"there must be a run under {RUNS.absolute()}/, but there is none; name a run, or train one with `python main.py`"
        )
    return found[0]


def require_runs(*paths: Path | None) -> None:
    """Raise KindlingError unless each run that a person named exists; scripts ask this before they import torch.

    A folder of a model in the Hugging Face layout will do as well.
    """
    for path in paths:
        if path is not None and not any(map(holds_hub_model, places_of_run(path))):
            require_run(path)

"""Finds an export to int8 by the name that a person gave."""

from __future__ import annotations

from pathlib import Path

from kindling.int8.model import CONFIG, CompletionError
from kindling.paths import PROJECT, expand_home, places_of_run


def find_export(folder: Path) -> Path:
    """Return the export's folder: `folder` itself, or the one in a run. Raises CompletionError if there is none."""
    folder = expand_home(folder, "DIR")
    places = [folder, *(place / "export" / "int8" for place in places_of_run(folder)), PROJECT / folder]
    found = next((path for path in places if (path / CONFIG).is_file()), folder)
    if not found.is_dir():
        looked = ", ".join(dict.fromkeys(str(place.absolute()) for place in places))
        raise CompletionError(
            f"DIR must be an export to int8, or a run that has one, but {folder} is not; looked in {looked}; "
            f"export a run with `python export.py RUN --to int8`"
        )
    return found

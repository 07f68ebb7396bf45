"""Expands `~` in a path that a person gave; imports no heavy library."""

from __future__ import annotations

from pathlib import Path

from kindling.errors import KindlingError


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

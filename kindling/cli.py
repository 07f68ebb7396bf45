"""The command line of every script: flags from a dataclass, and errors in one line.

A script defines a dataclass of its flags, calls `parse_cli` with it, and ends with `run_script(main)`. Heavy libraries are
imported where they are used, so `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import io
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import tyro

from kindling.errors import KindlingError, one_line

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Flags = TypeVar("Flags", bound="DataclassInstance")


def parse_cli(
    flags: type[Flags], description: str, argv: list[str] | None = None, default_preset: str | None = None
) -> Flags:
    """Parse the command line into `flags`, the dataclass of a script's flags.

    If it has a field `config: ConfigFlags`, every field of the config is a flag, `--section.field value`. Its defaults come
    from the preset that `--preset` names, else from `default_preset` or `config.RUN`. A typo exits with code 2 and shows
    similar flags.
    """
    argv = sys.argv[1:] if argv is None else argv
    if any(f.name == "config" for f in dataclasses.fields(flags)):
        from kindling.config_io import preset_from_argv, with_present_flags

        argv = with_present_flags(argv)
        made_with: Callable[..., Flags] = flags
        default = made_with(config=preset_from_argv(argv, default_preset))
    else:
        default = flags()
    return tyro.cli(flags, default=default, args=argv, description=description.strip())


def utf8(argument: str, flag: str) -> str:
    """Return a text of the command line, read as UTF-8 in any locale; raises KindlingError if it is not UTF-8."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        raise KindlingError(f"{flag} must be a text in UTF-8, but {argument[:40]!r} is not; convert it") from None


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit. An error that the user can fix is one line and exit code 1, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character shows an escape
    try:
        sys.exit(main() or 0)
    except KindlingError as e:
        rank = os.environ.get("RANK", "0")  # under torchrun; most often all ranks fail for the same reason
        print(f"error: {e}" if rank == "0" else f"error on rank {rank}: {e}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as e:  # torch's errors for a lack of memory, which this file must not import
        if "out of memory" not in str(e).lower():
            raise
        print(
            "error: the model and what it works on must fit into the memory of the device, but do not "
            f"({one_line(e, 120)}); use a smaller batch, --train.precision bf16, or --device cpu",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the program that reads our output, such as `head`, has ended
        sys.stderr.close()
        sys.exit(1)
    except OSError as e:  # that no code closer to it has explained
        where = e.filename or "a file"
        print(
            f"error: {where} must be accessible, but is not ({e.strerror}); see to permissions and space",
            file=sys.stderr,
        )
        sys.exit(1)

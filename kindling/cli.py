"""The command line of every script: flags from a dataclass, and errors in one line.

A script defines a dataclass of its flags, calls `parse_cli` with it, and ends with `run_script(main)`. Heavy libraries are
imported where they are used, so `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from kindling import help
from kindling.errors import KindlingError, says_out_of_memory
from kindling.openmp import limit_spinning
from kindling.output import silent_if_reader_ends
from kindling.paths import expand_home

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PATHS = ("path", "init_from", "extend", "decontaminate", "humaneval", "mbpp")  # settings that can name a file or folder
Flags = TypeVar("Flags", bound="DataclassInstance")


def names_flag(argv: list[str] | None, flag: str) -> bool:
    """Return whether a command line gives a flag; None is that of the process."""
    return any(word.partition("=")[0] == flag for word in (sys.argv[1:] if argv is None else argv))


def parse_cli(
    flags: type[Flags],
    description: str,
    argv: list[str] | None = None,
    default_preset: str | None = None,
    default: Flags | None = None,
) -> Flags:
    """Parse the command line into `flags`, the dataclass of a script's flags.

    If it has a field `config: ConfigFlags`, every field of the config is a flag, `--section.field value`. Its defaults come
    from the file that `--config` names, over the preset that `--preset` names, else the file, else `default_preset` or
    `config.RUN`. Those of a script without a config come from `default`, if it is given. A typo exits with code 2 and shows
    similar flags.
    """
    argv = sys.argv[1:] if argv is None else argv
    takes_config = any(f.name == "config" for f in dataclasses.fields(flags))
    if takes_config:
        from kindling.config_io import config_from_argv

        made_with: Callable[..., Flags] = flags
        config, argv = config_from_argv(argv, default_preset)
        default = made_with(config=config)
    elif default is None:
        default = flags()
    known = list(help.flags_of(flags, default))
    if {"-h", help.HELP, help.HELP_ALL} & set(argv):
        print(help.help_text(program(), description.strip(), known, takes_config, help.HELP_ALL in argv))
        raise SystemExit(0)
    if error := help.unknown_flag(argv, known, takes_config) or help.wrong_value(argv, known):
        if os.environ.get("RANK", "0") == "0":  # under torchrun, all ranks have the same command line
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2)
    _require_utf8_settings(argv)
    if os.environ.get("NO_COLOR"):
        tyro._experimental_options["ansi_codes"] = False
    return with_home(tyro.cli(flags, default=default, args=argv))


def program() -> str:
    """Return how the running script is called in a command."""
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    return f"python -m {module.name}" if module is not None else f"python {Path(sys.argv[0]).name}"


def _require_utf8_settings(argv: list[str]) -> None:
    """Raise KindlingError for a setting that is not UTF-8: it could not be saved with the run."""
    for before, argument in zip(["", *argv], argv):
        flag, _, value = argument.partition("=") if argument.startswith("--") else (before, "", argument)
        if re.match(r"--\w+\.", flag) and re.search("[\ud800-\udfff]", value):
            raise KindlingError(
                f"{flag} must be a name in UTF-8, but {value!a} is not; rename it, or make a link to it (ln -s) and name "
                f"the link"
            )


def with_home(flags: Flags) -> Flags:
    """Return the flags with `~` expanded in paths: a shell leaves it as it is in `--out=~/x`.

    A config keeps its paths as they were given, and they are expanded where they are used. Raises KindlingError if a path
    names a user that does not exist.
    """

    def name_of(flag: str) -> str:
        return "--" + flag.removeprefix("config.").replace("_", "-")

    def expanded(value: Any, flag: str) -> Any:
        if isinstance(value, Path):
            return expand_home(value, name_of(flag))
        if isinstance(value, str) and flag.rpartition(".")[2] in PATHS:
            expand_home(value, name_of(flag))  # only raises its error
        if isinstance(value, tuple):
            return tuple(
                expanded(item, flag if isinstance(item, str) else f"{flag}.{i}") for i, item in enumerate(value)
            )
        if not dataclasses.is_dataclass(value) or isinstance(value, type):
            return value
        parts = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        new = {name: expanded(part, f"{flag}.{name}".lstrip(".")) for name, part in parts.items()}
        new = {name: part for name, part in new.items() if part is not parts[name] and part != parts[name]}
        return dataclasses.replace(value, **new) if new else value

    out: Flags = expanded(flags, "")
    return out


def utf8(argument: str, flag: str) -> str:
    """Return a text of the command line, read as UTF-8 in any locale; raises KindlingError if it is not UTF-8."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        raise KindlingError(f"{flag} must be a text in UTF-8, but {argument[:40]!r} is not; convert it") from None


@silent_if_reader_ends()
def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit. An error that the user can fix is one line and exit code 1, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character shows an escape
    limit_spinning()  # before `main` loads torch
    try:
        sys.exit(main() or 0)
    except KindlingError as e:
        rank = os.environ.get("RANK", "0")  # under torchrun; most often all ranks fail for the same reason
        print(f"error: {e}" if rank == "0" else f"error on rank {rank}: {e}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as e:
        if not says_out_of_memory(e):
            raise
        from kindling.device import describe_out_of_memory

        print(f"error: {describe_out_of_memory(e)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        raise  # to silent_if_reader_ends
    except OSError as e:  # that no code closer to it has explained
        where = e.filename or "a file"
        print(
            f"error: {where} must be accessible, but is not ({e.strerror}); see to permissions and space",
            file=sys.stderr,
        )
        sys.exit(1)

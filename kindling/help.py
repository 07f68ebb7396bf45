"""The flags that a dataclass gives, and the texts of --help and --help-all; imports no heavy library.

Each field is a flag, and the string under the field is its text, as for tyro. --help shows the script's own flags and the
settings of COMMON on one screen; --help-all shows every flag with its whole text. No line is wider than the terminal.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import re
import shutil
import textwrap
import types
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

LINES = 40  # of a screen
INDENT = "  "
HELP, HELP_ALL, CONFIG = "--help", "--help-all", "--config"

# the settings that people change, besides the script's own flags; the others are in --help-all
COMMON = (
    *("data.sources.0.kind", "data.sources.0.path", "data.max-tokens"),
    *("train.max-steps", "train.max-minutes", "train.batch-size", "train.lr", "train.seed", "train.device"),
    *("train.eval-every", "train.save-every"),
    *("eval.full", "eval.benchmarks", "eval.limit", "eval.temperature", "eval.max-new-tokens", "eval.workers"),
)
SHAPE = ("model.block-size", "model.vocab-size", "model.n-layer", "model.n-head", "model.n-embd")
PRE_TRAINING = (*SHAPE, "tokenizer.kind", "train.init-from", "train.sample-every")
FINE_TUNING = ("data.template", "train.epochs")


class Flag(NamedTuple):
    """One flag, or one positional argument."""

    name: str
    """`train.max-steps`, without the dashes."""
    kind: str
    """What its value is, such as INT; empty for a flag without a value."""
    text: str
    default: Any
    section: tuple[str, str]
    """The name and the text of its section; of a script's own flags, empty."""
    positional: bool = False

    @property
    def spelling(self) -> str:
        """The flag as it is written, without a value."""
        return self.name.upper() if self.positional else f"--{self.name}"


def flags_of(cls: Any, default: Any, prefix: str = "", on_off: bool = True, text: str = "") -> Iterator[Flag]:
    """Yield the flags of a dataclass, by the rules of tyro; `default` is an instance. `on_off`: booleans take no value."""
    import tyro

    hints, texts = get_type_hints(cls, include_extras=True), field_texts(cls)
    nested: list[tuple[Any, Any, str, bool, str]] = []
    for field in dataclasses.fields(cls):
        hint, marks = hints[field.name], list[Any]()
        if get_origin(hint) is Annotated:
            hint, *marks = get_args(hint)
        value, name = getattr(default, field.name), prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(hint) or hasattr(hint, "_fields"):
            whole = field.name == "config" or tyro.conf.OmitArgPrefixes in marks
            inner = prefix if whole else f"{name}."
            nested.append((hint, value, inner, on_off and field.name != "config", texts.get(field.name, "")))
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            said = texts.get(field.name, "")
            nested += [(type(item), item, f"{name}.{i}.", on_off, said) for i, item in enumerate(value)]
        else:
            kind = "" if hint is bool and on_off else kind_of(hint)
            section = (prefix.removesuffix("."), text if prefix else "")
            yield Flag(name, kind, texts.get(field.name, ""), value, section, tyro.conf.Positional in marks)
    for hint, value, inner, converted, said in nested:
        yield from flags_of(hint, value, inner, converted, said)


@cache
def field_texts(cls: Any) -> dict[str, str]:
    """Return the string under each field of a class, in one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, below in zip(body.body, body.body[1:]):
        said = below.value if isinstance(below, ast.Expr) else None
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(said, ast.Constant):
            found[field.target.id] = " ".join(str(said.value).split())
    return found


def kind_of(hint: Any) -> str:
    """Return what a value of a type is called: INT, PATH, {a,b}, INT|None, or STR ... for several."""
    if get_origin(hint) is Annotated:
        return kind_of(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return "{" + ",".join(map(str, get_args(hint))) + "}"
    if get_origin(hint) is tuple:
        return f"{kind_of(get_args(hint)[0])} ..."
    if get_origin(hint) in (Union, types.UnionType):
        return "|".join(map(kind_of, get_args(hint)))
    plain = {int: "INT", float: "FLOAT", str: "STR", bool: "{True,False}", Path: "PATH", type(None): "None"}
    return plain.get(hint, "STR ...")  # a field with a parser of its own


def help_text(prog: str, description: str, flags: list[Flag], takes_config: bool, all_flags: bool) -> str:
    """Return the text of --help, or with `all_flags` that of --help-all, as wide as the terminal."""
    width = max(40, shutil.get_terminal_size((80, LINES)).columns)
    arguments = "".join(f" [{f.spelling}]" for f in flags if f.positional)
    ways = [Flag("help", "", "Show this, then stop.", None, ("", ""))]
    ways += [Flag("help-all", "", "Show every flag with its whole text, then stop.", None, ("", ""))]
    if takes_config:
        said = "YAML with settings, such as a run's config.yaml or a part of one. Flags go over it."
        ways.append(Flag("config", "FILE", said, None, ("", "")))
    flags = [*flags[: (n := sum(f.positional for f in flags))], *ways, *flags[n:]]
    usage = [*textwrap.wrap(f"usage: {prog}{arguments} [flags]", width, subsequent_indent=INDENT), ""]
    if all_flags:
        return "\n".join([*usage, *wrapped(description, width), *_sections(flags, width)])
    summary = wrapped("\n\n".join(description.split("\n\n")[:2]), width)
    instructed = any(f.name == "data.sources.0.kind" and f.default == "docstrings" for f in flags)
    common = {*COMMON, *(FINE_TUNING if instructed else PRE_TRAINING)}
    if not any(f.name == "fresh" for f in flags):  # a script that does not train
        common = {name for name in common if not name.startswith("train.")}
    shown = [f for f in flags if not f.section[0] or f.name in common]
    left = len(flags) - len(shown)
    end = ["", f"{left} more settings are in {HELP_ALL}."] if left else []
    for most in (3, 2, 1):
        lines = [*usage, *summary, "", *_table(shown, width, most), *end]
        if len(lines) <= LINES:
            break
    examples_end = len(usage) + len(summary)  # the last examples make room for flags
    del lines[max(len(usage), examples_end - max(0, len(lines) - LINES)) : examples_end]
    return "\n".join(lines)


def _table(flags: list[Flag], width: int, most: int) -> list[str]:
    """Return a flag a row: its name, and at most `most` lines of its first sentence and default."""
    names = [f"{INDENT}{f.spelling} {short_kind(f)}".rstrip() for f in flags]
    column = min(max(map(len, names)), width // 2) + len(INDENT)
    lines = []
    for name, flag in zip(names, flags):
        rows = _summary(flag, width - column, most)
        if len(name) > column - len(INDENT):
            lines.append(name[:width])
            name = ""
        lines += [f"{before:<{column}}{row}".rstrip() for before, row in zip([name, *[""] * most], rows)]
    return lines


def _summary(flag: Flag, width: int, most: int) -> list[str]:
    """Return the choices of a flag, or the first sentence of its text, and its default, in at most `most` lines."""
    choices = flag.kind.replace("|None", "")[1:-1].split(",") if flag.kind.startswith("{") else []
    text = ", ".join(choices) if len(choices) > 2 else re.split(r"(?<=[.;]) ", flag.text)[0].rstrip(";.")
    value = "" if flag.default in (None, False, ()) else f"[{said(flag.default)}]"
    rows = textwrap.wrap(f"{text} {value}", width, break_on_hyphens=False)
    if len(rows) > most:  # shorten the text, and keep the default
        value = "" if len(value) > width // 2 else value
        rows = textwrap.wrap(text, width, break_on_hyphens=False)[:most]
        room = width - len(value) - (1 if value else 0)
        last = textwrap.shorten(f"{rows[-1]} {'x' * width}", room, placeholder=" ...")
        rows[-1] = f"{last} {value}".rstrip()
    return rows or [""]


def short_kind(flag: Flag) -> str:
    """Return the kind of a value in one word: of a choice with many values, the last part of the flag's name."""
    kind = flag.kind.replace("|None", "")
    return kind if len(kind) <= 12 or flag.positional else flag.name.rpartition(".")[2].rpartition("-")[2].upper()


def _sections(flags: list[Flag], width: int) -> list[str]:
    """Return every flag with its whole text and its default, by sections."""
    lines: list[str] = []
    section = None
    for flag in flags:
        if flag.section != section:
            section = flag.section
            lines += ["", f"{section[0]}:" if section[0] else "flags:"]
            lines += textwrap.wrap(section[1], width, initial_indent=INDENT, subsequent_indent=INDENT)
        head = f"{INDENT}{flag.spelling}" if flag.positional else f"{INDENT}{flag.spelling} {flag.kind}"
        for part in textwrap.wrap(head, width, subsequent_indent=3 * INDENT, break_on_hyphens=False):
            lines.append(part)
        text = flag.text + (
            f" (default: {said(flag.default)})" if flag.name not in ("help", "help-all", "config") else ""
        )
        lines += textwrap.wrap(
            text, width, initial_indent=3 * INDENT, subsequent_indent=3 * INDENT, break_on_hyphens=False
        )
    return lines


def said(value: Any) -> str:
    """Return a value as it is written after its flag."""
    if isinstance(value, tuple):
        return " ".join(map(said, value)) or "none"
    return str(value) if str(value).isprintable() and str(value) else repr(str(value))


def wrapped(text: str, width: int) -> list[str]:
    """Return a module's text in lines of at most `width`: paragraphs are filled, indented commands are kept."""
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        lines += [""] if lines else []
        if not paragraph.startswith((" ", "- ")):
            lines += textwrap.wrap(" ".join(paragraph.split()), width)
            continue
        for line in paragraph.splitlines():
            indent = line[: len(line) - len(line.lstrip())]
            command, hash_, comment = (part.strip() for part in line.partition(" # "))
            if len(line) > width and hash_:
                line = f"{indent}{command}  # {comment}"
            if len(line) > width and hash_:
                lines += textwrap.wrap(comment, width, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
                line = indent + command
            if len(line) > width:
                parts = textwrap.wrap(command, width - len(indent) - 4, break_on_hyphens=False)
                lines += [indent + " \\\n".join([parts[0], *(f"{indent}  {part}" for part in parts[1:])])]
            else:
                lines.append(line.rstrip())
    return [part for line in lines for part in line.split("\n")]


def similar_flags(word: str, names: Iterable[str]) -> list[str]:
    """Return the flags that are most like a word that is none: the same name in a section, then similar names."""
    names, bare = list(names), word.lstrip("-")
    found = [name for name in names if name.rpartition(".")[2] == bare]
    found += difflib.get_close_matches(bare, names, n=3, cutoff=0.6)
    if not found:
        last = {name.rpartition(".")[2]: name for name in names}
        found = [last[part] for part in difflib.get_close_matches(bare.rpartition(".")[2], last, n=3, cutoff=0.6)]
    return [f"--{name}" for name in dict.fromkeys(found)][:3]


def unknown_flag(argv: list[str], known: list[Flag], takes_config: bool = False) -> str | None:
    """Return the error about the first flag of a command line that does not exist, or None."""
    names = [f.name for f in known if not f.positional] + ["config"] * takes_config
    return next(filter(None, (unknown_word(word, names) for word in argv if word.startswith("--"))), None)


def unknown_word(word: str, names: list[str]) -> str | None:
    """Return the error about a word that looks like a flag, unless it is one of `names`, or its opposite."""
    flag = word.partition("=")[0]
    name = flag.removeprefix("--").replace("_", "-")
    opposite = re.sub(r"(^|\.)no-", r"\1", name)
    if not name or name in names or opposite in names or flag in (HELP, HELP_ALL):
        return None
    near = similar_flags(flag, [*names, HELP.strip("-"), HELP_ALL.strip("-")])
    return f"there is no flag {flag}; " + (f"did you mean {' or '.join(near)}?" if near else f"see {HELP_ALL}")


def wrong_value(argv: list[str], known: list[Flag]) -> str | None:
    """Return the error about the first value of a command line that its flag cannot take, or about a word that is no value."""
    by_name = {f.name: f for f in known if not f.positional}
    places = sum(math.inf if "..." in f.kind else 1 for f in known if f.positional)
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        flag = by_name.get(name.replace("_", "-")) if word.startswith("--") else None
        values = [value] if equals else []
        if flag is None:
            if word.startswith("--"):  # such as --no-fresh; what does not exist is found by `unknown_flag`
                continue
            places -= 1
            if places < 0:
                return f"there is no place for {word!r}; give values after their flags, see {HELP}"
            continue
        many = "..." in flag.kind
        while flag.kind and not equals and words and not words[0].startswith("--") and (many or not values):
            values.append(words.pop(0))
        if error := _value_error(flag, values):
            return error
    return None


def _value_error(flag: Flag, values: list[str]) -> str | None:
    """Return the error about the values that a flag was given, or None."""
    if not flag.kind:
        return f"{flag.spelling} takes no value, but was given {values[0]!r}; write {flag.spelling}" if values else None
    if not values and "..." not in flag.kind:
        return (
            f"{flag.spelling} must have a value, but has none; write {flag.spelling}={flag.kind.removesuffix('|None')}"
        )
    kinds = flag.kind.removesuffix("|None").removesuffix(" ...")
    for value in values:
        if value == "None" and flag.kind.endswith("|None"):
            continue
        if kinds in ("INT", "FLOAT"):
            try:
                int(value) if kinds == "INT" else float(value)
            except ValueError:
                must = "a whole number" if kinds == "INT" else "a number"
                return f"{flag.spelling} must be {must}, but is {value!r}; write {flag.spelling} {said(flag.default)}"
        elif kinds.startswith("{") and value not in (choices := kinds[1:-1].split(",")):
            near = difflib.get_close_matches(value, choices, n=1)
            return f"{flag.spelling} must be one of {', '.join(choices)}, but is {value!r}; " + (
                f"did you mean {near[0]}?" if near else "choose one"
            )
    return None

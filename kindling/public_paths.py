"""Takes the paths that a config names, and the home folder, out of what is written for others: cards, reports, comparisons.

    public = PublicPaths(cfg)
    text = to_yaml(Config(**public(asdict(cfg))))

A path keeps its last part. A relative path that stays below the working directory says nothing about the machine and is kept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from config import Config, SourceConfig, TokenizerConfig
from kindling.errors import KindlingError
from kindling.paths import expand_home
from kindling.tables import Section

PATHS = ("path", "init_from", "extend", "decontaminate")  # settings that may hold a path of this machine


class PublicPaths:
    """Replaces the paths of this machine that a config names by their last part, in any value."""

    def __init__(self, cfg: Config):
        sections: tuple[Any, ...] = (*cfg.data.sources, cfg.data, cfg.train, cfg.tokenizer)
        settings = [asdict(section) for section in sections]
        values = [v for s in settings for key in PATHS for v in _listed(s.get(key)) if is_private(v)]
        found = {spelling: public_path(v) for v in values for spelling in _spellings(v)}
        if len(_expanded("~").parts) > 1:
            found |= {f"{_expanded('~')}/": "~/"}  # whatever else is below it, such as in the text of an error
        ordered = sorted(found.items(), key=lambda pair: len(pair[0]), reverse=True)
        self._whole = {path: name for path, name in ordered if not Path(path).name.strip(".~")}  # "..", "~" and "/"
        self._inside = [(_pattern(path), name) for path, name in ordered if path not in self._whole]

    def __call__(self, value: Any) -> Any:
        """Return `value` with the paths shortened."""
        if isinstance(value, str):
            for pattern, name in self._inside:
                value = pattern.sub(name.replace("\\", r"\\"), value)
            return self._whole.get(value, value)
        if isinstance(value, Section):
            return Section(**self(vars(value)))
        if isinstance(value, dict):
            named: dict[Any, Any] = {}
            for key, item in value.items():
                name, number = self(key), 2
                while name in named:  # two paths with one last part
                    name, number = f"{self(key)} ({number})", number + 1
                named[name] = self(item)
            return named
        return type(value)(self(item) for item in value) if isinstance(value, (list, tuple)) else value


def _pattern(path: str) -> re.Pattern[str]:
    """Return a pattern for a path in a text, but not for a part of a longer name."""
    after = "" if path.endswith("/") else r"(?!\.?[\w-])"
    return re.compile(rf"(?<![\w./~-]){re.escape(path)}{after}")


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _spellings(path: str) -> list[str]:
    """Return a path as it was given, and as errors and logs show it."""
    whole = _expanded(path)
    return [path, *(str(p) for p in (whole, whole.resolve()) if p.is_absolute() and len(p.parts) > 1)]


def _expanded(path: str) -> Path:
    try:
        return expand_home(path, "a path")
    except KindlingError:  # a user of another machine
        return Path(path)


def is_private(path: str) -> bool:
    """Return whether a path says something about this machine: absolute, in a home, or out of the working directory."""
    return path.startswith("~") or Path(path).is_absolute() or ".." in Path(path).parts


def public_path(path: str | Path) -> str:
    """Return a path as others may see it: whole if it is below the working directory, else its last part."""
    if not is_private(str(path)):
        return str(path)
    name = Path(path).name
    return name if name not in ("", "..") else _expanded(str(path)).resolve().name or "folder"


def public_names(paths: Sequence[Path]) -> list[str]:
    """Return several paths as others may see them; two that end alike get the folder before."""
    names = [public_path(path) for path in paths]
    return [
        f"{path.resolve().parent.name}/{name}" if names.count(name) > 1 else name for path, name in zip(paths, names)
    ]


def is_on_hub(source: SourceConfig) -> bool:
    """Return whether a source is a data set of the hub, and not a folder laid out like one."""
    path = source.path or ""
    return source.kind == "datasets" and path[:1] not in ("", ".", "/", "~") and not Path(path).is_dir()


def is_hub_tokenizer(cfg: TokenizerConfig) -> bool:
    """Return whether a tokenizer has a name on the hub, and is no file or folder."""
    path = expand_home(cfg.path or "", "tokenizer.path")
    return cfg.kind == "pretrained" and not (path.exists() or path.suffix == ".json" or path.is_absolute())

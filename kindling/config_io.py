"""Configs as YAML and as flags, and the differences between two configs."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, get_type_hints

import tyro
from pydantic import ValidationError

from config import RUN, Config, SourceConfig
from kindling.errors import ConfigError, did_you_mean
from presets import preset

# a Config as flags without a prefix; booleans are given as `--model.bias False`
ConfigFlags = Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]

# settings that have another name now. The old ones stand in runs of earlier versions, and in exports, whose format stays
OLD_NAMES = {"bigram_rows": "pair_rows", "stopping_strategy": "when_dry", "decay_fraction": "decay_share"}
PRESENT_NAMES = {old: name for name, old in OLD_NAMES.items()}


def by_old_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings under the names that exports and fingerprints have."""
    return {OLD_NAMES.get(name, name): value for name, value in settings.items()}


def by_present_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings that may have old names under their present ones."""
    if twice := [name for name, old in OLD_NAMES.items() if name in settings and old in settings]:
        raise ConfigError(
            f"{twice[0]} must be set once, but is also set as {OLD_NAMES[twice[0]]}; delete one of the two"
        )
    return {PRESENT_NAMES.get(name, name): value for name, value in settings.items()}


def with_present_flags(argv: list[str]) -> list[str]:
    """Return a command line in which settings have their present names, so that a command of an earlier version works."""
    present = {old.replace("_", "-"): name.replace("_", "-") for old, name in PRESENT_NAMES.items()}
    out = []
    for word in argv:
        flag, equals, value = word.partition("=")
        section, dot, setting = flag.partition(".")
        setting = present.get(setting.replace("_", "-"), setting) if section.startswith("--") else setting
        out.append(section + dot + setting + equals + value)
    return out


def to_yaml(cfg: Config) -> str:
    """Return `cfg` as YAML, with every field in the order of its class."""
    import yaml

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return yaml.safe_dump(plain(dataclasses.asdict(cfg)), sort_keys=False)


def from_yaml(text: str, where: str = "config") -> Config:
    """Return the config in a text of `to_yaml`; raises ConfigError, which names each unknown key or impossible value."""
    import yaml

    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ConfigError(f"{where} must be YAML, but is not ({' '.join(str(e).split())}); correct it") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must be a YAML mapping of sections, but is {type(data).__name__}; correct it")
    try:
        sections: dict[str, Any] = {
            name: by_present_names(section) if isinstance(section, dict) else section for name, section in data.items()
        }
        return Config(**sections)
    except ConfigError as e:
        raise ConfigError(f"{where}: {e}") from None
    except (ValidationError, TypeError) as e:
        raise ConfigError(f"{where}: {_one_line(e)}") from None


def _one_line(error: ValidationError | TypeError) -> str:
    """Return pydantic's findings in one line: the place of each, and for an unknown key the most similar ones."""
    if isinstance(error, TypeError):
        return str(error)
    parts = []
    for item in error.errors():
        *section, key = [str(place) for place in item["loc"]]
        place = ".".join([*section, key])
        if item["type"] == "unexpected_keyword_argument":
            cls = SourceConfig if "sources" in section else get_type_hints(Config)[section[0]] if section else Config
            parts.append(f"{place} is no setting; {did_you_mean(key, [f.name for f in dataclasses.fields(cls)])}")
        else:
            parts.append(f"{place}: {item['msg'][0].lower()}{item['msg'][1:]}, but is {item['input']!r}")
    return "; ".join(parts)


def changed_fields(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Return {"section.field": (old, new)} for every field in which two configs differ."""

    def flat(cfg: Any, prefix: str = "") -> dict[str, Any]:
        out: dict[str, Any] = {}
        for f in dataclasses.fields(cfg):
            value = getattr(cfg, f.name)
            if dataclasses.is_dataclass(value):
                out |= flat(value, f"{prefix}{f.name}.")
            elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
                for i, item in enumerate(value):
                    out |= flat(item, f"{prefix}{f.name}.{i}.")
            else:
                out[prefix + f.name] = value
        return out

    a, b = flat(old), flat(new)
    return {k: (a.get(k), b.get(k)) for k in a | b if a.get(k) != b.get(k)}


def preset_from_argv(argv: list[str], name: str | None = None) -> Config:
    """Return the preset that `--preset NAME` names, else the preset `name`, else `RUN`; tyro parses the other arguments."""
    for i, arg in enumerate(argv):
        if arg == "--preset" and i + 1 < len(argv):
            name = argv[i + 1]
        elif arg.startswith("--preset="):
            name = arg.removeprefix("--preset=")
    return preset(name or RUN)

"""Configs as YAML and as flags, and the differences between two configs."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, get_type_hints

import tyro
from pydantic import ValidationError

from config import RUN, Config, SourceConfig
from kindling.errors import ConfigError, did_you_mean
from kindling.paths import expand_home, require_run
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


def from_yaml(text: str, where: str = "config", over: Config | None = None) -> Config:
    """Return the config in a text of `to_yaml`, or a part of one over the settings of `over`.

    Raises ConfigError, which names each unknown key or impossible value. A list, such as the sources, is replaced as a whole.
    """
    settings = _settings_of(text, where)
    if over is not None:
        whole = dataclasses.asdict(over)
        settings = whole | {
            name: whole[name] | section if isinstance(section, dict) and isinstance(whole.get(name), dict) else section
            for name, section in settings.items()
        }
    try:
        return Config(**settings)
    except ConfigError as e:
        raise ConfigError(f"{where}: {e}") from None
    except (ValidationError, TypeError) as e:
        raise ConfigError(f"{where}: {_one_line(e)}") from None


def _settings_of(text: str, where: str) -> dict[str, Any]:
    """Return the sections of a YAML text, with the present names of their settings."""
    import yaml

    fast: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C takes a tenth of the time

    class Loader(fast):
        """YAML 1.2's booleans: `compile: off` is a word, as in a flag."""

    boolean = "tag:yaml.org,2002:bool"
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag != boolean or first in "tTfF"]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    try:
        data = yaml.load(text, Loader)
    except yaml.YAMLError as e:
        raise ConfigError(f"{where} must be YAML, but is not ({' '.join(str(e).split())}); correct it") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must be a YAML mapping of sections, but is {_kind(data)}; correct it")
    if odd := [key for key in data if not isinstance(key, str)]:
        raise ConfigError(f"{where}: a section must be a name, but is {odd[0]!r}; correct it")
    try:
        return {
            name: by_present_names(section) if isinstance(section, dict) else section for name, section in data.items()
        }
    except ConfigError as e:
        raise ConfigError(f"{where}: {e}") from None


def _kind(data: Any) -> str:
    return "empty" if data is None else type(data).__name__


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
        elif item["type"] == "dataclass_type":
            parts.append(f"{place} must be a mapping of settings, but is {item['input']!r}; correct it")
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


def config_from_argv(argv: list[str], name: str | None = None) -> tuple[Config, list[str]]:
    """Return the config that a command line starts from, and the arguments left for tyro.

    It is the config of the run that `--train.extend` names, else the preset that `--preset NAME` names, else that of the file,
    else the preset `name`, else `RUN`; over it are the settings of the file that `--config FILE` names. Raises ConfigError for
    a file that cannot be used.
    """
    argv = with_present_flags(argv)
    path, rest = _value_of("--config", argv)
    named, _ = _value_of("--preset", rest)
    extended, _ = _value_of("--train.extend", rest)
    of_run = None if extended in (None, "None") else _extended(extended)
    if path is None:
        return of_run or preset(named or name or RUN), rest
    try:
        text = expand_home(path, "--config").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "it is not UTF-8"
        raise ConfigError(
            f"--config must name a readable YAML file, but {path!r} is not ({why}); check the path"
        ) from None
    of_file = _settings_of(text, path).get("preset")
    if named is None and of_file is not None and not isinstance(of_file, str):
        raise ConfigError(f"{path}: preset must be a name, but is {of_file!r}; `python config.py` lists them")
    return from_yaml(text, path, of_run or preset(named or of_file or name or RUN)), rest


def _extended(run: str) -> Config:
    """Return the config of a run that is extended, under a new name."""
    path = require_run(expand_home(run, "--train.extend")) / "config.yaml"
    cfg = from_yaml(path.read_text(encoding="utf-8"), str(path))
    return dataclasses.replace(cfg, name=f"{path.resolve().parent.name}-longer")


def _value_of(flag: str, argv: list[str]) -> tuple[str | None, list[str]]:
    """Return the value of a flag, the last one if there are several, and the arguments without --config."""
    value, rest = None, []
    words = iter(argv)
    for word in words:
        if word == flag or word.startswith(f"{flag}="):
            given = word.removeprefix(f"{flag}=") if "=" in word else next(words, None)
            if flag == "--config":
                if given is None:
                    raise ConfigError("--config must name a YAML file, but names none; give its path")
            else:
                rest += [word] if "=" in word or given is None else [word, given]
            value = given if given is not None else value
        else:
            rest.append(word)
    return value, rest

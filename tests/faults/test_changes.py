"""Whatever may have changed between a run and its resumption: refused by name, or said, or without any effect on its bits."""

import json
import os
import shutil
import time
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from config import Config, ModelConfig
from faults.runs import Forked, completed, flags, stopping_at
from kindling.config_io import changed_fields
from kindling.errors import KindlingError
from kindling.files import with_checksum, write_json
from kindling.runs.checkpoint import RunDirectory
from kindling.training import start_or_resume

pytestmark = pytest.mark.faults


def candidates(hint: Any, value: Any) -> Iterator[Any]:
    """Yield values of a type that a setting of `value` could be changed to."""
    kind, args = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        for arg in args:
            yield from candidates(arg, value)
    elif kind is Literal:
        yield from args
    elif kind is tuple:
        yield from ((), *((item,) for item in candidates(args[0], None)))
    elif hint is type(None):
        yield None
    elif hint is bool:
        yield not value
    elif hint is int:
        yield from (value * 2, value + 1, value - 1) if isinstance(value, int) else (2, 4, 8)
    elif hint is float:
        yield from (value / 2, value + 0.1) if isinstance(value, float) else (0.5, 0.05, 2.0)
    elif hint is str:
        yield from ("other", "user-assistant")


def changed(cfg: Config, section: str, name: str) -> Iterator[Config]:
    """Yield configs that differ from `cfg` in one setting, as far as there are any that may be."""
    holder = cfg if not section else cfg.data.sources[0] if section == "sources" else getattr(cfg, section)
    value = getattr(holder, name)
    for other in candidates(get_type_hints(type(holder))[name], value):
        if other == value:
            continue
        try:
            new = replace(holder, **{name: other})
            if section == "sources":
                new = replace(cfg.data, sources=(new,))
            yield replace(cfg, **{"data" if section == "sources" else section: new}) if section else new
        except KindlingError:
            continue


def settings(cfg: Config) -> list[tuple[str, str]]:
    """Return the section and the name of every setting."""
    holders = {"": cfg, "sources": cfg.data.sources[0]}
    holders |= {f.name: getattr(cfg, f.name) for f in fields(cfg) if is_dataclass(getattr(cfg, f.name))}
    leaf = {name: [f.name for f in fields(holder)] for name, holder in holders.items()}
    leaf[""] = [name for name in leaf[""] if name not in holders]
    leaf["data"] = [name for name in leaf["data"] if name != "sources"]
    return [(section, name) for section, names in leaf.items() for name in names]


def starts(cfg: Config) -> list[Config]:
    """Return the config of a run, and those with what some settings need to be anything but their default."""
    source = cfg.data.sources[0]
    rows = [replace(source, kind="jsonl", response_field=name) for name in (None, "answer")]
    gpt2 = replace(cfg, model=ModelConfig(vocab_size=512), train=replace(cfg.train, head_lr=None))
    return [cfg, gpt2, *(replace(cfg, data=replace(cfg.data, sources=(row,))) for row in rows)]


def test_every_changed_setting_is_refused_by_name_or_said(work, record, capsys):
    began, run, outcome, silent, fixed = time.perf_counter(), RunDirectory(work / "runs/base"), Counter(), [], []
    for section, name in settings(run.config()):
        tried = [(start, new) for start in starts(run.config()) for new in changed(start, section, name)]
        if not tried:
            fixed.append(f"{section}.{name}")
        for start, new in tried[:3]:
            (field,) = changed_fields(start, new)
            capsys.readouterr()
            try:
                start_or_resume.check_config_changes(start, new, run)
            except KindlingError as e:
                outcome["refused"] += field in str(e) and "\n" not in str(e)
                silent += [] if field in str(e) else [field]
            else:
                out = capsys.readouterr().out
                says = f"note: {field} " in out and ("differs" in out or field in start_or_resume.KEEPS_EVERY_BIT)
                outcome["said"] += says
                silent += [] if says or field == "name" else [field]
                outcome["another run"] += field == "name"
    tried, good = outcome.total() + len(silent), outcome.total()
    note = (
        f"every setting of Config by reflection: {outcome['refused']} refused by name, {outcome['said']} said in a note"
    )
    record("changed setting on resume", tried, good, len(silent), time.perf_counter() - began, note)
    assert not silent and not fixed, (silent, fixed)


@pytest.fixture(scope="module")
def stopped(work, corpus) -> Path:
    """A run that was stopped after step 7 of 12."""
    child = Forked("main.py", flags(corpus, "stopped", save_every=4, keep_checkpoints=3), work, stopping_at(7))
    assert child.wait() == 143, child.text
    return work / "runs/stopped"


def words(field: str, value: Any) -> list[str]:
    """Return a setting as a command line has it."""
    return [f"--{field.replace('_', '-')}", *(value if isinstance(value, tuple) else [str(value)])]


def test_settings_that_are_called_harmless_change_no_bit(work, corpus, stopped, record):
    began, cfg, different = time.perf_counter(), RunDirectory(stopped).config(), []
    wanted = (work / "base.digest").read_text(encoding="utf-8")
    for field in sorted(start_or_resume.KEEPS_EVERY_BIT):
        section, name = field.split(".")
        (_, value) = changed_fields(cfg, next(changed(cfg, section, name)))[field]
        copy = f"harmless-{name.replace('_', '-')}"
        shutil.copytree(stopped, work / "runs" / copy)
        given = flags(corpus, copy, save_every=4, keep_checkpoints=3)
        end = completed("main.py", [*given, *words(field, value)], work)
        assert f"note: {field} " in end.text and "resuming at step 7" in end.text, end.text
        different += [field] if end.digest != wanted else []
    tried, note = len(start_or_resume.KEEPS_EVERY_BIT), ", ".join(sorted(start_or_resume.KEEPS_EVERY_BIT))
    record(
        "harmless setting on resume", tried, tried - len(different), len(different), time.perf_counter() - began, note
    )
    assert not different


def test_what_the_run_was_made_of_is_known_again(work, corpus, stopped, record):
    """The tokenizer, the data and the machine, by the real script; each is refused by one line, or said."""
    began, good = time.perf_counter(), 0
    cases = {"tokenizer.json": tokenizer_changed, "data manifest": data_changed, "shards": shards_changed}
    for n, (name, change) in enumerate(cases.items()):
        place = work / f"changed-{n}"
        shutil.copytree(work / "data", place / "data")
        shutil.copytree(stopped, place / "runs/changed")
        word = change(place)
        child = Forked("main.py", flags(corpus, "changed", save_every=4, keep_checkpoints=3), place)
        good += child.wait() == 1 and word in child.error
        assert name
    said = 0
    if (os.cpu_count() or 1) > 1:
        shutil.copytree(stopped, work / "runs/threads")
        given = flags(corpus, "threads", save_every=4, keep_checkpoints=3, threads=2)
        end = completed("main.py", given, work)
        said = (
            "train.threads None -> 2: from here on the run differs" in end.text and "threads was 1 and is 2" in end.text
        )
        assert said, end.text
    tried, seconds = len(cases) + bool(said), time.perf_counter() - began
    note = (
        "another tokenizer, other training data by the manifest, other shards: refused; another number of threads: said"
    )
    record("changed tokenizer, data, threads", tried, good + said, tried - good - said, seconds, note)
    assert good == len(cases)


def tokenizer_changed(place: Path) -> str:
    """Give the run a tokenizer in which two tokens have each other's ids."""
    path = place / "runs/changed/tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    a, b = list(vocab)[300:302]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    path.write_text(json.dumps(content), encoding="utf-8")
    return "tokenizer.json must be the tokenizer that the run was trained with"


def data_changed(place: Path) -> str:
    """Have the run begun on other training data, as far as its manifest says, seal and all."""
    path = place / "runs/changed/data/manifest.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
    write_json(path, with_checksum(content))
    return "must be resumed on the data that it was started with"


def shards_changed(place: Path) -> str:
    """Change a token of the training data."""
    (path,) = place.glob("data/*/train-00000.npy")
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 1
    path.write_bytes(raw)
    return "train-00000.npy must have the sha256 of its manifest"

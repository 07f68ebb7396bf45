"""--help and --help-all of every script, and what a mistyped flag gets."""

import importlib
import io
import re
import sys
import warnings

import pytest

from kindling import help
from kindling.cli import parse_cli
from presets import preset

SCRIPTS = ["main", "sft_train", "data_pipeline", "evaluate", "generate", "serve", "export", "visualize", "autocomplete"]
SCRIPTS += ["study", "kindling.data.distributed_build", "kindling.tokenization.compare"]


def shown(script: str, flag: str, monkeypatch, columns: int = 80) -> list[str]:
    """The lines that a script prints for --help or --help-all."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "argv", [f"{script}.py", flag])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as ended:
        module.parse_arguments([flag]) if script == "autocomplete" else parse_cli(
            module.Flags, module.__doc__ or "", [flag], getattr(module, "OFFLINE", None)
        )
    assert not ended.value.code
    return sys.stdout.getvalue().splitlines()


def defaults(module):
    if "config" not in module.Flags.__dataclass_fields__:
        return module.Flags()
    return module.Flags(config=preset(getattr(module, "OFFLINE", "demo")))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_one_screen_and_no_line_is_wider_than_the_terminal(script, monkeypatch):
    for columns in (60, 80, 120):
        lines = shown(script, "--help", monkeypatch, columns)
        assert len(lines) <= 40, len(lines)
        assert max(map(len, lines)) <= columns, max(lines, key=len)
    for columns in (50, 80):
        lines = shown(script, "--help-all", monkeypatch, columns)
        assert max(map(len, lines)) <= columns, max(lines, key=len)
    assert not any("\x1b" in line for line in lines)


def test_the_width_is_80_where_it_is_not_known(monkeypatch):
    monkeypatch.setattr("os.get_terminal_size", lambda *a: (_ for _ in ()).throw(OSError()))
    monkeypatch.setenv("COLUMNS", "0")
    assert 70 < max(map(len, shown("main", "--help-all", monkeypatch, columns=0))) <= 80


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "autocomplete"])
def test_the_flags_are_those_of_the_parser(script):
    import tyro

    module = importlib.import_module(script)
    default = defaults(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        parser = tyro.extras.get_parser(module.Flags, default=default)
    theirs = {name for action in parser._actions for name in (action.option_strings or [action.dest.upper()])}
    ours = {flag.spelling for flag in help.flags_of(module.Flags, default)}
    assert ours == {name for name in theirs if not re.match(r"--([\w.]+\.)?no-", name)} - {"-h", "--help"}


def test_every_setting_that_help_shows_exists():
    names = set()
    for script in ("main", "sft_train", "evaluate"):
        module = importlib.import_module(script)
        names |= {flag.name for flag in help.flags_of(module.Flags, defaults(module))}
    assert {*help.COMMON, *help.PRE_TRAINING, *help.FINE_TUNING} <= names


def test_every_flag_has_a_text_and_its_default_in_help_all(monkeypatch):
    text = " ".join(" ".join(shown("main", "--help-all", monkeypatch)).split())
    for flag in help.flags_of(importlib.import_module("main").Flags, defaults(importlib.import_module("main"))):
        assert flag.text and f"{flag.spelling} {flag.kind}".rstrip() in text
        assert flag.text in text, flag.name


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("typo", "meant"), [("--hlp", "--help"), ("--hepl-all", "--help-all")])
def test_a_typo_of_a_short_flag_gets_its_suggestion(script, typo, meant, capsys):
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as ended:
        module.parse_arguments([typo]) if script == "autocomplete" else parse_cli(module.Flags, "", [typo])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith(f"error: there is no flag {typo}; did you mean ") and meant in line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lr", "1"], ["no flag --lr", "--train.lr"]),
        (["--train.max-stepz=3"], ["no flag --train.max-stepz;", "--train.max-steps"]),
        (["--confg", "x.yaml"], ["--config"]),
        (["--frehs"], ["--fresh"]),
        (["--train.lr", "1", "--fres"], ["--fresh"]),
        (["--qqqqqqqqq"], ["see --help-all"]),
    ],
)
def test_an_unknown_word_is_one_line_with_what_was_meant(argv, words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_cli(importlib.import_module("main").Flags, "", argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and all(word in line for word in words), line


def test_a_value_may_look_like_a_flag():
    import generate

    assert generate.parse(["--prompt=--x"]).prompt == "--x"
    assert (
        parse_cli(
            importlib.import_module("main").Flags, "", ["--train.max_steps=7", "--no-fresh"]
        ).config.train.max_steps
        == 7
    )


@pytest.mark.parametrize(
    ("script", "argv", "words"),
    [
        ("main", ["--train.max-steps", "1.5"], "--train.max-steps must be a whole number, but is '1.5'"),
        ("main", ["--train.lr=abc"], "--train.lr must be a number, but is 'abc'"),
        ("main", ["--train.device", "cpuu"], "one of auto, cpu, cuda, mps, but is 'cpuu'; did you mean cpu?"),
        ("main", ["--model.bias", "yes"], "one of True, False, but is 'yes'"),
        ("main", ["--model.n-layer"], "--model.n-layer must have a value, but has none"),
        ("main", ["--preset"], "--preset must have a value"),
        ("main", ["--dry-run=3"], "--dry-run takes no value, but was given '3'; write --dry-run"),
        ("main", ["--dry-run", "more"], "no place for 'more'"),
        ("main", ["-x"], "no place for '-x'"),
        ("evaluate", ["runs/a", "runs/b"], "no place for 'runs/b'"),
        ("visualize", ["--text"], "--text must have a value, but has none; write --text=STR"),
    ],
)
@pytest.mark.parametrize("color", [True, False])
def test_a_wrong_value_is_one_line_without_colour(script, argv, words, color, monkeypatch, capsys):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not color:
        monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit) as ended:
        parse_cli(importlib.import_module(script).Flags, "", argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith("error: ") and words in line and "|None" not in line, line


@pytest.mark.parametrize(
    ("script", "argv"),
    [
        ("main", ["--train.max-steps", "None", "--train.epochs", "1e0", "--model.bias", "True", "--train.lr=-1e-3"]),
        ("main", ["--data.sources.0.globs", "**/*.py", "**/*.c", "--data.sources.0.max-bytes", "None"]),
        ("evaluate", ["runs/a", "--eval.benchmarks", "problems:2", "mbpp", "--eval.no-full", "--text", "a", "b"]),
        ("generate", ["runs/a", "--stop", "x", "y", "--n", "2", "--temperature", "0", "--prompt", "-x"]),
        ("visualize", ["--compare", "runs/a", "runs/b"]),
        ("kindling.tokenization.compare", ["a", "b", "c", "--vocab-size", "300"]),
        ("export", ["runs/a", "--to", "gguf", "--type", "q8_0", "--out", "~/x", "--replace"]),
    ],
)
def test_values_that_the_parser_takes_are_not_refused(script, argv):
    module = importlib.import_module(script)
    flags = list(help.flags_of(module.Flags, defaults(module)))
    assert help.unknown_flag(argv, flags) is None and help.wrong_value(argv, flags) is None


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_of_several_ranks_one_says_that_a_flag_is_wrong(rank, lines, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit):
        parse_cli(importlib.import_module("main").Flags, "", ["--train.lr", "x"])
    assert len(capsys.readouterr().err.splitlines()) == lines


@pytest.mark.parametrize(("script", "flag"), [("main", "--train.sample-every"), ("evaluate", "--eval.full")])
def test_help_shows_the_flags_that_the_docs_lead_with(script, flag, monkeypatch):
    assert any(line.split()[:1] == [flag] for line in shown(script, "--help", monkeypatch))


def test_help_of_the_data_shows_no_settings_of_training(monkeypatch):
    text = "\n".join(shown("data_pipeline", "--help", monkeypatch))
    assert "--train." not in text and "--data.max-tokens" in text

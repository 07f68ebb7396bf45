import shlex
from dataclasses import replace
from pathlib import Path

import pytest

import evaluate
from config import FULL_EVAL, Config, DataConfig, SourceConfig, TrainConfig
from kindling.sample_prompts import ENGLISH, PYTHON, generate_command, knows_no_python, prompt_flag, sample_prompts
from presets import PRESETS, preset

SOURCES = {
    "the machine's Python": (SourceConfig(), PYTHON),
    "files": (SourceConfig(kind="files", path="src"), PYTHON),
    "files of several languages": (SourceConfig(kind="files", path="src", globs=("**/*.c", "**/*.py")), PYTHON),
    "files of another language": (SourceConfig(kind="files", path="notes", globs=("**/*.md",)), ENGLISH),
    "one file of Python": (SourceConfig(kind="files", path="a/b.py", globs=("**/*.c",)), PYTHON),
    "a text": (SourceConfig(kind="text", path="tale.txt"), ENGLISH),
    "rows of prose": (SourceConfig(kind="jsonl", path="a.jsonl", field="text"), ENGLISH),
    "rows of code": (SourceConfig(kind="jsonl", path="a.jsonl"), PYTHON),
    "rows whose language is named": (SourceConfig(kind="jsonl", path="a.jsonl", language="english"), ENGLISH),
    "a data set on the hub": (SourceConfig(kind="datasets", path="a/b", field="text", language="python"), PYTHON),
}


def config(*sources: SourceConfig, prompts: tuple[str, ...] | None = None) -> Config:
    return Config(data=DataConfig(sources=sources), train=TrainConfig(sample_prompts=prompts))


@pytest.mark.parametrize("source", SOURCES)
def test_prompts_are_in_the_language_of_the_data(source):
    given, expected = SOURCES[source]
    assert sample_prompts(config(given)) == expected


def test_one_source_of_python_is_enough_and_prompts_of_ones_own_are_kept():
    prose = SourceConfig(kind="text", path="tale.txt")
    assert sample_prompts(config(prose, SourceConfig())) == PYTHON
    assert sample_prompts(config(SourceConfig(), prompts=("To be",))) == ("To be",)
    assert sample_prompts(config(SourceConfig(), prompts=())) == ()


@pytest.mark.parametrize("name", ["tinystories", "fineweb-nano", "smallcoder-1", "smallcoder-3"])
def test_a_preset_of_stories_or_web_text_is_not_asked_for_python(name):
    said = " ".join([*sample_prompts(PRESETS[name]()), generate_command(Path("runs/x"), PRESETS[name]())])
    assert not any(word in said for word in ("def", "import", "class"))


@pytest.mark.parametrize("name", ["demo", "code-50m", "autocomplete", "smallcoder-2"])
def test_a_preset_of_code_is_asked_for_python(name):
    assert generate_command(Path("runs/x"), PRESETS[name]()) == 'python generate.py runs/x --prompt "import os"'


def test_a_fine_tuned_run_is_asked_in_a_chat():
    assert generate_command(Path("runs/x"), PRESETS["docstrings"]()) == "python generate.py runs/x --chat"


@pytest.mark.parametrize(
    "prompt", ['say "hi"', "it's", "$HOME `ls` !", "two\nlines", "\nafter", "", "plain words", "\\"]
)
def test_a_shell_reads_the_first_line_of_the_prompt(prompt):
    cfg = replace(config(SourceConfig(), prompts=(prompt,)))
    flag, line = shlex.split(prompt_flag(cfg))
    assert flag == "--prompt" and line == (prompt.split("\n")[0] or "The")


def test_only_a_run_whose_data_are_all_of_other_languages_knows_no_python():
    stories, code = SourceConfig(kind="text", path="x", language="english"), SourceConfig(kind="local-python")
    unknown, notes = SourceConfig(kind="text", path="x"), SourceConfig(kind="files", path="x", globs=("**/*.md",))
    rows = SourceConfig(kind="jsonl", path="x", field="text")
    of_others = [((stories,), True), ((stories, notes), True)]
    for sources, expected in [*of_others, ((stories, code), False), ((unknown,), False), ((notes, rows), False)]:
        cfg = replace(preset("demo"), data=replace(preset("demo").data, sources=sources))
        assert knows_no_python(cfg) is expected
    cfg = replace(preset("tinystories"), train=replace(preset("tinystories").train, init_from="runs/demo"))
    assert knows_no_python(preset("tinystories")) and not knows_no_python(cfg)
    assert not knows_no_python(preset("docstrings"))


@pytest.mark.parametrize(
    ("argv", "benchmarks"),
    [([], ("none",)), (["--eval.full"], FULL_EVAL.benchmarks), (["--eval.benchmarks", "mbpp:2"], ("mbpp:2",))],
)
def test_a_run_of_stories_is_not_evaluated_on_python_unless_asked(argv, benchmarks, capsys):
    class Run:
        path = Path("runs/stories")

        def config(self):
            return preset("tinystories")

    flags = evaluate.parse(argv)
    assert evaluate.without_python(flags.eval, argv, Run()).benchmarks == benchmarks
    assert ("has learnt no Python" in capsys.readouterr().err) == (not argv)

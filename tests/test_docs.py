"""README.md, docs/ and the notebook: their commands parse, their links lead somewhere, and what they name is there."""

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from conftest import ROOT

from config import DataConfig, EvalConfig, ModelConfig, SourceConfig, TokenizerConfig, TrainConfig
from kindling.cli import parse_cli
from kindling.config_io import to_yaml
from presets import PRESETS, preset

sys.path.append(str(ROOT / "benchmarks"))
README = ROOT / "README.md"
NOTEBOOK = ROOT / "kindling.ipynb"
PAGES = [README, NOTEBOOK, *sorted((ROOT / "docs").glob("*.md"))]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
SECTIONS = {
    "model": ModelConfig,
    "tokenizer": TokenizerConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
}
PROGRAMS = ("python", "torchrun", "make", "pip", "tensorboard")
SUFFIXES = ("py", "md", "json", "jsonl")  # of files that are called as a section of the settings is
MOST_LINES, MOST_WORDS = 220, 1800  # of the README


@cache
def text_of(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    return text if page.suffix == ".md" else notebook_as_markdown(json.loads(text))


def notebook_as_markdown(notebook: dict) -> str:
    """Return a notebook as a page: its commands in blocks, with the flags that its first cell sets, at both of its sizes."""
    sources = [("".join(cell["source"]), cell["cell_type"]) for cell in notebook["cells"]]
    first = next(source for source, kind in sources if kind == "code")
    out = [source for source, kind in sources if kind == "markdown"]
    for size in ("0", "1"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(os.environ, "KINDLING_TOY", size)
            exec(first, flags := {})
        lines = [line for source, kind in sources if kind == "code" for line in source.splitlines()]
        commands = [line[1:].format(**flags) for line in lines if line.startswith("!")]
        assert commands, "a cell of the notebook begins with its command"
        out.append("\n".join(["```", *commands, "```"]))
    return "\n\n".join(out) + "\n"


def blocks_of(page: Path) -> list[list[str]]:
    """Return the lines of each fenced block, with lines that end in a backslash joined to the next."""
    found = re.findall(r"^```\w*\n(.*?)^```$", text_of(page), re.DOTALL | re.MULTILINE)
    return [block.replace("\\\n", " ").splitlines() for block in found]


def prose_of(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def inline_code_of(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose_of(page))


def commands_of(page: Path) -> Iterator[str]:
    """Yield the commands of a page: lines of its blocks, also those after a `$` or `srun`, and whole pieces of inline code."""
    for line in (line for block in blocks_of(page) for line in block):
        command = line.removeprefix("$ ").removeprefix("srun ")
        if command.split(" ")[0] in PROGRAMS:
            yield command
    for code in inline_code_of(page):
        if re.match(r"python .|make .|pip .|torchrun .*\.py", code):  # `torchrun --max-restarts` is no whole command
            yield code


COMMANDS = sorted({(page.name, command) for page in PAGES for command in commands_of(page)})


def words_of(command: str) -> list[str]:
    """Return the arguments of a command, without comments and redirections, and with a real name for each placeholder."""
    words = shlex.split(command, comments=True)
    words = words[: next((i for i, word in enumerate(words) if word.startswith(">")), len(words))]
    return ["demo" if word == "NAME" else word for word in words]


@cache
def saved_config() -> str:
    """Return the path of a file that can stand for the `config.yaml` of a run."""
    path = Path(tempfile.mkdtemp(), "config.yaml")
    path.write_text(to_yaml(preset("demo")), encoding="utf-8")
    return str(path)


def parse_script(script: str, argv: list[str]) -> None:
    """Parse arguments as the script does, and do nothing else. Raises SystemExit or a KindlingError where it would."""
    if script == "benchmarks/lab.py":
        import lab

        script, (_, argv) = "main.py", lab.parse(argv)
    elif script.startswith("benchmarks/"):
        source = (ROOT / script).read_text(encoding="utf-8")
        assert all(f'"{word}"' in source for word in argv if word.startswith("--"))
        return
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    stands_for = {"--config": saved_config(), "--train.extend": str(Path(saved_config()).parent)}
    argv = [stands_for.get(before, word) for before, word in zip(["", *argv], argv)]
    if script in ("config.py", "presets.py"):
        assert not argv
    elif script == "autocomplete.py":
        module.sampling_of(module.parse_arguments(argv))
    elif script == "generate.py":
        module.parse(argv)
    elif script == "sft_train.py":
        parse_cli(module.Flags, module.__doc__, argv, module.OFFLINE)
    else:
        parse_cli(module.Flags, module.__doc__, argv)


def parse_python(words: list[str]) -> None:
    """Parse what follows `python`, or what torchrun starts: a script or `-m` module, and its arguments."""
    if words[0] != "-m":
        assert (ROOT / words[0]).is_file(), f"there is no {words[0]}"
        if words[1:] not in (["--help"], ["--help-all"]):
            parse_script(words[0], words[1:])
    elif words[1].startswith("kindling."):
        parse_script(words[1].replace(".", "/") + ".py", words[2:])
    else:
        assert words[1] == "pytest"


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}: {command}" for page, command in COMMANDS])
def test_a_command_parses(page, command):
    program, *words = words_of(command)
    if program == "python":
        parse_python(words)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        started = get_args_parser().parse_args(words)
        parse_python([started.training_script, *started.training_script_args])
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert words and all(re.search(rf"^{re.escape(word)}:", makefile, re.MULTILINE) for word in words)
    elif program == "pip":
        assert words[0] == "install"
        assert all((ROOT / file).is_file() for flag, file in pairwise(words) if flag == "-r")
    else:
        assert words[0] == "--logdir"


def test_every_script_is_shown_in_a_command():
    shown = {word for _, command in COMMANDS for word in words_of(command) if word.endswith(".py")}
    scripts = {path for path in TRACKED if path.endswith(".py") and "/" not in path} - {"model.py", "presets.py"}
    assert scripts <= shown


# -- links and names --------------------------------------------------------------------------------------------------


@cache
def anchors_of(page: Path) -> frozenset[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


def links_of(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose_of(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for link in links_of(page):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors_of(target), link


def test_the_readme_leads_to_every_page():
    linked = {(ROOT / link).resolve() for link in links_of(README) if not link.startswith("https://")}
    assert set(PAGES) - {README} <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    tops = {path.split("/")[0] for path in TRACKED if "/" in path}
    for code in inline_code_of(page):
        for path in re.findall(r"[\w./-]+/[\w./-]*", code):
            if path.split("/")[0] in tops and "NAME" not in path:
                assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_that_a_page_names_exist(page):
    names = {section: {f.name for f in fields(cls)} for section, cls in SECTIONS.items()}
    for code in inline_code_of(page):
        for section, name in re.findall(r"(?<![\w./])(?:--)?(model|tokenizer|data|train|eval)\.([a-z][\w-]*)", code):
            if name not in SUFFIXES:
                assert name.replace("-", "_") in names[section], f"{section}.{name}"


def table_under(page: str, heading: str) -> dict[str, list[str]]:
    """Return the first table under a heading of a page: the other cells of each row by the first one."""
    text = text_of(ROOT / "docs" / page)
    table = re.search(r"(?:^\|.*\n)+", text[text.index(f"\n{heading}\n") :], re.MULTILINE)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {first: cells for first, *cells in rows}


def names_in_code() -> list[tuple[str, str]]:
    """Return the files and names that docs/code.md points to."""
    found = re.findall(r"`([\w/]+\.py):([\w.]+)`", text_of(ROOT / "docs/code.md"))
    assert found
    return sorted(set(found))


@pytest.mark.parametrize("path, name", names_in_code())
def test_what_the_ways_through_the_code_name_is_there(path, name):
    body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    for part in name.split("."):
        found = [node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == part]
        assert len(found) == 1, f"{path} has no {name}"
        body = found[0].body


def test_the_table_of_sources_names_all_kinds():
    kinds = get_args(get_type_hints(SourceConfig)["kind"])
    assert set(table_under("data.md", "## Sources")) == {f"`{kind}`" for kind in kinds}


def test_the_table_of_filters_names_settings_of_the_data():
    named = {name for cell in table_under("data.md", "## Filters") for name in re.findall(r"`(\w+)`", cell)}
    assert named and named <= {f.name for f in fields(DataConfig)}


def test_the_tables_of_presets_say_what_they_hold():
    settings = table_under("presets.md", "## The settings")
    counts = table_under("presets.md", "## Labels and counts")
    made = {name: make() for name, make in PRESETS.items()}
    whole = {name: cfg for name, cfg in made.items() if cfg.train.max_steps is not None}  # the others fit any base
    assert set(settings) == {f"`{name}`" for name in whole}
    for name, cfg in whole.items():
        context, vocabulary, _, rows, steps, rate, warmup = settings[f"`{name}`"]
        model, train = cfg.model, cfg.train
        held = [model.block_size, model.vocab_size, train.batch_size, train.max_steps, train.warmup_steps]
        assert [context, vocabulary, rows, steps, warmup] == [f"{n:,}" for n in held], name
        assert float(rate) == pytest.approx(train.lr), name
        count = counts.get("`smallcoder-*`" if name.startswith("smallcoder") else f"`{name}`")
        assert count is None or count[1] == f"{model.n_parameters:,}", name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_rows_of_a_table_have_as_many_cells_as_its_head(page):
    for table in re.findall(r"(?:^\|.*\n)+", prose_of(page) + "\n", re.MULTILINE):
        counts = [len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()]
        assert set(counts) == {counts[0]} and len(counts) > 2, table


# -- the README -------------------------------------------------------------------------------------------------------


def test_the_readme_is_a_front_page():
    text = text_of(README)
    assert len(text.splitlines()) <= MOST_LINES and len(text.split()) <= MOST_WORDS


def tree_of_readme() -> tuple[list[str], dict[str, str]]:
    """Return the names at the top of the README's tree, and what it says of each package of kindling/."""
    block = re.search(r"^## The tree$.*?^```\n(.*?)^```$", text_of(README), re.DOTALL | re.MULTILINE)[1]
    tops: list[str] = []
    packages: dict[str, str] = {}
    for line in block.splitlines():
        names, _, said = line.strip().partition("  ")
        indent = len(line) - len(line.lstrip())
        if indent == 0:
            tops += names.split()
        elif indent == 4:
            assert names not in packages, names
            packages[names] = said
        else:
            packages[list(packages)[-1]] += line
    return tops, packages


def test_the_tree_in_the_readme_is_the_folder():
    tops, packages = tree_of_readme()
    entries = {path.partition("/")[0] + ("/" if "/" in path else "") for path in TRACKED}
    assert Counter(tops) == Counter(entries)
    folders = {path.split("/")[1] + "/" for path in TRACKED if path.startswith("kindling/") and path.count("/") > 1}
    assert set(packages) == folders


def test_files_that_the_tree_names_are_in_their_package():
    for package, said in tree_of_readme()[1].items():
        for name in re.findall(r"\b\w+\.(?:py|c)\b", said):
            assert (ROOT / "kindling" / package / name).is_file(), f"{package}{name}"

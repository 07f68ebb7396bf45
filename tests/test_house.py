"""The repository's own rules, checked on its files: where files live, and which may import which."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT

# from the ground up; a file imports only from floors below its own, or from files of its own package
FLOORS = [
    "kindling/errors kindling/files",
    "kindling/config_checks",
    "config",
    "presets",
    "kindling",  # its other files
    "kindling/tokenization",
    "kindling/data",
    "model",
    "kindling/generation",
    "kindling/sandbox",
    "kindling/evaluation",
    "kindling/runs",
    "kindling/int8",
    "kindling/serving",
    "kindling/formats",
    "kindling/plots",
    "kindling/training",
    "kindling/studies",
    "autocomplete data_pipeline evaluate export generate main serve sft_train study visualize",
]
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor.split()}
TRACKED = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
SOURCES = sorted(
    path for path in TRACKED if path.split("/")[0] not in ("tests", "benchmarks") and (ROOT / path).exists()
)


def room_of(path: str) -> str:
    """Return the floor's name for a file: its own, or its package's."""
    name = path.removesuffix(".py").removesuffix("/__init__")
    return name if name in FLOOR else str(Path(name).parent)


@cache
def imports_of(path: str) -> frozenset[str]:
    """Return the files of the project that a file imports, at its top or inside functions.

    What only runs when the file is the command (`if __name__ == "__main__":`) is a script's, and does not count.
    """
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and "__main__" in ast.unparse(n.test))]
    named: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by dots"
            named |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(f"{name.replace('.', '/')}.py" for name in named) & frozenset(SOURCES)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the circles of a graph: groups of nodes of which each reaches the others."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, todo = set(), [start]
        while todo:
            for other in graph.get(todo.pop(), set()) - seen:
                seen.add(other)
                todo.append(other)
        reached[start] = seen
    return [sorted(b for b in reached[a] if a in reached.get(b, ())) for a in graph if a in reached[a]]


FILE_LINES, CONFIG_LINES, FUNCTION_LINES = 400, 600, 50  # the soft limits


def long_files_and_functions() -> dict[str, int]:
    """Return the files and functions that are over the soft limits, and their lines."""
    found = {}
    for path in SOURCES:
        text = (ROOT / path).read_text(encoding="utf-8")
        if (lines := text.count("\n")) > (CONFIG_LINES if path == "config.py" else FILE_LINES):
            found[path] = lines
        nodes = [("", node) for node in ast.parse(text).body]
        while nodes:
            prefix, node = nodes.pop()
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                name = f"{prefix}{node.name}"
                lines = node.end_lineno - node.lineno + 1
                if not isinstance(node, ast.ClassDef) and lines > FUNCTION_LINES:
                    found[f"{path}:{name}"] = lines
                nodes += [(f"{name}.", inner) for inner in node.body]
    return found


def test_nothing_is_longer_than_the_soft_limits():
    assert long_files_and_functions() == {}


def test_only_one_file_expands_a_home():
    """So a user that does not exist is one clear line wherever a path comes from."""
    named = [
        path for path in TRACKED if "tests/" not in path and "expanduser" in (ROOT / path).read_text(encoding="utf-8")
    ]
    assert named == ["kindling/paths.py"]


@pytest.mark.parametrize("path", SOURCES)
def test_imports_point_downwards_only(path):
    own = room_of(path)
    upwards = {o for o in imports_of(path) if room_of(o) != own and FLOOR[room_of(o)] >= FLOOR[own]}
    assert upwards == set()


def test_neither_files_nor_packages_import_each_other_in_a_circle():
    assert circles({path: set(imports_of(path)) for path in SOURCES}) == []
    packages = {}
    for path in SOURCES:
        own = str(Path(path).parent)
        packages.setdefault(own, set()).update(str(Path(o).parent) for o in imports_of(path))
    for own, others in packages.items():
        others -= {own, ".", "kindling"}  # the top and kindling's own files are floors, not packages
    assert circles({own: others for own, others in packages.items() if own not in (".", "kindling")}) == []


@pytest.mark.parametrize(
    "path", sorted(p for p in TRACKED if p.startswith(("tests/", "benchmarks/")) and (ROOT / p).exists())
)
def test_what_tests_and_benchmarks_import_is_there(path):
    """Also inside functions, which run only when somebody measures."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and f"{node.module.replace('.', '/')}.py" in SOURCES:
            defined = names_in(f"{node.module.replace('.', '/')}.py")
            assert {alias.name for alias in node.names} <= defined, f"{path}:{node.lineno}"


@cache
def names_in(path: str) -> frozenset[str]:
    """Return the names that a file defines or imports at its top level."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name for alias in node.names}
    return frozenset(found)


def test_no_package_imports_a_script():
    scripts = {f"{name}.py" for name in FLOORS[-1].split()}
    assert {
        path: imports_of(path) & scripts
        for path in SOURCES
        if path.startswith("kindling/") and imports_of(path) & scripts
    } == {}


def test_no_file_of_the_int8_runtime_reaches_torch():
    served = {path for path in SOURCES if re.match("kindling/serving/(?!torch_engine|open_run)", path)}
    seen, todo = set(), ["autocomplete.py", *served, *(path for path in SOURCES if path.startswith("kindling/int8/"))]
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo += imports_of(path)
            assert not re.search(
                r"^\s*(import|from) (torch|transformers)\b", (ROOT / path).read_text(encoding="utf-8"), re.M
            ), path


def test_the_top_holds_at_most_thirteen_files_of_python():
    assert len([path for path in SOURCES if "/" not in path]) <= 13


def test_every_package_says_what_it_is_for_and_does_nothing_else():
    for package in {str(Path(path).parent) for path in SOURCES if path.startswith("kindling/")}:
        body = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")).body
        assert len(body) == 1 and ast.get_docstring(ast.Module(body, [])), package
        text = (ROOT / package / "__init__.py").read_text(encoding="utf-8")
        inside = {Path(path).name for path in SOURCES if str(Path(path).parent) == package} - {"__init__.py"}
        if package != "kindling":
            assert inside <= set(re.findall(r"\w+\.py", text)), f"{package} names not all of its files"


def test_tests_lie_where_what_they_test_lies():
    packages = {Path(path).parent.name for path in SOURCES if path.startswith("kindling/")} - {"kindling"}
    folders = {Path(path).parts[1] for path in TRACKED if path.startswith("tests/") and path.count("/") > 1}
    assert folders - packages <= {"faults", "gpu"}


def test_the_readme_gives_the_exact_counts():
    from presets import PRESETS

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, make in PRESETS.items():
        if make().data.instructions and make().train.init_from is None:
            continue  # fine-tunes any base, and so has the base's count
        family = re.sub(r"-\d$", "", name) if name.startswith("smallcoder") else name
        assert re.search(rf"`{family}[^|]*\|[^\n]*{make().model.n_parameters:,}", readme), name


def test_no_library_is_left_unpinned():
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            assert re.fullmatch(r"#.*|-r requirements\.txt|[\w-]+==[\d.]+", line), line


def test_files_are_opened_with_an_encoding():
    result = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--quiet", "--preview", "--select", "PLW1514", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout


def test_every_make_target_has_a_line_in_the_help():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = dict(re.findall(r"^  make ([a-z-]+) +(\S.*)$", shown, re.MULTILINE))
    assert lines.keys() == targets == set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert max(map(len, shown.splitlines())) <= 120

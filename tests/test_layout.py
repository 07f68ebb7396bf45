"""The repository's own rules, checked on its files."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

LAYERS = [
    layer.split()
    for layer in (
        "bpe docstrings errors files guard healing int8_kernel intervals modeling_kindling plots prompts sandbox_worker "
        "stopping syscall_filter tables verbatim",
        "chat comparison config distributed harness_data html_report int8_model metrics pool report sampling sandbox tasks "
        "text_plots",
        "autocomplete cache compare_runs config_io device duplicates filters loss schedule shards",
        "cli examples extraction ledger model prefetch sources",
        "decoding hf_layout inference judge optim parity recorder sharded tokenizer validation",
        "checkpoint completion conversations functional gguf_format harness_model heldout hf_format int8_format memorization "
        "perplexity",
        "audit generate harness inspection model_card trainer workers",
        "dry_run export mixture run_page",
        "data_pipeline visualize",
        "evaluate parts stage",
        "main scatter sft_train",
    )
]
LAYER = {name: i for i, layer in enumerate(LAYERS) for name in layer}
MODULES = sorted(p.stem for p in ROOT.glob("*.py"))


def imports_of(name: str) -> set[str]:
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found & set(MODULES)


def test_every_module_has_a_layer():
    assert sorted(LAYER) == MODULES


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downwards_only(name):
    assert {other for other in imports_of(name) if LAYER[other] >= LAYER[name]} == set()


def test_the_readme_has_a_line_for_each_file_and_none_that_is_gone():
    tree = re.search(r"## The files\n+```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    named = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.strip()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {path.split("/")[0] for path in tracked}
    assert named == top


def test_the_readme_gives_the_exact_counts():
    from config import PRESETS

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

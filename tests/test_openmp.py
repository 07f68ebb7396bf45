"""How long OpenMP's threads spin is limited in every process that computes, before a runtime is loaded."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from kindling.openmp import BLOCK_TIME_MS, OWN_CHOICES, SPIN_COUNT, limit_spinning

LIMITS = {"GOMP_SPINCOUNT": str(SPIN_COUNT), "KMP_BLOCKTIME": str(BLOCK_TIME_MS)}
SCRIPTS = ("main", "sft_train", "evaluate", "generate", "data_pipeline", "export", "visualize", "serve", "study")
MODULES = ("kindling.tokenization.compare", "kindling.data.distributed_build")

# Runs each script until it imports torch or reads its command line, and says what the environment and the process hold then
PROBE = """
import json, os, runpy, sys
from pathlib import Path

import kindling.cli

def stop(*args, **kwargs):
    sys.exit()

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            stop()

sys.meta_path.insert(0, NoTorch())
kindling.cli.parse_cli = stop
found = {}
for name in json.loads(sys.argv[1]):
    for variable in ("GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        os.environ.pop(variable, None)
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit:
        maps = Path("/proc/self/maps")
        limits = {name: os.environ.get(name) for name in ("GOMP_SPINCOUNT", "KMP_BLOCKTIME")}
        found[name] = {"limits": limits, "libgomp": maps.is_file() and "libgomp" in maps.read_text()}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def at_start() -> dict:
    environment = {name: value for name, value in os.environ.items() if name not in OWN_CHOICES}
    command = [sys.executable, "-c", PROBE, json.dumps([*SCRIPTS, *MODULES])]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", [*SCRIPTS, *MODULES])
def test_a_script_has_set_the_limits_before_torch_is_loaded(at_start, name):
    assert at_start[name] == {"limits": LIMITS, "libgomp": False}


def test_every_script_at_the_top_is_among_the_probed():
    ending = {path.stem for path in ROOT.glob("*.py") if "\n    run_script(" in path.read_text(encoding="utf-8")}
    assert ending == {*SCRIPTS, "config", "presets"}  # these two compute nothing


@pytest.mark.parametrize("name", OWN_CHOICES)
def test_what_the_user_has_set_is_left_alone(name):
    environment = {name: "passive", "OTHER": "1"}
    limit_spinning(environment)
    assert environment == {name: "passive", "OTHER": "1"}


def test_both_runtimes_get_a_limit_and_nothing_else_changes():
    environment = {"OMP_NUM_THREADS": "1"}
    limit_spinning(environment)
    assert environment == {"OMP_NUM_THREADS": "1", **LIMITS}


def test_the_kernel_in_c_limits_the_spinning_of_its_own_threads():
    code = (
        "from kindling.int8 import kernel\ntry:\n    kernel._library()\nexcept kernel.KernelError:\n    pass\nimport os"
    )
    environment = {name: value for name, value in os.environ.items() if name not in OWN_CHOICES}
    command = [sys.executable, "-c", f"{code}\nprint(os.environ['GOMP_SPINCOUNT'])"]
    result = subprocess.run(
        command, cwd=ROOT, env={**environment, "CC": "/none", "PATH": "/none"}, capture_output=True, text=True
    )
    assert result.stdout.strip() == str(SPIN_COUNT), result.stderr


def commands_of_benchmarks() -> list[Path]:
    return [
        p
        for p in sorted((ROOT / "benchmarks").glob("*.py"))
        if p.stem != "llama_server" and "__main__" in p.read_text(encoding="utf-8")
    ]


@pytest.mark.parametrize("path", commands_of_benchmarks(), ids=lambda path: path.stem)
def test_a_benchmark_limits_the_spinning_before_it_loads_torch(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_import = {ast.unparse(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))}
    assert not any(line.startswith(("import torch", "from torch")) for line in at_import)
    assert not any(line.startswith(("import peer", "from peer", "from model")) for line in at_import)  # import torch
    last = ast.unparse(tree.body[-1])
    assert "run_script(" in last or "limit_spinning()" in last

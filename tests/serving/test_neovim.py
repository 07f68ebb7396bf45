"""Neovim asks the server what llama.vim asks, and shows the answer at the cursor. Run by make test-browser."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from http_server import FIM, running, served

pytestmark = pytest.mark.browser
HERE = Path(__file__).parent
CODE = "def f(x):\n    if x:\n    return x\n"


def screen(code: Path, endpoint: str, row: int, column: int) -> str:
    """Return what Neovim shows with the answer for a place in a file; skip the test without Neovim."""
    for program in ("nvim", "curl"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}: apt-get install neovim curl")
    asked = json.loads((HERE / "clients/llama_vim.json").read_text(encoding="utf-8"))["requests"]
    (fields,) = [one["body"] for one in asked if one["what"] == "text at the cursor"]
    place = ["+set lines=12 columns=60 virtualedit=onemore", f"+call cursor({row}, {column})"]
    done = subprocess.run(
        ["nvim", "--headless", "--clean", "-n", *place, "+luafile tests/serving/infill.lua", str(code)],
        env={**os.environ, "ENDPOINT": endpoint, "FIELDS": json.dumps(fields)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stderr == ""
    return done.stdout


def test_what_fits_between_the_lines_is_shown_at_the_cursor(tmp_path):
    (tmp_path / "f.py").write_text(CODE, encoding="utf-8")
    with running(served()) as server:
        seen = screen(tmp_path / "f.py", f"{server.url}/infill", 2, 10)
        passes = server.served.scheduler._batch._engine.passes
    assert seen.splitlines()[:4] == ["def f(x):", "    if x:pass", "    return x", "~"]
    read = "".join(text for texts in passes for _, text in texts)
    marks = [chr(i) for i in (FIM.prefix, FIM.suffix, FIM.middle)]
    assert f"{marks[0]}{marks[1]}\n    return x\n{marks[2]}def f(x):\n    if x:" in read


def test_further_lines_are_shown_below_the_cursor_s(tmp_path):
    says = "1,\n    2,\n    3,"

    def follows(prompt: str) -> str:
        written = prompt.rpartition("[\n    ")[2]
        return says[len(written)] if len(written) < len(says) else ""

    (tmp_path / "f.py").write_text("x = [\n    \n]\n", encoding="utf-8")
    with running(served(follows)) as server:
        seen = screen(tmp_path / "f.py", f"{server.url}/infill", 2, 5)
    assert seen.splitlines()[:6] == ["x = [", "    1,", "    2,", "    3,", "]", "~"]

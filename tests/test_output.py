"""What a script prints: the end of a text, and a reader that ends first."""

import subprocess
import sys

import pytest
from conftest import ROOT

from kindling.output import TextPrinter, wants_color


def test_color_is_for_terminals_whose_user_does_not_refuse_it(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for terminal in (True, False):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        assert wants_color(sys.stdout) is terminal
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_color(sys.stdout)


@pytest.mark.parametrize(
    ("pieces", "printed"),
    [(["a", "b"], "ab\n"), (["a\n"], "a\n"), (["a", "\n", ""], "a\n"), ([], ""), ([""], ""), (["a\n", " "], "a\n \n")],
)
@pytest.mark.parametrize("terminal", [True, False])
def test_a_text_ends_with_one_newline_on_a_terminal_and_in_a_pipe(pieces, printed, terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    say = TextPrinter()
    for piece in pieces:
        say(piece)
    say.end()
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("command", ["main.py --help", "config.py", "autocomplete.py --help", "generate.py --help"])
def test_a_reader_that_ends_first_is_no_error(command):
    """The pipe's other end is closed before the script prints."""
    script, *argv = command.split()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 141  # as of a program that SIGPIPE ends


def test_a_reader_that_ends_while_a_script_works_is_no_error():
    code = (
        "import sys; from kindling.cli import run_script\n"
        "def main():\n    for n in range(100000): print(n)\n    sys.exit('not reached')\nrun_script(main)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=60) == 141

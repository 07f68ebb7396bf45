import gzip
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, assert_one_clear_line, script, started
from tiny_runs import bigram_model, make_run

import generate
from config import TokenizerConfig
from kindling.errors import KindlingError
from kindling.generation.sampling import GenerationError, Sampling
from kindling.tokenization.tokenizer import Tokenizer
from kindling.tokenization.train_tokenizer import train_bpe

COUNTS = {"1": "2", "2": "3", "3": None, "x": "x", "\n": "\r", "\r": "1"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["no merges"], TokenizerConfig(), 261)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer) -> Path:
    """A folder with a run that counts to three, and says x for ever after an x."""
    folder = tmp_path_factory.mktemp("generate")
    make_run(folder / "runs/counts", tokenizer, bigram_model(tokenizer, COUNTS, 64), kind="local-python")
    return folder


@pytest.fixture
def ask(runs, capsys, monkeypatch):
    """Return a function that runs the script in this process and returns what it printed."""

    def run(*flags: str, stdin: bytes = b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="ascii"))
        capsys.readouterr()
        assert generate.main([str(runs / "runs/counts"), "--device", "cpu", *flags]) == 0
        return capsys.readouterr()

    return run


def test_the_prompt_and_its_continuation_are_printed_with_a_line_end(ask):
    assert ask("--prompt", "1").out == "123\n"
    assert ask("--prompt", "a1", "--stop", "3").out == "a12\n"
    assert ask("--prompt", "xx", "--max-new-tokens", "3").out == "xxxxx\n"
    assert ask("--prompt", "None1", "--n", "2", "--seed", "5").out == (
        "--- sample 1, seed 5\nNone123\n--- sample 2, seed 6\nNone123\n"
    )


def test_a_person_is_told_how_fast_it_went_and_why_it_ended(ask, monkeypatch):
    for flags, ended in (
        (["1"], "the end of text"),
        (["1", "--max-new-tokens", "2"], "--max-new-tokens 2"),
        (["1", "--stop", "4", "3"], "a stop string"),
    ):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        told = ask("--prompt", *flags).err
        assert re.fullmatch(rf"2 tokens in [\d.]+ s, [\d,]+ tokens/s; ended by {ended}\n", told)


def test_any_prompt_is_a_text_and_none_is_a_new_document():
    assert generate.parse(["--prompt", "None"]).prompt == "None"
    assert generate.parse([]).prompt is None


@pytest.mark.parametrize(
    ("flags", "temperature", "top_k", "max_new_tokens"),
    [
        ([], 0.8, 50, 200),
        (["--mode", "autocomplete"], 0.2, 10, 200),
        (["--complete", "x"], 0.2, 10, 64),
        (["--complete", "x", "--mode", "creative"], 0.8, 50, 64),
        (["--complete", "x", "--temperature", "0.8", "--top-k", "None", "--max-new-tokens", "200"], 0.8, None, 200),
    ],
)
def test_a_mode_gives_what_is_not_given_explicitly(flags, temperature, top_k, max_new_tokens):
    expected = Sampling(temperature=temperature, top_k=top_k, max_new_tokens=max_new_tokens, seed=3, stop=("a", "b"))
    assert generate.parse([*flags, "--seed", "3", "--stop", "a", "b"]).sampling == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt", "a", "--chat"], "--prompt and --chat are; leave one out"),
        (["--prompts", "a", "--complete", "b"], "--prompts and --complete are; leave one out"),
        (["--prompt", ""], "--prompt must have at least one character, but is empty; leave it out"),
        (["--n", "0"], "--n must be at least 1"),
        (["--n", "2", "--seed", str(2**63 - 1)], "seeds below 2\\*\\*63"),
        (["--n", "2", "--complete", "a"], "--n must be 1 with --complete, but is 2"),
        (["--n", "2", "--chat"], "--n must be 1 with --chat, but is 2"),
        (["--stop", ""], "--stop must be a string of at least one character"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_in_one_line(flags, words):
    with pytest.raises(GenerationError, match=words) as e:
        generate.parse(flags)
    assert "\n" not in str(e.value)


# --- the end of a file


def test_only_what_is_new_is_printed_so_that_an_editor_can_append_it(ask, tmp_path):
    file = tmp_path / "a.py"
    file.write_bytes("# é\n1".encode())
    assert ask("--complete", str(file)).out == "23\n"  # with a newline, as a text has at its end
    assert ask("--complete", "-", stdin=b"\xef\xbb\xbf1").out == "23\n"
    assert ask("--complete", "-", "--stop", "3", stdin=b"1").out == "2\n"
    assert file.read_bytes() == "# é\n1".encode(), "the file itself is not touched"


def test_line_ends_are_those_of_the_file(ask):
    assert ask("--complete", "-", stdin=b"a\r\n1\n").out == "\r123\n"


def test_a_long_file_is_read_at_its_end_with_a_note(ask):
    printed = ask("--complete", "-", stdin=b"x" * 100 + b"1")
    assert printed.out == "23\n" and "of the 101 tokens of the text, the last 32 are read" in printed.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "but .* is not \\(No such file or directory\\); name one"),
        ("a folder", "but .* is not \\(Is a directory\\)"),
        (b"", "have at least one character, but .* is empty"),
        (b"ab\xffc", "be text in UTF-8, but .* is not at byte 2; convert it"),
    ],
)
@pytest.mark.parametrize("flag", ["--complete", "--prompts"])
def test_a_file_that_is_no_text_is_refused_in_one_line(tmp_path, content, words, flag):
    path = tmp_path / "file"
    if content == "a folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(GenerationError, match=f"^{flag} must .*{words}") as e:
        generate.read_prompts(path) if flag == "--prompts" else generate.read_text(path, flag)
    assert "\n" not in str(e.value)


# --- many prompts


def test_prompts_of_a_file_come_out_in_order_as_json_lines(ask, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("x", "é\n1", "1" * 62, "y" * 70 + "1", "")[:4]))
    printed = ask("--prompts", str(file), "--n", "2", "--max-new-tokens", "5", "--stop", "3", "--seed", "7")
    rows = [json.loads(line) for line in printed.out.splitlines()]
    expected = [("x", "xxxxx", "limit"), ("é\n1", "2", "stop"), ("1" * 62, "2", "stop"), ("y" * 70 + "1", "2", "stop")]
    assert rows == [
        {"prompt": prompt, "seed": seed, "completion": completion, "ended_by": ended_by}
        for prompt, completion, ended_by in expected
        for seed in (7, 8)
    ]
    assert "é" in printed.out and "1 of 4 prompts are longer than the context of 64 tokens" in printed.err


@pytest.mark.parametrize("name", ["p.json", "p.jsonl.gz", "p.ndjson"])
def test_prompts_are_rows_in_every_form_that_rows_have(tmp_path, name):
    rows = [{"prompt": "a"}, {"prompt": "\n b"}]
    lines = "\r\n".join(map(json.dumps, rows)) + "\r\n\r\n"
    content = {"p.json": json.dumps(rows).encode(), "p.jsonl.gz": gzip.compress(lines.encode())}
    (tmp_path / name).write_bytes(content.get(name, b"\xef\xbb\xbf" + lines.encode()))
    assert generate.read_prompts(tmp_path / name) == ["a", "\n b"]
    (tmp_path / "cut.jsonl").write_bytes(gzip.compress(lines.encode())[:-9])
    with pytest.raises(GenerationError, match="--prompts must be a readable file"):
        generate.read_prompts(tmp_path / "cut.jsonl")


def test_what_ends_a_text_is_said(ask, tmp_path):
    file = tmp_path / "prompts"
    file.write_bytes(b"1\r\n" + b"x" * 60 + b"\nx\n")
    rows = [json.loads(line) for line in ask("--prompts", str(file), "--max-new-tokens", "9").out.splitlines()]
    assert [(row["prompt"][:2], row["completion"], row["ended_by"]) for row in rows] == [
        ("1", "23", "end of text"),
        ("xx", "xxxx", "context"),
        ("x", "x" * 9, "limit"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p", "a\n\nb\n", "line 2 of .* must hold a prompt, but is empty; correct it or take it out"),
        ("p", "a\n  \n", "line 2 .* is empty"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', 'line 2 .* text `prompt` .*but is \'{"text": "b"}\''),
        ("p.jsonl", '{"prompt": ""}\n', "line 1 .*at least one character"),
        ("p.jsonl", "[1]\n", "line 1"),
        ("p.jsonl", '{"prompt": 1}\n', "line 1"),
        ("p.jsonl", '{"prompt": "a"}\n\nnot json\n', "line 3 .*but is not JSON"),
        ("p.json", '[{"prompt": "a"}, {"prompt": null}]', "line 1 .*but is"),
        ("p.jsonl", "\n", "at least one prompt"),
        ("p.jsonl", "[" * 100_000, "line 1 .*nested too deeply"),
    ],
)
def test_a_bad_line_of_a_file_of_prompts_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(GenerationError, match=words) as e:
        generate.read_prompts(tmp_path / name)
    assert "\n" not in str(e.value) and len(str(e.value).replace(str(tmp_path), "")) < 300


def test_a_prompt_that_the_tokenizer_cannot_hold_is_named_by_its_line(ask, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "\\ud800"}\n')
    with pytest.raises(GenerationError, match=r"line 2 of .*lone surrogate"):
        ask("--prompts", str(tmp_path / "p.jsonl"))


# --- the real script


def test_text_reaches_a_pipe_as_it_is_sampled_and_ctrl_c_ends_it_on_a_new_line(runs):
    flags = ("--device", "cpu", "--prompt", "x", "--max-new-tokens", "10000000")
    process = started("generate.py", "runs/counts", *flags, cwd=runs)
    try:
        begun = b""
        while len(begun) < 3:  # the prompt and a part of a text that would take hours
            assert select.select([process.stdout], [], [], 300)[0]
            begun += process.stdout.read(100)
        os.kill(process.pid, signal.SIGINT)
        rest, err = process.communicate()
    finally:
        process.kill()
    assert (process.returncode, err) == (130, b"interrupted\n")
    assert re.fullmatch(rb"x+\n", begun + rest)


def test_a_run_that_is_not_there_is_one_clear_line(tmp_path, monkeypatch):
    said = script("generate.py", "runs/none", "--prompt", "x", cwd=tmp_path)
    known = ", ".join(sorted(str(found.parent) for found in (ROOT / "runs").glob("*/config.yaml")))  # of this checkout
    assert_one_clear_line(said, "runs/none", f"there are: {known or 'none'}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KindlingError, match=r"python main\.py"):
        generate.main(["--prompt", "x"])
    assert not list(tmp_path.iterdir())


def test_help_imports_nothing_that_takes_long():
    code = "import sys, generate\ntry: generate.main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    loaded = set(result.stdout.splitlines()[-1].split())
    assert "tyro" in loaded and not loaded & {"torch", "numpy", "pydantic", "typeguard", "tokenizers"}

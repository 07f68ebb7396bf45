import fcntl
import io
import os
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from conftest import ROOT, assert_one_clear_line, script, started
from tiny_runs import bigram_model, make_run

import generate
from config import TokenizerConfig
from kindling.data.prompts import Exchange, encode, prompt_text
from kindling.errors import KindlingError
from kindling.generation import completion
from kindling.generation.chat import converse, read_question
from kindling.tokenization.tokenizer import Tokenizer
from kindling.tokenization.train_tokenizer import train_bpe


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["no merges"], TokenizerConfig(), 261)


ENDS = {"\n": "Y", "Y": "e", "e": "s", "s": None}
ENDLESS = {"\n": "Y", "Y": "e", "e": "s", "s": "Y"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer) -> Path:
    """A folder with runs: `yes` was fine-tuned on single exchanges, `talk` on conversations, `on` never stops."""
    folder = tmp_path_factory.mktemp("chat")
    make_run(folder / "runs/yes", tokenizer, bigram_model(tokenizer, ENDS, 512))
    make_run(folder / "runs/talk", tokenizer, bigram_model(tokenizer, ENDS, 512), max_exchanges=4)
    make_run(folder / "runs/on", tokenizer, bigram_model(tokenizer, ENDLESS, 8192))
    make_run(folder / "runs/base", tokenizer, bigram_model(tokenizer, ENDS, 512), kind="local-python")
    return folder


# --- over a pipe


def piped(runs: Path, name: str, text: bytes, *flags: str) -> subprocess.CompletedProcess:
    """The real script with questions from a pipe, which must have room for them."""
    pipe = f"import os; out, into = os.pipe(); os.write(into, {text!r}); os.close(into); os.dup2(out, 0)"
    return script("generate.py", f"runs/{name}", "--chat", "--device", "cpu", *flags, cwd=runs, before=pipe)


def test_questions_from_a_pipe_are_answered_line_by_line_and_nothing_else_is_printed(runs):
    bad = b"bytes \xff\xfe that are no UTF-8\n\n  \n<|endoftext|>\nReturn it.\\\ndef f():\n\xed\xa0\x80 and no line end"
    result = piped(runs, "yes", bad)
    assert (result.returncode, result.stdout, result.stderr) == (0, "Yes\n" * 4, "")


def test_a_cut_answer_and_a_refused_question_are_a_line_on_stderr_and_the_chat_goes_on(runs):
    result = piped(runs, "on", b"first\n" + b"long " * 2000 + b"\nlast\n", "--max-new-tokens", "4")
    assert (result.returncode, result.stdout) == (0, "YesY\nYesY\n")
    first, refused, last = result.stderr.splitlines()
    assert first == last == "note: the answer was cut by --max-new-tokens 4"
    assert refused.startswith("error: a question must leave room") and "shorten it" in refused


def test_an_answer_reaches_a_pipe_as_it_is_written_and_ctrl_c_ends_it(runs):
    flags = ("--chat", "--device", "cpu", "--max-new-tokens", "100000")
    process = started("generate.py", "runs/on", *flags, cwd=runs)
    try:
        process.stdin.write(b"One\nTwo\n")
        assert select.select([process.stdout], [], [], 300)[0]
        begun = process.stdout.read(100)
        assert b"Yes".startswith(begun[:3]) and b"\n" not in begun  # the whole answer would take minutes
        os.kill(process.pid, signal.SIGINT)
        rest, err = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 130 and b"\n" not in rest and err == b"interrupted\n"


def test_a_base_run_and_a_prompt_are_each_refused_in_one_line(runs):
    result = script("generate.py", "runs/base", "--chat", cwd=runs)
    assert_one_clear_line(result, "runs/base must be a fine-tuned run", "`python sft_train.py runs/base`")
    result = script("generate.py", "runs/yes", "--chat", "--prompt", "def f():", cwd=runs)
    assert_one_clear_line(result, "at most one of", "--prompt and --chat are", "leave one out")
    assert result.stdout == ""


# --- in this process, with what the model is asked


@pytest.fixture
def talk(runs, monkeypatch, capsys):
    """Return a function that chats with a run, and gives the prompts and the settings of each answer and what was printed."""

    def run(name: str, text: str, *flags: str):
        asked, samplings, sampled = [], [], completion.stream

        def spy(model, ids, sampling, eos_id, allowed):
            asked.append(list(ids))
            samplings.append(sampling)
            return sampled(model, ids, sampling, eos_id, allowed)

        monkeypatch.setattr(completion, "stream", spy)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode("utf-8")), encoding="ascii"))
        assert generate.main([str(runs / "runs" / name), "--chat", "--device", "cpu", *flags]) == 0
        monkeypatch.setattr(completion, "stream", sampled)
        return asked, samplings, capsys.readouterr()

    return run


def ids_of(tokenizer, *exchanges: Exchange) -> list[int]:
    return [token for segment in encode("alpaca", exchanges, tokenizer) for part in segment for token in part]


def test_earlier_exchanges_are_part_of_the_prompt_where_the_run_saw_conversations(talk, tokenizer):
    one, two, three = "One\ndef one():", "Two", "Three"
    asked, _, printed = talk("talk", "One\\\ndef one():\nTwo\n/new\nThree\n")
    assert asked == [
        ids_of(tokenizer, Exchange(one)),
        ids_of(tokenizer, Exchange(one, "Yes"), Exchange(two)),
        ids_of(tokenizer, Exchange(three)),
    ]
    assert asked[1].count(tokenizer.eos_id) == 1 and printed.out == "Yes\n" * 3


def test_each_question_stands_alone_where_the_run_saw_single_exchanges(talk, tokenizer):
    asked, _, _ = talk("yes", "One\nTwo\n")
    assert asked == [ids_of(tokenizer, Exchange("One")), ids_of(tokenizer, Exchange("Two"))]


def test_questions_are_utf_8_whatever_stdin_is_set_to(talk, tokenizer):
    asked, _, _ = talk("yes", "naïve 🦆\n")
    assert asked == [ids_of(tokenizer, Exchange("naïve 🦆"))]


def test_what_spells_a_control_token_is_asked_as_text(talk, tokenizer):
    asked, _, _ = talk("yes", "a<|endoftext|>b\n")
    assert tokenizer.eos_id not in asked[0]
    assert tokenizer.decode(asked[0]) == prompt_text("alpaca", Exchange("a<|endoftext|>b"))


def test_each_answer_has_a_seed_of_its_own(talk):
    _, samplings, _ = talk("yes", "One\nOne\n/new\nOne\n", "--seed", "7")
    assert [s.seed for s in samplings] == [7, 8, 9]


def test_a_memory_leaves_a_quarter_of_the_context_for_the_answer(talk, capsys):
    asked, _, printed = talk(
        "talk", "".join(f"Question {i}: {'x' * 60}\n" for i in range(6)), "--max-new-tokens", "999"
    )
    assert max(map(len, asked)) <= 512 * 3 // 4 and len(asked[-1]) > 256
    assert printed.out == "Yes\n" * 6
    assert re.findall(r"note: the (.*) left out", printed.err)[-1] == "4 oldest exchanges are"


# --- the loop alone


class Person:
    """Gives the lines, one a prompt; an exception among them is raised."""

    def __init__(self, *lines: str | type[BaseException]):
        self.lines, self.prompts = list(lines), []

    def __call__(self, prompt: str) -> str:
        self.prompts.append(prompt)
        line = self.lines.pop(0) if self.lines else EOFError
        if isinstance(line, str):
            return line
        raise line


class Model:
    """Replies by saying the pieces; an exception among them is raised."""

    def __init__(self, *pieces: str | BaseException):
        self.pieces, self.asked = pieces, []

    def __call__(self, exchanges, number, say) -> str:
        self.asked.append((number, list(exchanges)))
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            say(piece)
        return ""


@pytest.mark.parametrize(
    ("lines", "question", "prompts"),
    [
        (["one"], "one", ["> "]),
        (["  one \\", "    two\\", "three "], "one \n    two\nthree", ["> ", "... ", "... "]),
        (["one\\"], "one", ["> ", "... "]),  # the input ends in the middle
        (["\\", "one"], "one", ["> ", "... "]),
    ],
)
def test_a_line_that_ends_in_a_backslash_goes_on_in_the_next(lines, question, prompts):
    person = Person(*lines)
    assert read_question(person) == question and person.prompts == prompts


def test_ctrl_c_in_an_answer_keeps_what_was_said_and_the_chat_alive(capsys):
    model = Model("Ye", "s", KeyboardInterrupt())
    converse(Person("One", "Two"), model, remembers=True, interactive=True)
    assert model.asked == [(0, [Exchange("One")]), (1, [Exchange("One", "Yes"), Exchange("Two")])]
    assert capsys.readouterr().out == "Yes\nYes\n\n"


def test_ctrl_c_before_the_first_word_forgets_the_question(capsys):
    model = Model(KeyboardInterrupt())
    converse(Person("One", "Two"), model, remembers=True, interactive=True)
    assert model.asked == [(0, [Exchange("One")]), (1, [Exchange("Two")])]


def test_an_answer_of_no_words_is_forgotten_since_nothing_would_close_it():
    model = Model()
    converse(Person("One", "Two"), model, remembers=True, interactive=False)
    assert model.asked[1] == (1, [Exchange("Two")])


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_ctrl_d_and_ctrl_c_at_the_prompt_end_the_chat_with_a_new_line(capsys, end):
    converse(Person("One", end, "never"), Model("Yes"), remembers=True, interactive=True)
    assert capsys.readouterr().out == "Yes\n\n"


def test_ctrl_c_ends_a_chat_from_a_pipe():
    model = Model(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        converse(Person("One", "Two"), model, remembers=True, interactive=False)
    assert len(model.asked) == 1


def test_a_question_that_cannot_be_answered_is_forgotten(capsys):
    model = Model(KindlingError("it is too long"))
    converse(Person("One", "Two"), model, remembers=True, interactive=True)
    assert model.asked == [(0, [Exchange("One")]), (0, [Exchange("Two")])]
    assert capsys.readouterr().err == "error: it is too long\n" * 2


# --- at a terminal


class Terminal:
    """The real script at a terminal of its own, on which keys are pressed."""

    def __init__(self, runs: Path, *flags: str):
        self.fd, its = os.openpty()

        def at_the_terminal():
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job would ignore it
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches it as a signal

        command = [sys.executable, str(ROOT / "generate.py"), *flags, "--chat", "--device", "cpu"]
        self.process = subprocess.Popen(
            command,
            cwd=runs,
            stdin=its,
            stdout=its,
            stderr=its,
            preexec_fn=at_the_terminal,
            env={**os.environ, "TERM": "dumb", "INPUTRC": os.devnull},
        )
        os.close(its)
        self.shown = ""

    def wait_for(self, text: str, timeout_s: float = 300) -> str:
        """Return what is shown up to and with `text`, which what comes next is then without."""
        deadline = time.monotonic() + timeout_s
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            if select.select([self.fd], [], [], 0.1)[0]:
                self.shown += os.read(self.fd, 65536).decode("ascii", "replace")
        before, self.shown = self.shown.split(text, 1)
        return before + text

    def press(self, keys: bytes) -> None:
        os.write(self.fd, keys)

    def press_until_it_ends(self, key: bytes) -> int:
        """Return the exit code. A Ctrl-C in the moment before readline waits for keys is only seen with the next one.

        When a new line shows that it was seen, the process ends in its own time: another Ctrl-C would disturb that.
        """
        for _ in range(40):
            self.press(key)
            try:
                self.wait_for("\n", timeout_s=3)
            except (AssertionError, OSError):  # OSError: it has ended, and its terminal with it
                if self.process.poll() is None:
                    continue
            return self.process.wait(timeout=300)
        raise AssertionError(f"{key!r} does not end it")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.fd)


@pytest.fixture
def terminal(runs):
    opened = []

    def start(*flags: str) -> Terminal:
        opened.append(Terminal(runs, *flags))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def test_at_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_ends_the_chat(terminal):
    it = terminal("runs/on", "--max-new-tokens", "100000")
    introduction = it.wait_for("\n> ")
    for words in ("runs/on, template alpaca", "/new", "Ctrl-D", "backslash", "each question stands alone"):
        assert words in introduction
    assert introduction.count("\n") == 1
    for question in (b"One\r", b"Two\\\rdef two():\r"):
        it.press(question)
        it.wait_for("YesYesYes")  # it streams: the whole answer would take minutes
        it.press(b"\x03")
        it.wait_for("\n> ")
        assert it.process.poll() is None
    assert it.press_until_it_ends(b"\x04") == 0


def test_nothing_is_left_for_torch_to_import_in_an_answer_where_ctrl_c_would_break_it(runs):
    code = (
        "import sys, generate\n"
        "from kindling.generation import chat\n"
        "def answers(name, reply, remembers):\n"
        "    before = set(sys.modules)\n"
        "    reply([chat.Exchange('One')], 0, lambda piece: None)\n"
        "    print(sorted(set(sys.modules) - before))\n"
        "chat.chat = answers\n"
        "generate.main(['runs/yes', '--chat', '--device', 'cpu'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=runs,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (0, "[]\n"), result.stderr


def test_at_a_terminal_ctrl_c_at_the_prompt_ends_the_chat(terminal):
    it = terminal("runs/talk")
    assert "stands alone" not in it.wait_for("\n> ")
    it.press(b"One\xff\r")
    assert "Yes" in it.wait_for("\n> ")
    assert it.press_until_it_ends(b"\x03") == 0

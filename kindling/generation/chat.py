"""The terminal's side of `python generate.py RUN --chat`: questions in, answers out as they are written.

It has no model, only a function that replies. When stdin is a pipe, each line is a question, and only the answers go to
stdout. Limit: in a question of several lines, each line but the last must end in a backslash, also when it is pasted.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable

from kindling.data.prompts import Exchange
from kindling.errors import KindlingError
from kindling.output import TextPrinter

# takes the exchanges, the number of the answer and a function for each piece of it; returns what cut the answer, or ""
Reply = Callable[[list[Exchange], int, Callable[[str], None]], str]


def chat(name: str, reply: Reply, remembers: bool) -> None:
    """Answer the questions on stdin until they end. In a terminal, also print an introduction and a prompt."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # in any locale, as for --prompt
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # Windows has no readline
            import readline  # noqa: F401, gives input() editing and the earlier questions
        alone = "" if remembers else "; each question stands alone: the run was fine-tuned on single exchanges"
        print(
            f"{name}: /new starts over, Ctrl-D ends; a line that ends in a backslash goes on in the next{alone}",
            flush=True,
        )
    converse(lambda prompt: input(prompt if interactive else ""), reply, remembers, interactive)


def converse(ask: Callable[[str], str], reply: Reply, remembers: bool, interactive: bool) -> None:
    """Print a reply to each question that `ask` returns, until it raises EOFError.

    `remembers`: earlier exchanges are part of the next prompt. `interactive`: Ctrl-C stops the answer, or ends the chat while
    it waits for a question. Otherwise Ctrl-C ends everything, as nothing else could.
    """
    history: list[Exchange] = []
    number = 0
    try:
        while True:
            question = read_question(ask)
            if question == "/new":
                history.clear()
            elif question:
                said, number = _answer([*history, Exchange(question)], reply, number, interactive)
                if remembers and said:  # in the template, an exchange without a response would stay open
                    history.append(Exchange(question, said))
    except EOFError:
        pass
    except KeyboardInterrupt:
        if not interactive:
            raise
    if interactive:
        print()


def read_question(ask: Callable[[str], str]) -> str:
    """Return the next question, stripped. A line that ends in a backslash continues in the next. Raises EOFError at the end."""
    lines: list[str] = []
    try:
        while (line := ask("... " if lines else "> ")).endswith("\\"):
            lines.append(line[:-1])
        lines.append(line)
    except EOFError:
        if not lines:
            raise
    return "\n".join(lines).strip()


def _answer(exchanges: list[Exchange], reply: Reply, number: int, interactive: bool) -> tuple[str, int]:
    """Print the answer; return its text (as much as was printed) and the number of the next one."""
    said: list[str] = []
    out = TextPrinter()

    def say(piece: str) -> None:
        said.append(piece)
        out(piece)

    cut_by = ""
    try:
        cut_by = reply(exchanges, number, say)
    except KeyboardInterrupt:
        if not interactive:
            raise
    except KindlingError as e:  # a question that is too long or cannot be encoded must not end the chat
        print(f"error: {e}", file=sys.stderr)
        return "", number
    out.end()
    if cut_by:
        print(f"note: the answer was cut by {cut_by}", file=sys.stderr)
    return "".join(said), number + 1

"""Cuts the program out of what a model wrote, by parsing it.

    program = from_completion(prompt, text, "add")
    program = from_answer(head, answer, "add")

A base model goes on and on: of its continuation the program is what stands up to the end of the function that is asked for.
No stop words: a line at the left margin ends the function only if what precedes it is whole, so that neither a string nor
a bracket that reaches the margin cuts it short. Limits: a helper that the model writes behind the function is not seen. The
texts are strangers', and parsing can kill a process: call this in a worker.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings

from docstrings import is_placeholder

ERRORS = (SyntaxError, ValueError, MemoryError, RecursionError, OverflowError)  # what parsing can raise
MAX_CHARS = 2**16  # longer texts are no programs of a small model
TRIES = 3  # lines at the margin that may follow a function that does not parse
_MARGIN = re.compile(r"^(?=[^\s#])", re.MULTILINE)  # where a line begins at the left margin, comments apart
_FENCE = re.compile(r"^```[^\n`]*\n(.*?)(?:^```|\Z)", re.MULTILINE | re.DOTALL)


def parsed(text: str) -> ast.Module | None:
    """Return the syntax tree of a text, or None if it has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except ERRORS:
        return None


def function(tree: ast.Module | None, name: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """Return the first function of that name at the top of a module."""
    nodes = [] if tree is None else tree.body
    return next((n for n in nodes if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) and n.name == name), None)


def is_trivial(text: str, name: str) -> bool:
    """Return whether a function does nothing: no statement but its docstring, `pass`, `...` and NotImplementedError.

    Without a name, whether the whole text does nothing.
    """
    tree = parsed(text)
    node = function(tree, name) if name else tree
    return node is None or all(map(is_placeholder, node.body))


def end_of_function(text: str, start: int, name: str) -> int | None:
    """Return where the program ends whose function `name` is open or still to come at `start`, or None if it goes on.

    It ends before a line at the left margin when all before it parses and holds the function; or, whether it parses or
    not, at the first of TRIES such lines behind the function's own, since it will not be mended.
    """
    own = _definition(name).search(text) if name else None
    margins = [m.start() for m in _MARGIN.finditer(text) if m.start() > start and own and m.start() > own.start()]
    for margin in margins:
        if function(parsed(text[:margin]), name) is not None:
            return margin
    return margins[0] if len(margins) >= TRIES else None


def _definition(name: str) -> re.Pattern[str]:
    return re.compile(rf"^(async +)?def +{re.escape(name)}\b", re.MULTILINE)


def from_completion(head: str, completion: str, name: str, cut_short: bool = False) -> str:
    """Return the program that a continuation of `head` is.

    `cut_short`: the text was ended by a limit, so that its last line may be half of one and is left out if it must be.
    """
    text = (head + completion)[:MAX_CHARS]
    end = end_of_function(text, len(head), name)
    if end is not None:
        return text[:end].rstrip() + "\n"
    if cut_short and parsed(text) is None and "\n" in completion:
        whole_lines = text[: text.rindex("\n") + 1]
        if parsed(whole_lines) is not None:
            return whole_lines
    return text


def from_answer(head: str, answer: str, name: str, cut_short: bool = False) -> str:
    """Return the program that an answer to an instruction is: its code block, the function in its text, or a body.

    `head` is the code of the problem up to the end of the function's docstring, or empty: what precedes the function
    there, such as imports, is put before a function, and the whole of it before a body.
    """
    blocks = [m[1] for m in _FENCE.finditer(answer)] or [answer]
    node = function(parsed(head), name)
    before = "" if node is None else "".join(head.splitlines(keepends=True)[: node.lineno - 1])
    for block in blocks:
        block = textwrap.dedent(block.replace("\r\n", "\n"))
        if name and _definition(name).search(block):
            code = re.compile(r"^(?:@|def |async def |class |import |from |[A-Za-z_]\w* *=)", re.MULTILINE).search(
                block
            )
            assert code is not None
            return from_completion("", before + block[code.start() :], name, cut_short)
    if not head:
        return from_completion("", blocks[0], name, cut_short)
    body = textwrap.dedent(blocks[0].replace("\r\n", "\n")).strip("\n")
    return from_completion(head, textwrap.indent(body, "    ") + "\n", name, cut_short)

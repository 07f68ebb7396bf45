"""Extracts the program from generated text.

    program = extract_from_completion(prompt, text, "add")
    program = extract_from_answer(head, answer, "add")

A base model does not stop after the program. The program is the text up to the end of the requested function, and the helpers
directly after it that it uses. There are no stop words: a line at the left margin ends the function, unless the line is inside
a string or a bracket. The text is parsed only to tell code from prose in an answer, to find how a body is indented, and to
tell half a line from a whole one. Limits: a function inside a class is not found; helpers must be plain functions or classes.
The text is untrusted, and parsing it can kill the process: call this in a worker. Only `end_of_function` parses nothing.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator

from kindling.data.docstrings import is_placeholder
from kindling.data.filters import compiled, syntax_error

ERRORS = (SyntaxError, ValueError, MemoryError, RecursionError, OverflowError)  # that parsing can raise
MAX_CHARS = 2**16  # a small model writes no longer programs
# the tokens of Python that decide where a line of code begins; an unclosed one-line string ends with its line
_TOKEN = re.compile(
    r"(?P<margin>^(?=[^\s#]))|(?P<open>[(\[{])|(?P<close>[)\]}])|(?P<joined>\\\r?\n)|#[^\n]*+"
    r'|"""(?:[^"\\]|\\.|"(?!""))*+(?:"""|\\?\Z)'
    r"|'''(?:[^'\\]|\\.|'(?!''))*+(?:'''|\\?\Z)"
    r'|"(?:[^"\\\n]|\\\r?.)*+"?'
    r"|'(?:[^'\\\n]|\\\r?.)*+'?",
    re.MULTILINE | re.DOTALL,
)
_NAMED = re.compile(r"(?:async +def|def|class) +(\w+)")
_FENCE = re.compile(r"^([ \t]*)```[^\n`]*\n(.*?)(?:^\1```|\Z)", re.MULTILINE | re.DOTALL)
_STATEMENT = re.compile(r"(?:@|(?:async|def|class|import|from|try|if|for|with)\b|[A-Za-z_]\w*(?: *:[^=\n]*)? *=)")


def parse_or_none(text: str) -> ast.Module | None:
    """Return the syntax tree of a text, or None if it cannot be parsed."""
    try:
        return compiled(text, ast.PyCF_ONLY_AST)
    except ERRORS:
        return None


def function(tree: ast.Module | None, name: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """Return the first function of that name at the top of a module."""
    nodes = [] if tree is None else tree.body
    return next((n for n in nodes if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) and n.name == name), None)


def is_empty(text: str, head: str, name: str) -> bool:
    """Return whether a program lacks the function `name`, or its body has no statement beyond those in `head`.

    With an empty name: whether the text has no statement.
    """
    tree = parse_or_none(text)
    node = function(tree, name) if name else tree
    given = function(parse_or_none(head), name)
    own, shown = ([] if n is None else list(map(ast.dump, n.body)) for n in (node, given))
    return not (own[len(shown) :] if own[: len(shown)] == shown else own)


def is_trivial(text: str, name: str) -> bool:
    """Return whether a function does nothing: it has only a docstring, `pass`, `...` or NotImplementedError.

    With an empty name: whether the whole text does nothing.
    """
    tree = parse_or_none(text)
    node = function(tree, name) if name else tree
    return node is None or all(map(is_placeholder, node.body))


def end_of_function(text: str, start: int, name: str) -> int | None:
    """Return where the program ends, or None if it may continue. At `start`, its function `name` is open or not yet begun.

    More text after the end does not change the result.
    """
    ends, goes_on = _ends(text, start, name)
    return None if goes_on else ends[-1]


def _ends(text: str, start: int, name: str) -> tuple[list[int], bool]:
    """Return where the function and each helper after it end, and whether the text after that may still belong to them."""
    own, ends = None, []
    for margin in _margins(text):
        if own is None:
            own = margin if _defines(text, margin, name) else None
        elif margin > start:
            ends.append(margin)
            if "\n" not in text[margin:]:  # half a line can become anything
                return ends, True
            helper = _NAMED.match(text, margin)
            earlier = text[own:margin]
            if helper is None or not _uses(earlier, helper[1]):
                return ends, False
    return ends, True


def _margins(text: str) -> Iterator[int]:
    """Yield the positions where a line of code begins at the left margin, outside strings, brackets and comments."""
    depth, joined = 0, -1
    for token in _TOKEN.finditer(text):
        kind = token.lastgroup
        if kind == "open":
            depth += 1
        elif kind == "close":
            depth = max(0, depth - 1)
        elif kind == "joined":
            joined = token.end()
        elif kind == "margin" and depth == 0 and token.start() != joined:
            yield token.start()


def _defines(text: str, position: int, name: str) -> bool:
    match = _NAMED.match(text, position)
    return match is not None and match[1] == name and not match[0].startswith("class")


def _uses(code: str, name: str) -> bool:
    """Return whether code uses a name and does not define it."""
    code = _TOKEN.sub(lambda token: token[0] if token.lastgroup else " ", code)  # without strings and comments
    found = [m[0] for m in re.finditer(rf"(?:\b(?:def|class) +)?\b{re.escape(name)}\b", code)]
    return bool(found) and found.count(name) == len(found)


def extract_from_completion(head: str, completion: str, name: str, cut_short: bool = False) -> str:
    """Return the program: `head` and the part of the completion that belongs to it.

    `cut_short`: a limit ended the text, so its last line may be incomplete and is left out where that is needed to parse it.
    """
    text = (head + completion)[:MAX_CHARS]
    ends, goes_on = _ends(text, len(head), name)
    if not ends:
        if cut_short and "\n" in completion and parse_or_none(text) is None:
            whole_lines = text[: text.rindex("\n") + 1]
            return text if parse_or_none(whole_lines) is None else whole_lines
        return text
    # a helper that is broken or incomplete is left out, and the function is kept
    if goes_on and _NAMED.match(text, ends[-1]) and "\n" in text[ends[-1] :]:
        ends.append(len(text))
    return text[: next((end for end in reversed(ends) if parse_or_none(text[:end]) is not None), ends[0])]


def extract_from_answer(head: str, answer: str, name: str, cut_short: bool = False) -> str:
    """Return the program in an answer to an instruction: a function in a code block or in the text, or only a body.

    `head` is the problem's code up to the end of the function's docstring, or empty. If the answer has a function, the code
    before the function in `head`, such as imports, is put before it. If the answer is a body, the whole `head` is.
    """
    answer = answer[:MAX_CHARS]
    node = function(parse_or_none(head), name)
    before = "" if node is None else "".join(head.splitlines(keepends=True)[: node.lineno - 1])
    blocks = [m[2] for m in _FENCE.finditer(answer)]
    programs = []
    for block in [*blocks, answer]:
        code = _from_definition(block, name)
        if code is not None:
            programs.append(extract_from_completion("", before + code, name, cut_short))
    if programs:  # a block may only repeat the question
        return next((program for program in programs if not is_trivial(program, name)), programs[0])
    block = re.sub(r"\A(?:[ \t\r]*\n)+", "", blocks[0] if blocks else answer)
    if not head or _is_module(block):  # not a body
        return extract_from_completion("", before + block, name, cut_short)
    bodies = [extract_from_completion(head, body, name, cut_short) for body in _indented(block)]
    return next((program for program in bodies if parse_or_none(program) is not None), bodies[0])


def _from_definition(block: str, name: str) -> str | None:
    """Return the code from the first statement on that belongs to the function; None if the function is not defined."""
    for text in (block, block.lstrip(), textwrap.dedent(block)):
        starts = [m.start() for m in re.finditer(r"^", text, re.MULTILINE) if _STATEMENT.match(text, m.start())]
        own = next((start for start in starts if _defines(text, start, name)), None)
        if own is not None:  # prose can begin like a statement, but it rarely parses
            candidates = (s for s in starts if s < own and parse_or_none(f"{text[s:own]}def f(): pass") is not None)
            return text[next(candidates, own) :]
    return None


def _is_module(code: str) -> bool:
    """Return whether code defines functions or classes, and is not a body without its indentation."""
    nodes = getattr(parse_or_none(code), "body", [])
    is_any = any(isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) for node in nodes)
    return is_any and syntax_error(code) is None  # compile() refuses a `return` outside functions, ast.parse() does not


def _indented(body: str) -> Iterator[str]:
    """Yield the possible indentations of a body, the most likely first."""
    if body[:1].isspace():
        yield body
    yield textwrap.indent(textwrap.dedent(body), "    ")
    if not re.match(r"[^\n]*\n\S", body):  # only the first line has lost its indentation
        yield "    " + body.lstrip()

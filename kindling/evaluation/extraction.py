"""Extracts the program from generated text.

    program = extract_from_completion(prompt, text, "add")

A base model does not stop after the program. The program is the text up to the end of the requested function, and the helpers
directly after it that it uses. There are no stop words: a line at the left margin ends the function, unless the line is inside
a string or a bracket. `name = lambda ...` is a function too. The text is parsed only to tell half a line from a whole one.
Limits: helpers must be plain functions or classes. Answers have more forms, see answer_extraction.py. The text is untrusted,
and parsing it can kill the process: call this in a worker. Only `end_of_function` parses nothing.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from kindling.data.docstrings import is_placeholder
from kindling.data.filters import compiled

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
_ASSIGNED = re.compile(r"(\w+)[ \t]*(?::[^=\n]*)?=(?!=)")


def parse_or_none(text: str) -> ast.Module | None:
    """Return the syntax tree of a text, or None if it cannot be parsed."""
    try:
        return compiled(text, ast.PyCF_ONLY_AST)
    except ERRORS:
        return None


def function(tree: ast.Module | None, name: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """Return the last function of that name at the top of a module, which is the one that counts."""
    nodes = [] if tree is None else tree.body
    found = [n for n in nodes if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) and n.name == name]
    return found[-1] if found else None


def _statements(tree: ast.Module | None, name: str) -> list[ast.stmt] | None:
    """Return the statements of the function `name`, which may also be assigned; None if there is none. Without a name: all."""
    if tree is None or not name:
        return None if tree is None else tree.body
    assigned: list[ast.stmt] = [
        node for node in tree.body if name in bound_names(node) and isinstance(node, (ast.Assign, ast.AnnAssign))
    ]
    if not assigned:
        node = function(tree, name)
        return None if node is None else node.body
    value = getattr(assigned[-1], "value", None)
    if isinstance(value, ast.Attribute):  # the method of a class, see answer_extraction.py
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        methods = [function(ast.Module(node.body, []), name) for node in classes]
        return next((method.body for method in methods if method is not None), [assigned[-1]])
    return [assigned[-1]]


def bound_names(node: ast.stmt) -> set[str]:
    """Return the names that a statement defines, imports or assigns."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return set()


def is_empty(text: str, head: str, name: str) -> bool:
    """Return whether a program lacks the function `name`, or its body has no statement beyond those in `head`.

    With an empty name: whether the text has no statement.
    """
    trees = parse_or_none(text), parse_or_none(head)
    found = _statements(trees[0], name), _statements(trees[1], name) if name else None
    own, shown = (list(map(ast.dump, statements or ())) for statements in found)
    return not (own[len(shown) :] if own[: len(shown)] == shown else own)


def is_trivial(text: str, name: str) -> bool:
    """Return whether a function does nothing: it has only a docstring, `pass`, `...` or NotImplementedError.

    With an empty name: whether the whole text does nothing.
    """
    statements = _statements(parse_or_none(text), name)
    return statements is None or all(map(is_placeholder, statements))


def end_of_function(text: str, start: int, name: str) -> int | None:
    """Return where the program ends, or None if it may continue. At `start`, its function `name` is open or not yet begun.

    More text after the end does not change the result.
    """
    ends, goes_on = _ends(text, start, name)
    return None if goes_on else ends[-1]


def _ends(text: str, start: int, name: str) -> tuple[list[int], bool]:
    """Return where the function and each helper after it end, and whether the text after that may still belong to them."""
    own, ends = None, []
    for margin in margins(text):
        if own is None:
            own = margin if defines(text, margin, name) else None
        elif margin > start:
            ends.append(margin)
            if "\n" not in text[margin:]:  # half a line can become anything
                return ends, True
            helper = _NAMED.match(text, margin)
            earlier = text[own:margin]
            if helper is None or not _uses(earlier, helper[1]):
                return ends, False
    return ends, True


def margins(text: str) -> Iterator[int]:
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


def defines(text: str, position: int, name: str) -> bool:
    """Return whether the line of code at a position begins the function `name`, or assigns to it."""
    match = _NAMED.match(text, position)
    if match is not None and not match[0].startswith("class"):
        return match[1] == name
    assigned = _ASSIGNED.match(text, position)
    return assigned is not None and assigned[1] == name


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

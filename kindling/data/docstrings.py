"""Mines instruction pairs from Python source: docstring and signature are the instruction, the body is the response.

    for pair in mine_pairs(source):
        print(pair.instruction, pair.response, sep="\\n")

A response is the code of the source with its comments and layout, indented by four spaces. If moving the body to four
spaces would change its meaning, as with an indented text between triple quotes, there is no pair. Only the form is
checked, not whether a docstring is true. Nothing is run, but a hostile source can make ast.parse() kill the process, so
use a worker process for unknown code.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kindling.data.filters import fixed_parser_limits

MIN_CHARS, MAX_CHARS = 15, 400  # of the docstring's first paragraph
MIN_WORDS = 3
MAX_SIGNATURE = 200  # characters
MAX_LINES = 60  # of the response

_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Pair:
    """One function as an instruction and its response.

    `name` is the qualified name inside the file, such as "JSONDecoder.decode". `instruction` is the first paragraph of
    the docstring on one line, then the signature on one line that ends with ":". `response` is the source after the
    docstring, indented by four spaces, without a final newline.
    """

    name: str
    instruction: str
    response: str


def mine_pairs(source: str) -> list[Pair]:
    """Return the pairs of a Python source in the order of the file, without functions inside functions.

    Raises what ast.parse raises for source that is not Python: SyntaxError, ValueError, RecursionError, MemoryError.
    """
    source = source.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    lines = source.split("\n")  # as ast counts them: str.splitlines() would also split at form feeds and U+2028
    pairs = []
    with fixed_parser_limits():
        for name, node in _functions(ast.parse(source)):
            task = _task(ast.get_docstring(node, clean=False) or "")
            if task is None or all(map(is_placeholder, node.body[1:])):
                continue
            signature = _signature(node)
            response = _moved(lines[node.body[0].end_lineno : node.end_lineno])
            if signature is not None and response is not None and _is_same(node, signature, response):
                pairs.append(Pair(name, f"{task}\n{signature}", response))
    return pairs


def _functions(module: ast.Module) -> Iterator[tuple[str, _Function]]:
    """Yield the functions of a module and its classes with their qualified names, also inside `if`, `try` and the like."""
    stack: list[tuple[str, ast.AST]] = [("", module)]  # no recursion, because a long chain of elif is deeply nested
    while stack:
        prefix, node = stack.pop()
        if isinstance(node, _Function):
            yield prefix + node.name, node
            continue
        if isinstance(node, ast.ClassDef):
            prefix += f"{node.name}."
        blocks = [getattr(node, field, ()) for field in ("body", "cases", "handlers", "orelse", "finalbody")]
        stack.extend(reversed([(prefix, child) for block in blocks for child in block]))


# what ends the first paragraph of a docstring, besides a blank line
_SECTION = re.compile(
    r">>>|```|\.\. |@(param|return|raise|type|rtype)"
    r"|:(?!\w+(:\w+)*:`)\w"  # ":param x:", but not ":class:`Thread`"
    r"|\*{0,2}\w+ \(.+\):(\s|$)"  # "x (int): ..." as under "Args:"
    r"|(args?|attributes?|references?|returns?|yields?|raises?|warns?|warnings?|examples?|(example )?usage|notes?|see also"
    r"|todo|inputs?|outputs?|((in|out)put )?shapes?|((other|keyword) )?(param(eter)?|argument)s?)\s*:",
    re.IGNORECASE,
)
_UNDERLINE = re.compile(r"([-=~^*+#])\1{2,}")
_NO_TASK = re.compile(
    r"\W*(see(?! if| whether| how)|todo|fixme|xxx|deprecated|(for )?internal use only)\b", re.IGNORECASE
)


def _task(docstring: str) -> str | None:
    """Return the first paragraph of a docstring on one line, or None if it is too short, too long or no task."""
    paragraph: list[str] = []
    for line in map(str.strip, inspect.cleandoc(docstring).split("\n")):
        if not line or _SECTION.match(line):
            break
        if _UNDERLINE.fullmatch(line):
            del paragraph[-1:]  # the title of a section
            break
        paragraph.append(line)
    words = " ".join(paragraph).split()
    text = " ".join(words)
    if not MIN_CHARS <= len(text) <= MAX_CHARS or len(words) < MIN_WORDS:
        return None
    return text if text.isprintable() and not _NO_TASK.match(text) else None


def is_placeholder(statement: ast.stmt) -> bool:
    """Return whether a statement does nothing (`pass`, `...`, a string), or raises NotImplementedError."""
    if isinstance(statement, ast.Raise):
        error = statement.exc.func if isinstance(statement.exc, ast.Call) else statement.exc
        return isinstance(error, ast.Name) and error.id == "NotImplementedError"
    is_constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return is_constant or isinstance(statement, ast.Pass)


def _signature(node: _Function) -> str | None:
    """Return the function's `def` on one line, or None if it is too long or cannot be written."""
    fields = {field: getattr(node, field) for field in node._fields} | {"body": [], "decorator_list": []}
    try:
        signature = ast.unparse(type(node)(**fields, lineno=node.lineno))
    except (ValueError, RecursionError):  # because of defaults: nested f-strings, huge integers, long sums
        return None
    return signature if len(signature) <= MAX_SIGNATURE and "\n" not in signature else None


def _moved(lines: list[str]) -> str | None:
    """Return a body moved so that its first statement is indented by four spaces, or None if there is no body.

    Strings of several lines are moved too, and blank lines lose their spaces; _is_same checks whether that matters.
    """
    split = []
    for line in lines:
        code = line.lstrip(" \t\f")
        margin = line[: len(line) - len(code)].rpartition("\f")[2]  # Python counts from the last form feed, too
        split.append((len(margin.expandtabs(4)), code))
    first = next((column for column, code in split if code and not code.startswith("#")), None)
    if first is None:  # the body is on the line of its docstring
        return None
    response = "\n".join(" " * max(0, column - first + 4) + code if code else "" for column, code in split).strip("\n")
    return response if response.count("\n") < MAX_LINES else None


def _is_same(node: _Function, signature: str, response: str) -> bool:
    """Return whether signature and response parse to the function that they come from, without its decorators."""
    try:
        (twin,) = ast.parse(f'{signature}\n    """doc"""\n{response}\n').body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    assert isinstance(twin, _Function), "a signature is a def"
    twin.body[0], twin.decorator_list = node.body[0], node.decorator_list  # these are not compared
    return _are_equal(node, twin)


def _are_equal(one: Any, other: Any) -> bool:
    """Return whether two syntax trees are equal apart from positions, like a comparison of ast.dump."""
    stack = [(one, other)]  # no recursion, because a sum of a thousand terms is a thousand levels deep
    while stack:
        one, other = stack.pop()
        if one is other:
            continue
        if type(one) is not type(other):
            return False
        if isinstance(one, ast.AST):
            stack.extend([(getattr(one, field), getattr(other, field)) for field in one._fields])
        elif isinstance(one, list):
            if len(one) != len(other):
                return False
            stack.extend(zip(one, other))
        elif one != other:
            return False
    return True

"""Extracts the program from an answer to an instruction: what a person would have cut out.

    program = extract_from_answer(head, answer, "add")

The function may stand in a fence of any kind, in the text, or in a class; or the answer is only its body. Helpers that the
function uses may stand in other fences. The text is untrusted, and parsing it can kill the process: call this in a worker.
"""

from __future__ import annotations

import ast
import builtins
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kindling.data.filters import syntax_error
from kindling.evaluation.extraction import (
    MAX_CHARS,
    bound_names,
    defines,
    extract_from_completion,
    function,
    is_trivial,
    margins,
    parse_or_none,
)

MAX_DOCSTRING = 20  # lines that are tried as the end of a docstring that is not closed
# a fence, closed at its own indentation or at the margin: code may hold a deeper one in a docstring
_FENCE = re.compile(r"^([ \t]*)(`{3,}+|~{3,}+)[^\n`]*\n(.*?)(?:^(?:\1)?\2|\Z)", re.MULTILINE | re.DOTALL)
# one that begins behind a list's mark or a word, or ends behind code
_LOOSE_FENCE = re.compile(r"(?<![`~])(`{3,}+|~{3,}+)[^\n`]*\n(.*?)(?:\1|\Z)", re.DOTALL)
_LINE_FENCE = re.compile(r"(?<!`)(`{1,3}+)(?:(?:python3?|py)\b)?[ \t]*([^`\n]+)\1")
_STATEMENT = re.compile(r"(?:@|(?:async|def|class|import|from|try|if|for|with)\b|[A-Za-z_]\w*(?: *:[^=\n]*)? *=)")
_CLASS = re.compile(r"^class +(\w+)", re.MULTILINE)
_FUTURE = re.compile(r"^from __future__ import (?:\([^)]*\)|[^\n;#]*)[^\n]*\n", re.MULTILINE)
_QUOTE = re.compile(r"^(?:>>> ?|\.\.\.(?: |$)|> ?)", re.MULTILINE)  # of a Python prompt, or of Markdown


class _Question(NamedTuple):
    """What an answer is read for."""

    head: str
    before: str
    """The code before the function in `head`, such as imports."""
    imports: str
    """The imports inside the function in `head`."""
    name: str
    cut_short: bool


def extract_from_answer(head: str, answer: str, name: str, cut_short: bool = False) -> str:
    """Return the program in an answer to an instruction: a function in a code block or in the text, or only a body.

    `head` is the problem's code up to the end of the function's docstring, or empty. If the answer has a function, the code
    before the function in `head`, such as imports, is put before it. If the answer is a body, the whole `head` is. `cut_short`:
    a limit ended the answer. A docstring that is not closed, and blanks that Python does not know, are mended.
    """
    answer = answer[:MAX_CHARS]
    if "</think>" in answer:  # what was thought is no answer
        answer = answer.rpartition("</think>")[2]
    node = function(parse_or_none(head), name)
    before, imports = "", ""
    if node is not None:
        before = "".join(head.splitlines(keepends=True)[: node.lineno - 1])
        imports = "".join(ast.unparse(n) + "\n" for n in node.body if isinstance(n, (ast.Import, ast.ImportFrom)))
    question = _Question(head, before, imports, name, cut_short)
    program = _program(question, answer)
    if parse_or_none(program) is not None:
        return program
    mended = (_program(question, text) for text in _mended(answer, name))
    return next((other for other in mended if not is_trivial(other, name)), program)


def _program(question: _Question, answer: str) -> str:
    head, before, _, name, cut_short = question
    blocks = [m[3] for m in _FENCE.finditer(answer)]
    loose = [m[2] for m in _LOOSE_FENCE.finditer(answer)]
    places = [*blocks, answer, *loose, *(m[2] for m in _LINE_FENCE.finditer(answer))]
    if _QUOTE.search(answer):
        places.append(_QUOTE.sub("", answer))
    programs = []
    for find in (_from_definition, _from_class):
        for block in places:
            code = find(block, name)
            if code is not None:
                program = code if find is _from_class else extract_from_completion("", code, name, cut_short)
                later = _later_parts(block, code, program, name)
                others = [other for other in blocks or loose if other != block]
                programs.append(_with_helpers(question, program + later, others))
        if programs:  # a block may only repeat the question
            return next((program for program in programs if not is_trivial(program, name)), programs[0])
    block = re.sub(r"\A(?:[ \t\r]*\n)+", "", next(iter(blocks or loose), answer))
    if not head or _is_module(block):  # not a body
        return _future_first(extract_from_completion("", before + block, name, cut_short))
    bodies = [extract_from_completion(head, body, name, cut_short) for body in _indented(block)]
    return next((program for program in bodies if parse_or_none(program) is not None), bodies[0])


def _from_definition(block: str, name: str) -> str | None:
    """Return the code from the first statement on that belongs to the function; None if the function is not defined."""
    for text in (block, textwrap.dedent(block), block.lstrip()):
        starts = [m.start() for m in re.finditer(r"^", text, re.MULTILINE) if _STATEMENT.match(text, m.start())]
        found = [start for start in starts if defines(text, start, name)]
        found.sort(key=lambda start: not re.match(r"(async +)?def\b", text[start : start + 20]))  # else it is assigned
        if found:
            return text[_first_statement(text, starts, found[0]) :]
    return None


def _first_statement(text: str, starts: Sequence[int], own: int) -> int:
    """Return where the statements before `own` begin. Prose can begin like a statement, but it rarely parses."""
    return next((s for s in starts if s < own and parse_or_none(f"{text[s:own]}def f(): pass") is not None), own)


def _from_class(block: str, name: str) -> str | None:
    """Return a program that makes a class's method the function `name`; None if no class has such a method."""
    text = textwrap.dedent(block)
    starts = [m.start() for m in re.finditer(r"^", text, re.MULTILINE) if _STATEMENT.match(text, m.start())]
    for match in _CLASS.finditer(text):
        end = next((margin for margin in margins(text[match.start() :]) if margin > 0), None)
        code = text[match.start() : None if end is None else match.start() + end].rstrip() + "\n"
        tree = parse_or_none(code)
        if (
            tree is not None
            and isinstance(tree.body[0], ast.ClassDef)
            and function(ast.Module(tree.body[0].body, []), name)
        ):
            first = _first_statement(text, starts, match.start())
            return f"{text[first : match.start()]}{code}\n\n{name} = {match[1]}().{name}\n"
    return None


def _later_parts(block: str, code: str, program: str, name: str) -> str:
    """Return the statements of a block, behind the program cut out of it, that change the function: overloads and the like."""
    tree = parse_or_none(code)
    if tree is None or not code.startswith(program):
        return ""
    lines, ended, found = code.splitlines(keepends=True), program.count("\n"), ""
    for node in tree.body:
        decorators = getattr(node, "decorator_list", [])
        names = {n.id for decorator in decorators for n in ast.walk(decorator) if isinstance(n, ast.Name)}
        if node.lineno > ended and (name in bound_names(node) or name in names):
            first = min([node.lineno, *(d.lineno for d in decorators)])
            found += "".join(lines[first - 1 : node.end_lineno])
    return found if not found or program.endswith("\n") else "\n" + found


def _with_helpers(question: _Question, program: str, others: Sequence[str]) -> str:
    """Return the whole program: with the question's own code, and with what it uses from other blocks."""
    found = ""
    sources = [source for source in (question.imports, *map(textwrap.dedent, others)) if source]
    trees = [
        (source.splitlines(keepends=True), tree) for source in sources if (tree := parse_or_none(source)) is not None
    ]
    while missing := _unknown_names(question.before + found + program) if trees else set():
        added = ""
        for lines, tree in trees:
            for node in tree.body:
                if bound_names(node) & missing - {question.name}:
                    missing -= bound_names(node)
                    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
                    added += "".join(lines[first - 1 : node.end_lineno]).rstrip() + "\n"
        if not added:
            break
        found = added + found
    return _future_first(question.before + found + program)


def _unknown_names(program: str) -> set[str]:
    """Return the names that a program uses and nowhere binds."""
    tree = parse_or_none(program)
    used: set[str] = set()
    bound = set(dir(builtins))
    for node in [] if tree is None else ast.walk(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.stmt):
            bound |= bound_names(node)
    return used - bound


def _future_first(program: str) -> str:
    """Return a program with its `from __future__` lines at the top, where Python wants them."""
    found = {margin for margin in margins(program) if program.startswith("from __future__", margin)}
    lines = [m for m in _FUTURE.finditer(program) if m.start() in found]
    if not lines or parse_or_none(program) is None or syntax_error(program) is None:
        return program
    for match in reversed(lines):
        program = program[: match.start()] + program[match.end() :]
    return "".join(match[0] for match in lines) + program


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


def _mended(answer: str, name: str) -> Iterator[str]:
    """Yield an answer with what a person would mend before running it."""
    plain = re.sub("[\ufeff\u200b\u2060]", "", answer).replace("\u00a0", " ").replace("\r\n", "\n")
    if plain != answer:
        yield plain
    opened = re.search(rf'def +{re.escape(name)}\b[^\n]*(?:\n[^\n]*){{0,5}}?:[ \t]*\n[ \t]*[rR]?("""|\'\'\')', plain)
    if opened is not None and plain.count(opened[1]) % 2:  # its docstring is not closed
        line_end = opened.end()
        for _ in range(MAX_DOCSTRING):
            line_end = plain.find("\n", line_end)
            if line_end < 0:
                return
            yield plain[:line_end] + opened[1] + plain[line_end:]
            line_end += 1
    elif opened is None and plain.count('"""') % 2:  # it begins with the end of the docstring
        yield plain.partition('"""')[2]

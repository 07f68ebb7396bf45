# ruff: noqa: E501  an answer of the table is one line
"""Answers in the forms in which models write them: what a person would have cut out runs and is right."""

import ast
import random
import re
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kindling.evaluation.answer_extraction import extract_from_answer
from kindling.evaluation.extraction import extract_from_completion, function, is_empty, is_trivial
from kindling.evaluation.tasks import Problem, load

HEAD = 'from typing import List\n\n\ndef add(a: List[int], b) -> int:\n    """Return the sum."""\n'
INNER_HEAD = 'def add(a, b):\n    import math\n    """Return the sum."""\n'
FUNCTION = "def add(a, b):\n    return plus(a, b)\n"
HELPER = "def plus(a, b):\n    return a + b\n"
WHOLE = "def add(a, b):\n    return a + b\n"
FUTURE = "from __future__ import annotations\n"


def fenced(code: str, fence: str = "```", word: str = "python") -> str:
    return f"{fence}{word}\n{code}{fence}\n"


FROM_REPORTS = {  # as in public bug reports
    "a future import": fenced(f"{FUTURE}from typing import List\n\n\n{WHOLE}"),
    "two fences": f"First the helper:\n\n{fenced(HELPER)}\nThen the function:\n\n{fenced(FUNCTION)}",
    "a fence of tildes": f"Sure:\n\n{fenced(WHOLE, '~~~')}\nDone.\n",
    "a fence on one line": "```python def add(a, b): return a + b```",
    "a fence in a list, closed at the margin": "1. Write:\n   ```python\n"
    + textwrap.indent(WHOLE, "   ")
    + "```\nDone.\n",
    "a lambda": fenced("add = lambda a, b: a + b\n"),
    "an async helper": fenced(
        "import asyncio\n\nasync def plus(a, b):\n    return a + b\n\ndef add(a, b):\n    return asyncio.run(plus(a, b))\n"
    ),
    "a class around the method": fenced("class Solution:\n    def add(self, a, b):\n        return a + b\n"),
    "a decorator of the answer": fenced(
        "def same(f):\n    def g(*args):\n        return f(*args)\n    return g\n\n@same\n" + WHOLE
    ),
    "hints of the prompt's imports": fenced("def add(a: List[int], b: 'List') -> int:\n    return a + b\n"),
    "a docstring cut short": fenced('def add(a, b):\n    """Return the sum of\n    return a + b\n'),
}
OWN = {  # more of the same
    "a future import in several lines": fenced(
        f"from __future__ import (\n    annotations,\n    division,\n)\nimport os\n{WHOLE}"
    ),
    "a future import behind a comment and a docstring": fenced(f'# v2\n"""Sums."""\n{FUTURE}{WHOLE}'),
    "the helper in the second fence": f"{fenced(FUNCTION)}\nwith\n{fenced(HELPER)}",
    "three fences": f"{fenced('import operator' + chr(10))}\n{fenced('def plus(a, b):' + chr(10) + '    return operator.add(a, b)' + chr(10))}\n{fenced(FUNCTION)}",
    "a constant in another fence": fenced("ZERO = 0\n") + "and\n" + fenced("def add(a, b):\n    return a + b + ZERO\n"),
    "a decorator in another fence": fenced("def same(f):\n    return f\n") + fenced("@same\n" + WHOLE),
    "a star import in the fence": fenced(f"from math import *\n{WHOLE}"),
    "an example in a fence before": fenced("print(add(1, 2))\n") + fenced(WHOLE),
    "four backticks": fenced(WHOLE, "````"),
    "a fence with attributes": fenced(WHOLE, word='{.python title="sum.py"}'),
    "a fence behind a list's mark": "- ```python\n" + textwrap.indent(WHOLE, "  ") + "  ```\n",
    "a fence behind words": f"Here: ```python\n{WHOLE}```",
    "a fence that ends behind the code": f"```python\n{WHOLE.rstrip()}```\nDone.",
    "one line between single marks": "Use `def add(a, b): return a + b` for this.",
    "a lambda with a hint": fenced("from typing import Callable\n\nadd: Callable = lambda a, b: a + b\n"),
    "an alias": fenced("def plus(a, b):\n    return a + b\n\n\nadd = plus\n"),
    "a partial": fenced("import functools, operator\n\nadd = functools.partial(operator.add)\n"),
    "a lambda without a fence": "Sure.\n\nadd = lambda a, b: a + b\n\nThis adds.",
    "a static method": fenced("class Solution(object):\n    @staticmethod\n    def add(a, b):\n        return a + b\n"),
    "a class with a helper": fenced(
        "import os\n\nclass Solution:\n    def plus(self, a, b):\n        return a + b\n\n    def add(self, a, b):\n"
        "        return self.plus(a, b)\n\nprint(Solution().add(1, 2))\n"
    ),
    "a class without a fence": "Here it is.\n\nclass Solution:\n    def add(self, a, b):\n        return a + b\n\nIt adds.",
    "overloads": fenced(
        "from typing import overload\n\n@overload\ndef add(a: int, b: int) -> int: ...\n@overload\ndef add(a: str, b: str) -> str: ...\n"
        + WHOLE
    ),
    "single dispatch": fenced(
        "from functools import singledispatch\n\n@singledispatch\ndef add(a, b):\n    raise TypeError(a)\n\n"
        "@add.register\ndef _(a: int, b):\n    return a + b\n"
    ),
    "rebound": fenced("from functools import lru_cache\n\n" + WHOLE + "\nadd = lru_cache(add)\n\nprint(add(1, 2))\n"),
    "thought first": f"<think>\nMaybe\n{fenced('def add(a, b):' + chr(10) + '    return a - b' + chr(10))}no\n</think>\n{fenced(WHOLE)}",
    "at a Python prompt": "```\n>>> def add(a, b):\n...     return a + b\n...\n>>> add(1, 2)\n3\n```",
    "a quoted fence": "".join(f"> {line}\n" for line in fenced(WHOLE).splitlines()),
    "blanks that do not break": fenced(WHOLE.replace("    ", "\u00a0   ")),
    "a mark of the byte order": "\ufeff" + WHOLE,
    "a docstring of two lines cut short": fenced("def add(a, b):\n    '''Return the sum of\n    a and b, which are\n    return a + b\n"),
    "the end of the docstring, then the body": 'of both.\n    """\n    return a + b\n',
}  # fmt: skip
WRONG = {  # forms that are as wrong as they look
    "another name": fenced("def plus(a, b):\n    return a + b\n"),
    "a wrong lambda": fenced("add = lambda a, b: a - b\n"),
    "a missing helper": fenced(FUNCTION),
    "a class without the method": fenced("class Solution:\n    def plus(self, a, b):\n        return a + b\n"),
    "a method that does nothing": fenced("class Solution:\n    def add(self, a, b):\n        pass\n"),
}


def run(program: str) -> dict:
    scope: dict = {"__name__": "solution"}
    exec(compile(program, "<program>", "exec", dont_inherit=True), scope)
    return scope


@pytest.mark.parametrize("name", [*FROM_REPORTS, *OWN])
def test_the_program_of_an_answer_is_found_whatever_its_form(name):
    answer = (FROM_REPORTS | OWN)[name]
    for text in (answer, answer.replace("\n", "\r\n")):
        program = extract_from_answer(HEAD, text, "add")
        assert run(program)["add"](2, 3) == 5, program
        assert not is_trivial(program, "add") and not is_empty(program, HEAD, "add")


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_stays_wrong(name):
    program = extract_from_answer(HEAD, WRONG[name], "add")
    try:
        answer = run(program)["add"](2, 3)
    except (NameError, KeyError):
        answer = None
    assert answer != 5
    assert is_trivial(program, "add") == (
        name in ("another name", "a class without the method", "a method that does nothing")
    )


def test_an_import_inside_the_functions_head_is_not_lost():
    program = extract_from_answer(INNER_HEAD, fenced("def add(a, b):\n    return math.ceil(a + b)\n"), "add")
    assert run(program)["add"](2, 3) == 5


def test_a_lambda_is_a_continuation_too():
    program = extract_from_completion("", "import os\n\nadd = lambda a, b: a + b\nprint(add(1, 2))\n", "add")
    assert program == "import os\n\nadd = lambda a, b: a + b\n"


# -- every solution of HumanEval, in each form


def whole(problem: Problem) -> tuple[str, str, str]:
    """Return what stands before the function, its source, and its name. What a head imports inside is imported before."""
    node = function(ast.parse(problem.solution), problem.entry_point)
    lines = problem.solution.splitlines(keepends=True)
    return "".join(lines[: node.lineno - 1]), "".join(lines[node.lineno - 1 :]).rstrip() + "\n", problem.entry_point


def method(source: str, name: str) -> str:
    """Return a function as the method of a class."""
    return f"class Solution:\n    @staticmethod\n{textwrap.indent(source, '    ')}"


FORMS = {
    "future": lambda before, source, name: fenced(FUTURE + before + source),
    "future, without the prompt's own": lambda before, source, name: fenced(FUTURE + source),
    "two fences": lambda before, source, name: (
        f"First:\n{fenced(before)}\nThen:\n{fenced(source)}" if before else fenced(source)
    ),
    "wrapped": lambda before, source, name: (
        fenced(re.sub(rf"\b{name}\(", "inner(", source))
        + "\nand then\n\n"
        + fenced(f"{name} = lambda *args: inner(*args)\n")
    ),
    "tildes": lambda before, source, name: fenced(source, "~~~~"),
    "a list": lambda before, source, name: (
        "1. So:\n\n   ```py\n" + textwrap.indent(source, "   ") + "   ```\n2. Done\n"
    ),
    "a list, closed at the margin": lambda before, source, name: (
        "* So:\n  ```\n" + textwrap.indent(source, "  ") + "```\n"
    ),
    "prose": lambda before, source, name: f"Here is the function:\n\n{before}{source}\nIt is right, isn't it?",
    "a decorator": lambda before, source, name: fenced("def same(f):\n    return f\n\n\n@same\n" + source),
    "a quote": lambda before, source, name: textwrap.indent(fenced(source), "> ", lambda line: True),
    "a class": lambda before, source, name: fenced(method(source, name)),
    "CRLF": lambda before, source, name: fenced(source).replace("\n", "\r\n"),
    "attributes": lambda before, source, name: fenced(source, "````", "python {.numberLines}"),
}


def passes(problem: Problem, program: str) -> bool:
    """Run the tests beside the program, as HumanEval's own script does; no stranger wrote it."""
    scope = run(problem.trusted)
    exec(compile(program, "<program>", "exec", dont_inherit=True), scope)
    random.seed(0)
    try:
        exec(compile(problem.tests, "<tests>", "exec"), scope)
    except AssertionError:
        return False
    return True


def failures(jobs: list[tuple[Problem, str]]) -> list[str]:
    failed = []
    for problem, form in jobs:
        before, source, name = whole(problem)
        program = extract_from_answer(problem.answer_head, FORMS[form](before, source, name), name)
        try:
            right = passes(problem, program)
        except Exception as e:
            right, program = False, f"{type(e).__name__}: {e}"
        if not right:
            failed.append(f"{problem.task_id} as {form}: {program[:200]}")
    return failed


def test_every_solution_of_humaneval_passes_in_some_forms():
    forms = list(FORMS)
    problems = load("humaneval")[::3]  # all of them are slow
    jobs = [(p, forms[(i + shift) % len(forms)]) for i, p in enumerate(problems) for shift in (0, 5)]
    assert failures(jobs) == []


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_solution_of_humaneval_passes_in_each_form(form):
    assert failures([(p, form) for p in load("humaneval")]) == []


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["```", "~~~", "````", "```` "]),
    st.sampled_from(["", "python", "py", " Python3"]),
    st.integers(0, 3),
    st.sampled_from(["", "Sure!\n\n", "1. First\n", "Use `add`:\n", "I'd write:\n"]),
    st.sampled_from(["", FUTURE, "import os\n", FUTURE + "import os, sys\n", "from math import (\n    pi,\n)\n"]),
    st.sampled_from(
        [WHOLE, "add = lambda a, b: a + b\n", "class S:\n    def add(self, a, b):\n        return a + b\n"]
    ),
    st.sampled_from(["", "\nprint(add(1, 2))\n", "\nif __name__ == '__main__':\n    add(1, 2)\n", "\n# done\n"]),
    st.sampled_from(["", "\nIt adds.\n", "\n\n```\n3\n```\n", "\n~~~\nadd(1, 2)\n~~~\n"]),
)
def test_fences_and_what_stands_around_do_not_matter(fence, word, indent, prose, imports, code, usage, after):
    fence = fence.strip()
    block = textwrap.indent(f"{fence}{word}\n{imports}{code}{usage}{fence}\n", " " * indent)
    assert run(extract_from_answer(HEAD, prose + block + after, "add"))["add"](2, 3) == 5

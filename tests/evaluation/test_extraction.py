import ast
import re
import sysconfig
import textwrap
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kindling.evaluation import extraction
from kindling.evaluation.answer_extraction import extract_from_answer
from kindling.evaluation.extraction import end_of_function, extract_from_completion, is_empty, is_trivial
from kindling.evaluation.tasks import load
from kindling.pool import FailedJob, map_jobs

HEAD = 'def add(a, b):\n    """Return the sum."""\n'
IMPORTS = "import math\n\ndef half(x):\n    return x / 2\n\n\n"
BODY = "    total = a + b\n    return total\n"
FUNCTION = "def add(a, b):\n" + BODY
REFERENCES = [*load("humaneval"), *load("problems")]


def dump(text: str) -> str:
    return ast.dump(ast.parse(text))


# -- continuations of a base model


@pytest.mark.parametrize(
    "garbage",
    [
        "print(add(1, 2))\n",
        "\n\ndef sub(a, b):\n    return a - b\n",
        "\n\ndef add(a, b):\n    return a - b\n",
        "\n\nasync def main():\n    pass\n",
        "\n\nclass Adder:\n    def add(self): pass\n",
        "\n@cache\ndef other():\n    pass\n",
        "\n\nif __name__ == '__main__':\n    add(1, 2)\n",
        '\n\n"""\nNow write a function\n"""\ndef f(',
        "\n# Test\nassert add(1, 2) == 3\n",
        "\nThis isn't Python (at all, it's\n prose:\n",
        "```\n\nThe function adds",
        "<|endoftext|>import os",
        "x = '",
        "\n\nde",
        "\n)\n",
    ],
)
def test_a_continuation_ends_with_the_function(garbage):
    for head, body in ((HEAD, BODY), ("", FUNCTION), ("import os\n" + HEAD, "    # first\n" + BODY)):
        assert dump(extract_from_completion(head, body + garbage, "add")) == dump(head + body)
        assert dump(extract_from_completion(head, body + garbage, "add", cut_short=True)) == dump(head + body)


@pytest.mark.parametrize(
    "body",
    [
        '    text = """\none\ntwo\nthree\nfour\n"""\n    return a + b\n',
        "    text = '''\ndef add(a, b):\n    \"\"\"\n''' + 'it\\'s'\n    return a + b\n",
        "    table = [\n1,\n2,\n3,\n4,\n]\n    return a + b\n",
        "    table = {\n'}': (\n'#',\n),\n}  # ]\n    return a + b\n",
        "    return sum(\n[\na, b\n]\n)\n",
        "# at the margin\n    if a:\n# again )\"'\n        return a\n# and again\n    return b\n",
        "    x = a + \\\nb\n    return x\n",
        "    x = 'one \\\ntwo'\n    return x\n",
        "    return r'\\'' + \"\\\\\" + '\"\"\"'\n",
        "    return f'{a!r:>{b}}' + rb'\\''.decode()\n",
        '    """Another docstring\nat the margin"""\n    return a\n',
        "    def inner(x):\n        return x\n\n    class Local:\n        pass\n\n    return inner(a)\n",
        "\tif a:\n\t\treturn b\n\treturn a\n",
        "    @property\n    def x(self):\n        pass\n\n\n\n    return x\n",
        "    return a; b = 1\n",
        "    return (a\n+ b)\n",
        "    x = ''\n    y = \"\"\n    z = ''''''\n    return x + y\n",
    ],
)
def test_strings_brackets_and_comments_may_reach_the_margin(body):
    head = "def add(a, b):\n"
    for garbage in ("x = 1\n", "def other():\n    pass\n", "", "}\n", '"""\n'):
        assert extract_from_completion(head, body + garbage, "add") == head + body
        assert extract_from_completion("", head + body + garbage, "add") == head + body
    crlf = (head + body).replace("\n", "\r\n")
    assert extract_from_completion("", crlf + "x = 1\r\n", "add") == crlf


def test_the_asked_function_may_come_after_imports_constants_and_helpers():
    before = "import math\nfrom os import (\npath,\nsep)\nPI: float = 3\n\ndef helper(x):\n    return x\n\n\n"
    before += "class Node:\n    pass\n\n@cache\n"
    assert extract_from_completion("", before + FUNCTION + "print(1)\n", "add") == before + FUNCTION
    assert (
        extract_from_completion("", before + "async  " + FUNCTION + "print(1)\n", "add")
        == before + "async  " + FUNCTION
    )


def test_a_function_whose_name_begins_alike_is_another():
    before = "def address(a):\n    return a\n\n"
    assert extract_from_completion("", before + FUNCTION + "x\n", "add") == before + FUNCTION


def test_helpers_behind_the_function_are_kept_if_it_uses_them():
    function = "def add(a, b):\n    return plus(a, Pair(b))\n\n"
    helpers = "def plus(a, b):\n    return a + deep(b)\n\nclass Pair:\n    pass\n\ndef deep(x):\n    return x\n\n"
    for garbage in ("", "def plus(a, b):\n    return 0\n", "def main():\n    print(1)\n", "print(1)\n", "de"):
        assert extract_from_completion("", function + helpers + garbage, "add") == function + helpers
    other = "def main():\n    pass\n"
    assert extract_from_completion("", function + other + helpers, "add") == function


def test_half_a_helper_does_not_take_the_function_with_it():
    function = "def add(a, b):\n    return plus(a, b) if a else b\n\n"
    for half in (
        "def plus(a",
        "def plus(a, b):\n",
        "def plus(a, b):\n    return (",
        "def plus(a, b):\n    x = )\n\nx = 1\n",
    ):
        assert extract_from_completion("", function + half, "add") == function


def test_a_broken_function_is_not_mended():
    for broken in (
        "    return (a + b\n",
        "    retrn a b\n",
        "    return a + b)\n",
        "   x = 1\n",
        "    s = 'a\n",
        "    return '''\n",
    ):
        program = extract_from_completion(HEAD, broken + "\nprint(add(1, 2))\n\n\nx = 1\n", "add")
        assert program.startswith(HEAD + broken) and extraction.parse_or_none(program) is None


def test_a_continuation_that_begins_at_the_margin_is_no_body():
    for text in ("return a + b\n", "This function adds.\n"):
        assert extraction.parse_or_none(extract_from_completion("def add(a, b):\n", text + "x = 1\n", "add")) is None
    assert extract_from_completion(HEAD, FUNCTION + "print(1)\n", "add") == HEAD + FUNCTION  # it begins anew


@pytest.mark.parametrize("text", ["", "\n", "   ", "\n\n   \n\t", "    "])
def test_nothing_stays_nothing(text):
    assert extract_from_completion(HEAD, text, "add") == HEAD + text
    assert is_trivial(extract_from_completion(HEAD, text, "add", True), "add")
    assert is_trivial(extract_from_answer(HEAD, text, "add"), "add")
    assert is_trivial(extract_from_answer("def add(a):\n", text, "add"), "add")
    assert is_trivial(extract_from_answer("", text, "add"), "add")


def test_half_a_last_line_is_left_out_only_if_it_must_be():
    half, whole = BODY + "    for x in (a,", BODY + "    ret"
    assert extract_from_completion(HEAD, half, "add", cut_short=True) == HEAD + BODY
    assert extract_from_completion(HEAD, half, "add") == HEAD + half
    assert extract_from_completion(HEAD, whole, "add", cut_short=True) == HEAD + whole
    assert extract_from_completion(HEAD, "    retu (", "add", cut_short=True) == HEAD + "    retu ("  # the only line
    open_bracket = "    x = [\n    1,\n    2"
    assert extract_from_completion(HEAD, open_bracket, "add", cut_short=True) == HEAD + open_bracket


def test_without_a_name_there_is_no_end():
    assert end_of_function("x = 1\ny = 2\nz = 3\n", 0, "") is None
    assert extract_from_completion("", "x = 1\ny = 2\n", "") == "x = 1\ny = 2\n"


# -- properties


def standard_functions() -> list[tuple[str, str, str]]:
    """Functions of the standard library as (name, head up to the docstring's end, body)."""
    found = []
    for module in (
        "textwrap",
        "inspect",
        "ast",
        "calendar",
        "difflib",
        "statistics",
        "shutil",
        "tokenize",
        "heapq",
        "copy",
    ):
        source = (Path(sysconfig.get_path("stdlib")) / f"{module}.py").read_text(encoding="utf-8")
        lines = source.splitlines(keepends=True)
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
                start, docstring_end = node.lineno - 1, node.body[0].end_lineno
                head, body = "".join(lines[start:docstring_end]), "".join(lines[docstring_end : node.end_lineno])
                if body:
                    found.append((node.name, head, body))
    return found


FUNCTIONS = standard_functions()
# what a model may write at the margin: nothing of it can belong to the function
LINES = st.sampled_from(
    ["print(1)", "x = [", '"""', "'", "def f(x):", "class A:", "@d", "    return x", ")", "It's", "```", "\\", "é"]
)
MARGIN = st.builds(
    lambda first, rest: "\n".join([first, *rest]),
    LINES.filter(lambda line: line[0] != " "),
    st.lists(LINES, max_size=6),
)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(FUNCTIONS), MARGIN)
def test_real_functions_come_back_exactly_whatever_follows(function, garbage):
    name, head, body = function
    garbage = garbage.replace("def f(", f"def not_{name}(")
    assert extract_from_completion(head, body + garbage, name) == head + body
    assert extract_from_completion("", head + body + garbage, name) == head + body
    assert dump(extract_from_answer("", f"Sure, here it is:\n\n{head}{body}\n{garbage}", name)) == dump(head + body)


def test_there_are_functions_to_try():
    assert len(FUNCTIONS) > 150


PIECES = """def add(a, b):~def helper(x):~helper~add~class ~def ~(~)~[~]~{~}~'''~"~'~#~\\~\\\n~return a~x = 1~:~@~ ~\r\n~pass"""
TOKENS = st.sampled_from(
    ["\n", "\n    ", "\n        ", '"""', "async def ", "é", "\t", "de", "f ", *re.split("~", PIECES)]
)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(["", HEAD, "def add(a, b):\n", "import x\ny = '"]), st.lists(TOKENS, max_size=25), st.data())
@example("", ["def add(a, b):", "\n    ", "helper", "\n", "def "], None)
def test_once_the_function_is_over_more_text_changes_nothing(head, tokens, data):
    text = "".join(tokens)
    programs = {}
    for n in range(len(text) + 1):
        end = end_of_function(head + text[:n], len(head), "add")
        if end is not None:
            programs[extract_from_completion(head, text[:n], "add")] = end
        else:
            assert not programs, "what was over goes on"
    assert len(programs) <= 1
    assert not programs or extract_from_completion(head, text, "add", cut_short=True) in programs


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(["", HEAD]), st.lists(TOKENS, max_size=25), st.booleans())
def test_a_program_is_the_beginning_of_what_was_written(head, tokens, cut_short):
    text = "".join(tokens)
    program = extract_from_completion(head, text, "add", cut_short)
    assert (head + text).startswith(program) and program.startswith(head)


@settings(deadline=None, max_examples=100)
@given(
    st.text(max_size=60) | st.lists(TOKENS, max_size=25).map("".join),
    st.sampled_from([HEAD, "", "def add(a):\n", IMPORTS + HEAD]),
)
def test_no_answer_is_too_strange(text, head):
    extract_from_answer(head, text, "add")
    extract_from_answer(head, f"```python\n{text}\n```", "add", cut_short=True)
    extract_from_completion(head, text, "add", cut_short=True)


@pytest.mark.parametrize(
    "text",
    ["'''" * 20_000, '"' * 60_000, "\\" * 60_000, '"""\\' * 15_000, "(" * 60_000, "x\n" * 30_000, "```\n" * 15_000],
)
def test_long_strange_texts_are_lexed_in_linear_time(text):
    end_of_function(FUNCTION + text, 0, "add")


# -- answers of a fine-tuned model

ANSWERS = {
    "a function": FUNCTION,
    "after a blank": " " + FUNCTION.replace("\n", "\n "),
    "a blank before the first line only": " " + FUNCTION,
    "prose around": f"Here's the function (it's easy:\n\n{FUNCTION}\nIt adds the numbers.\n",
    "one word before": f"Solution\n\n{FUNCTION}\nDone",
    "prose that begins like a statement": f"import this and\nfrom the above:\nclass of\nfor you\n{FUNCTION}",
    "a fence": f"```python\n{FUNCTION}```",
    "a fence without language": f"Sure!\n```\n{FUNCTION}```\nThis adds.\n",
    "a fence that is not closed": f"```py\n{FUNCTION}",
    "a fence in a list": "1. Write it:\n   ```python\n" + textwrap.indent(FUNCTION, "   ") + "   ```\n2. Done\n",
    "prose in the first fence": f"```\npip install add\n```\nThen\n```python\n{FUNCTION}```\n",
    "the question in the first fence": f"```python\n{HEAD}```\nbecomes\n```python\n{FUNCTION}```\n",
    "an example call in a fence": f"```python\n{FUNCTION}\nprint(add(1, 2))\n```",
    "fence after the function": f"{FUNCTION}\n```python\nadd(1, 2)\n```\n",
    "a blank before the first line, prose behind": f" {FUNCTION}\nIt adds.\n",
    "indented as a whole": textwrap.indent(f"import math\n{FUNCTION}", "    "),
    "the body without margin behind a blank line": "   \n" + textwrap.dedent(BODY),
    "the body in CRLF": "\r\n" + textwrap.dedent(BODY).replace("\n", "\r\n"),
    "CRLF": f"```python\n{FUNCTION}```".replace("\n", "\r\n"),
    "only the body": BODY,
    "the body in a fence": f"```python\n{BODY}```",
    "the body without its margin": textwrap.dedent(BODY),
    "the body with two blanks": BODY.replace("    ", "  "),
    "the body with tabs": BODY.replace("    ", "\t"),
    "the body deeper": textwrap.indent(BODY, "    "),
    "the body, its first line without margin": BODY.lstrip(),
    "the body, its first line after a blank": " " + BODY.lstrip(),
    "the body with blank lines around": f"\n\n{BODY}\n\n",
    "the body, then prose at the margin": f"{BODY}\nThis adds the numbers.\n",
    "the body, then another function": f"{BODY}\n\ndef sub(a, b):\n    return a - b\n",
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("head", [HEAD, IMPORTS + HEAD])
def test_the_program_is_found_in_an_answer(head, answer):
    program = extract_from_answer(head, answer, "add")
    scope: dict = {}
    exec(program, scope)
    assert scope["add"](2, 3) == 5
    assert not is_trivial(program, "add")
    assert ("half" in scope) == (head != HEAD)
    statements = [type(node).__name__ for node in ast.parse(program).body]
    assert set(statements) <= {"FunctionDef", "Import"} and statements.count("FunctionDef") == 1 + (head != HEAD)


def test_a_body_of_an_answer_is_as_written():
    body = '    if a:\n        text = """\none\n  two\n    \n"""\n        return text\n    return b\n'
    assert extract_from_answer(HEAD, body, "add") == HEAD + body
    assert extract_from_answer(HEAD, f"```python\n{body}```", "add") == HEAD + body
    assert extract_from_answer("def add(a, b):\n", body, "add") == "def add(a, b):\n" + body


def test_a_function_of_an_answer_is_as_written():
    code = 'import re\n\nPATTERN = re.compile("x")\n\n\n@cache\n'
    code += 'def add(a, b):\n    text = """\none\n   \n    ```\n"""\n    return text\n'
    for answer in (f"```python\n{code}```", f"Look:\n\n{code}\nDone.", code):
        assert extract_from_answer("", answer, "add") == code or extract_from_answer("", answer, "add") == code + "\n"


def test_a_body_that_is_half_a_line_short_loses_that_line():
    for margin in ("    ", ""):
        answer = f"{margin}x = a + b\n{margin}return (x +"
        assert extract_from_answer(HEAD, answer, "add", cut_short=True) == HEAD + "    x = a + b\n"
        assert extraction.parse_or_none(extract_from_answer(HEAD, answer, "add")) is None


def test_bodies_whose_first_line_opens_a_block_are_indented_rightly():
    for body in (
        "for x in a:\n    b += x\nreturn b",
        "for x in a:\n        b += x\n    return b",
        "    for x in a:\n        b += x\n    return b",
    ):
        assert dump(extract_from_answer(HEAD, body, "add")) == dump(
            HEAD + "    for x in a:\n        b += x\n    return b\n"
        )


def test_a_body_without_margin_that_is_broken_stays_broken():
    assert extraction.parse_or_none(extract_from_answer(HEAD, "x = 1\nretrn x +\n", "add")) is None


def test_imports_and_helpers_of_an_answer_are_kept_and_those_of_the_question_put_before():
    answer = "import os\n\nK = 2\n\ndef helper(x):\n    return half(x) * K\n\n"
    answer += "def add(a, b):\n    return later(helper(a)) + b\n\ndef later(x):\n    return x\n\nprint(1)\n"
    for text in (answer, f"```\n{answer}```"):
        scope: dict = {}
        exec(extract_from_answer(IMPORTS + HEAD, text, "add"), scope)
        assert scope["add"](2, 3) == 5 and scope["half"](2) == 1


def test_another_signature_is_the_models_choice():
    program = extract_from_answer(HEAD, "def add(*numbers: int) -> int:\n    return sum(numbers)\n", "add")
    assert program == "def add(*numbers: int) -> int:\n    return sum(numbers)\n"


def test_a_function_of_another_name_is_not_the_one_that_was_asked_for():
    for answer in (
        "def plus(a, b):\n    return a + b\n",
        "class Solution:\n    def plus(self, a, b):\n        return a + b\n",
    ):
        program = extract_from_answer(IMPORTS + HEAD, answer, "add")
        assert program == IMPORTS + answer and is_trivial(program, "add")


def test_a_fence_inside_a_docstring_is_no_block():
    answer = 'def add(a, b):\n    """Add.\n\n    ```python\n    add(1, 2)\n    ```\n    """\n    return a + b\n'
    assert extract_from_answer(HEAD, answer, "add") == answer
    assert extract_from_answer(HEAD, f"```python\n{answer}```\n", "add") == answer


def test_prose_alone_is_no_program():
    assert extraction.parse_or_none(extract_from_answer(HEAD, "I cannot help with that.\n", "add")) is None


# -- every reference


SOME_OR_ALL = pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])


@SOME_OR_ALL
@pytest.mark.parametrize("ending", ["", "print(1)\n", "\n\ndef unrelated(x):\n    return (\n"])
def test_every_reference_survives_as_a_completion(ending, step):
    for p in REFERENCES[::step]:
        body = p.solution.removeprefix(p.prompt)
        body += "" if body.endswith("\n") else "\n"
        assert dump(extract_from_completion(p.head, body + ending, p.entry_point)) == dump(p.solution), p.task_id
    for p in load("mbpp")[::step]:
        program = p.solution if p.solution.endswith("\n") else p.solution + "\n"
        assert dump(extract_from_completion("", program + ending, p.entry_point)) == dump(p.solution), p.task_id


@SOME_OR_ALL
def test_every_reference_survives_as_an_answer(step):
    for p in REFERENCES[::step]:
        body = p.solution.removeprefix(p.prompt)
        node = extraction.function(ast.parse(p.solution), p.entry_point)
        before = p.solution.splitlines(keepends=True)[: node.lineno - 1]
        whole = "".join(before) + p.solution
        bodies = {
            "body": body,
            "dedented": textwrap.dedent(body),
            "stripped": body.strip(),
            "fenced": f"```\n{body}\n```",
        }
        for form, answer in bodies.items():
            assert dump(extract_from_answer(p.answer_head, answer, p.entry_point)) == dump(p.solution), (
                p.task_id,
                form,
            )
        for answer in (f"```python\n{p.solution}\n```\nDone.", f"Here it is.\n\n{p.solution}"):
            assert dump(extract_from_answer(p.answer_head, answer, p.entry_point)) == dump(whole), p.task_id
    for p in load("mbpp")[::step]:
        answer = extract_from_answer(p.answer_head, f"Sure:\n```python\n{p.solution}\n```", p.entry_point)
        assert dump(answer) == dump(p.solution), p.task_id


def test_where_generation_stops_does_not_matter_for_a_reference():
    for p in REFERENCES[::6]:
        text = p.solution.removeprefix(p.prompt) + "\n\ndef unrelated(x):\n    return x\n\nx = 1\n"
        ends = {end_of_function(p.head + text[:n], len(p.head), p.entry_point) for n in range(len(text) + 1)} - {None}
        assert len(ends) == 1
        assert dump((p.head + text)[: ends.pop()]) == dump(p.solution)


# -- trivial functions


@pytest.mark.parametrize(
    "body",
    [
        '"""Doc."""',
        "pass",
        "...",
        "# comment\n    pass",
        "raise NotImplementedError",
        "raise NotImplementedError('x')",
        '"""Doc."""\n    pass\n    ...',
        "1",
    ],
)
def test_a_function_that_does_nothing_is_trivial(body):
    assert is_trivial(f"def f(x):\n    {body}\n", "f")
    assert is_trivial(f"import os\n\ndef f(x):\n    {body}\n\ndef g():\n    return 1\n", "f")


@pytest.mark.parametrize(
    "body",
    ["return None", "return", "x", "raise ValueError", "pass\n    return x", "yield", "f(x)", "del x", "def g(): pass"],
)
def test_a_function_that_does_something_is_not_trivial(body):
    assert not is_trivial(f'def f(x):\n    """Doc."""\n    {body}\n', "f")


def test_what_is_missing_or_broken_is_trivial():
    assert is_trivial("def f(x):\n    # only a comment\n", "f")
    assert is_trivial("def g(x):\n    return 1\n", "f")
    assert is_trivial("", "") and is_trivial("# nothing\n", "") and is_trivial('"""Doc."""\n', "")
    assert not is_trivial("x = 1\n", "")


# -- what is nasty for a parser

NASTY = {
    "brackets": "(" * 100_000,
    "minus": "x = " + "-" * 100_000 + "1",
    "lambdas": "lambda:" * 3000 + "0",
    "attributes": "x" + ".b" * 3000,
    "elif": "if a: pass\n" + "elif a: pass\n" * 5000,
    "not": "x = " + "not " * 5000 + "1",
    "a long sum": "x = " + "+".join(["1"] * 20_000),
    "null byte": "x = '\0'",
    "lone surrogate": "x = '\ud800'",
    "byte-order mark": "\ufeffx = 1",
    "form feed": "\fx = 1\r y = 2",
    "digits": "x = " + "1" * 5000,
    "power": "x = 10**10**7",
    "indents": "".join(" " * i + "if x:\n" for i in range(120)),
    "escapes": "x = '\\d'\n" * 5000,
    "cookie": "# -*- coding: utf-7 -*-\nx = 1",
    "f-string": "x = f'" + "{x}" * 5000 + "'",
    "try": "".join("    " * i + "try:\n" for i in range(30)),
    "await": "await x",
}


def _extract(text: str, slot: int) -> tuple[str, ...]:
    programs = (
        extract_from_completion(HEAD, text, "add"),
        extract_from_completion(HEAD, "    " + text + "\nprint(1)\n", "add", True),
        extract_from_answer(HEAD, text, "add"),
        extract_from_answer("", f"```\n{FUNCTION}    {text}\n```", "add"),
    )
    return tuple(str(is_trivial(p, "add")) for p in programs)


@pytest.mark.usefixtures("forked_workers")
def test_nasty_texts_cost_only_themselves():
    results = list(map_jobs(_extract, NASTY.values(), n_workers=2, limit_s=300))  # a busy machine is slow
    assert len(results) == len(NASTY)
    assert not [name for name, result in zip(NASTY, results) if isinstance(result, FailedJob)]


def test_generation_never_parses(monkeypatch):
    monkeypatch.setattr(ast, "parse", lambda *_: pytest.fail("the main process parses what a model wrote"))
    for text in NASTY.values():
        end_of_function(HEAD + "    " + text + "\nprint(1)\n", len(HEAD), "add")


@pytest.mark.parametrize(
    ("program", "empty"),
    [
        ('def add(a, b):\n    """Add."""\n', True),
        ('def add(a, b):\n    """Add."""\n    # a comment\n', True),
        ('def add(a, b):\n    """Add."""\n    pass\n', False),
        ('def add(a, b):\n    """Add."""\n    """More."""\n', False),
        ("def add(a, b):\n    return a + b\n", False),  # an answer that repeats the head without its docstring
        ("import os\n", True),
        ("", True),
    ],
)
def test_a_program_is_empty_without_a_statement_of_its_own_in_the_function(program, empty):
    assert is_empty(program, 'def add(a, b):\n    """Add."""\n', "add") == empty


@pytest.mark.parametrize(
    ("text", "empty"), [("", True), ("# a comment\n", True), ("pass\n", False), ("x = 1\n", False)]
)
def test_a_text_of_no_function_is_empty_without_a_statement(text, empty):
    assert is_empty(text, "", "") == empty

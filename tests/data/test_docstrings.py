import ast
import sys
import sysconfig
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kindling.data.docstrings import Pair, _are_equal, mine_pairs

STDLIB = Path(sysconfig.get_path("stdlib"))

DOC = "Return the sum of a and b."


def functions_of(source: str) -> dict[str, list]:
    """Return all functions outside of functions by qualified name: the plain way, by recursion."""
    found: dict[str, list] = {}

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found.setdefault(prefix + child.name, []).append(child)
            elif not isinstance(child, ast.expr):
                visit(child, f"{prefix}{child.name}." if isinstance(child, ast.ClassDef) else prefix)

    visit(ast.parse(source), "")
    return found


def code_of(function) -> list[str]:
    """Return what a pair must keep of a function: its kind, its signature and what it does."""
    returns = None if function.returns is None else ast.dump(function.returns)
    return [type(function).__name__, ast.dump(function.args), str(returns), *map(ast.dump, function.body[1:])]


def assert_each_pair_is_its_function(source: str) -> list[Pair]:
    """Assert that every pair of `source` parses to the code of a function of its name, lines as in the source."""
    functions = functions_of(source)
    stripped = "\n".join(line.strip() for line in source.split("\n"))
    pairs = mine_pairs(source)
    for pair in pairs:
        task, signature = pair.instruction.split("\n")
        (function,) = ast.parse(f'{signature}\n    """doc"""\n{pair.response}').body
        originals = [f for f in functions[pair.name] if code_of(f) == code_of(function)]
        assert originals, pair
        assert any(task in " ".join(ast.get_docstring(f).split()) for f in originals), pair
        assert "\n".join(line.strip() for line in pair.response.split("\n")) in stripped, pair
        code = next(line for line in pair.response.split("\n") if line.strip() and not line.strip().startswith("#"))
        assert len(code) - len(code.lstrip()) == 4, pair
    return pairs


def test_every_pair_of_real_source_is_the_code_of_its_function():
    pairs = {}
    for path in (path for name in ("asyncio", "email", "json") for path in sorted((STDLIB / name).rglob("*.py"))):
        for pair in assert_each_pair_is_its_function(path.read_text(encoding="utf-8")):
            pairs.setdefault(f"{path.parent.name}.{pair.name}", pair)
    assert len(pairs) > 400
    assert pairs["json.JSONDecoder.decode"].instruction == (
        "Return the Python representation of ``s`` (a ``str`` instance containing a JSON document).\n"
        "def decode(self, s, _w=WHITESPACE.match):"
    )
    assert {"asyncio.Queue.get", "asyncio.BaseEventLoop.run_forever", "email.Message.get_all"} <= set(pairs)


def test_a_pair_is_the_first_paragraph_and_the_signature_and_then_the_body_as_it_is_written():
    source = '''
        import functools

        class Outer:
            class Inner(Base):
                @functools.cache
                async def total( self, a:int ,
                                 *args, b = "x, y" ) -> dict[str,int]:  # a comment of the signature
                    """Return the   sum
                    of a and b.

                    Only this paragraph is left out.
                    """

                    # why it is so
                    x = { "a" : a }   # two words

                    if b:
                        return x[ 'a' ]
                    return (a +
                      len(b))
                    # not any more in the function
    '''
    assert mine_pairs(dedent(source)) == [
        Pair(
            "Outer.Inner.total",
            f"{DOC}\nasync def total(self, a: int, *args, b='x, y') -> dict[str, int]:",
            """    # why it is so
    x = { "a" : a }   # two words

    if b:
        return x[ 'a' ]
    return (a +
      len(b))""",
        )
    ]


STATEMENTS = [
    "x = 'ä\u2028\x1c\x0c'",
    "y = 1; z = [2,  3]",
    "# a comment",
    "",
    "with a as b:\n{}pass",
    "t = '''one line'''",
    "u = 1 + \\\n{}  2",
    "v = (\n{}{}'#', '''x''')",
]


@given(
    unit=st.sampled_from([" ", "  ", "   ", "    ", "        ", "\t"]),
    depth=st.integers(0, 3),
    newline=st.sampled_from(["\n", "\r\n", "\r"]),
    bom=st.booleans(),
    blank=st.sampled_from(["", "", "  ", "\t", "\f"]),
    body=st.lists(st.sampled_from(STATEMENTS), max_size=12),
)
def test_indentation_newlines_and_odd_characters_change_nothing(unit, depth, newline, bom, blank, body):
    lines = [*"\n".join(body).split("\n"), "return 1"]
    margin = unit * depth
    source = [f"{unit * i}class C{i}:" for i in range(depth)]
    source += [f"{margin}def f(a):", f'{margin}{unit}"""{DOC}"""']
    source += [margin + unit + line.replace("{}", unit) if line else blank for line in lines]
    source += ["", f"{margin}x = 3", ""]
    inner = "    " if unit == "\t" else unit
    expected = "\n".join("    " + line.replace("{}", inner) if line else "" for line in lines).lstrip("\n")
    (pair,) = mine_pairs("\ufeff" * bom + newline.join(source))
    assert pair.response == expected
    assert pair.name == "".join(f"C{i}." for i in range(depth)) + "f"


def test_functions_are_found_in_order_wherever_they_are_but_inside_functions():
    function = "def {}(a):\n    '''Return the sum of a and b.'''\n    return a\n"

    def block(head: str, name: str) -> str:
        return head + "\n" + "".join(f"    {line}\n" for line in function.format(name).splitlines())

    source = "".join(
        [
            block("if a:", "in_if"),
            block("elif b:", "in_elif"),
            block("else:", "in_else"),
            block("try:", "in_try"),
            block("except ImportError:", "in_except"),
            block("else:", "in_try_else"),
            block("finally:", "in_finally"),
            block("with a as b:", "in_with"),
            block("for a in b:", "in_for"),
            "match a:\n" + "".join(f"  {line}\n" for line in block("case 1:", "in_case").splitlines()),
            block("class C:", "method"),
            block("def outer():", "hidden"),
            function.format("last"),
        ]
    )
    found = [pair.name for pair in mine_pairs(source)]
    assert found == [
        *("in_if", "in_elif", "in_else", "in_try", "in_except", "in_try_else", "in_finally", "in_with", "in_for"),
        *("in_case", "C.method", "last"),
    ]


def test_a_function_at_the_end_of_a_thousand_elif_is_found():
    chain = "".join(f"elif a == {i}:\n    pass\n" for i in range(1, 1000))
    source = f"if a == 0:\n    pass\n{chain}else:\n    def f(a):\n        '''{DOC}'''\n        return a\n"
    assert [pair.name for pair in mine_pairs(source)] == ["f"]


def pair_of(docstring: str, body: str = "return a + b", signature: str = "def f(a, b):") -> Pair | None:
    """Return the pair of one function, or None where it is left out."""
    lines = [signature, *f'"""{docstring}"""'.split("\n"), *body.split("\n")]
    found = mine_pairs("\n    ".join(lines) + "\n")
    assert len(found) <= 1
    return found[0] if found else None


@pytest.mark.parametrize(
    ("docstring", "task"),
    [
        (DOC, DOC),
        ("\n    Return the\n      sum\tof  a and b.\n    ", DOC),
        (DOC + "\n\nMore.", DOC),
        (DOC + "\n   \nMore.", DOC),
        (DOC + "\n>>> f(1, 2)\n3", DOC),
        (DOC + "\n:param a: a number", DOC),
        (DOC + "\n@param a: a number", DOC),
        (DOC + "\nParameters\n----------\na : int", DOC),
        (DOC + "\nArgs:\n    a: a number", DOC),
        (DOC + "\nReturns: a number", DOC),
        (DOC + "\nKeyword arguments:\na -- a number", DOC),
        (DOC + "\n.. versionadded:: 3.4", DOC),
        (DOC + "\n```python\nf(1, 2)\n```", DOC),
        (DOC + "\na (int, *optional*): a number", DOC),
        (
            "Return the sum of\n:class:`Int` and\n:py:class:`Int`.",
            "Return the sum of :class:`Int` and :py:class:`Int`.",
        ),
        ("Return arguments and\nreturns of a.", "Return arguments and returns of a."),
        ("See if the two are equal.", "See if the two are equal."),
        ("Summe über a und b", "Summe über a und b"),
        ("Return \\x41 of a and b.", "Return A of a and b."),
        ("Is it a b or c", None),  # 14 characters
        ("Is it a, b or c", "Is it a, b or c"),
        ("Return numberofthings", None),
        ("Return number things", "Return number things"),
        ("Return the " + "x" * 389, "Return the " + "x" * 389),
        ("Return the " + "x" * 390, None),
        ("", None),
        ("Args:\n    a: the number that is added\n    b: the other number", None),
        ("a (`int`): the number that is added", None),
        ("Parameters\n==========\nthe number that is added", None),
        ("See BaseClass.f for what it does.", None),
        ("see base class, please do", None),
        ("TODO: write what this does", None),
        ("(deprecated) Return the sum of a and b.", None),
        (".. deprecated:: 3.5\n   Use another function.", None),
        ("Internal use only, do not call", None),
        ("For internal use only, do not call", None),
        ("Return a null byte \\0 of b.", None),
        ("Return half a pair \\ud800 of b.", None),
    ],
)
def test_the_first_paragraph_is_the_task_if_it_says_something(docstring, task):
    pair = pair_of(docstring)
    assert (None if pair is None else pair.instruction) == (None if task is None else f"{task}\ndef f(a, b):")


@pytest.mark.parametrize(
    ("body", "is_kept"),
    [
        ("return a", True),
        ("pass", False),
        ("...", False),
        ("# nothing but a comment", False),
        ("'another string'", False),
        ("'another string'\npass", False),
        ("raise NotImplementedError", False),
        ("raise NotImplementedError('f') from None", False),
        ("raise ValueError('a')", True),
        ("raise", True),
        ("f = 1\nraise NotImplementedError", True),
        ("pass\nreturn 1", True),
        ("f()", True),
        ("\n".join(["f()"] * 60), True),
        ("\n".join(["f()"] * 61), False),
        ("\n\n# " + "\n".join(["f()"] * 60), True),
    ],
)
def test_bodies_that_do_nothing_or_are_long_are_left_out(body, is_kept):
    assert (pair_of(DOC, body) is not None) == is_kept


@pytest.mark.parametrize(
    ("signature", "line"),
    [
        ("def f(a, /, b: 'int' = 1, *, c=[ ], **d) -> None:", "def f(a, /, b: 'int'=1, *, c=[], **d) -> None:"),
        ("async def f(\n        a,\n):", "async def f(a):"),
        ("@property\n    # why\n    @g(1)\ndef f(a):".replace("    ", ""), "def f(a):"),
        ("def f(a='\\ud800\\n'):", "def f(a='\\ud800\\n'):"),
        ("def f(a=" + "x" * 190 + "):", "def f(a=" + "x" * 190 + "):"),
        ("def f(a=" + "x" * 191 + "):", None),
        ("def f(a=1" + "+1" * 600 + "):", None),  # too deep for ast.unparse
        ("def f(a=0x" + "f" * 4000 + "):", None),  # an integer that Python does not print
    ],
)
def test_the_signature_is_one_line_without_decorators(signature, line):
    pair = pair_of(DOC, signature=signature)
    assert (None if pair is None else pair.instruction.split("\n", 1)[1]) == line


def test_a_signature_that_python_cannot_write_on_one_line_is_left_out():
    pair = pair_of(DOC, signature="def f(a=f'''{x:\n}'''):")  # Python 3.11 writes it on two
    assert pair is None or pair.instruction.count("\n") == 1


@pytest.mark.skipif(sys.version_info < (3, 12), reason="type parameters are of Python 3.12")
def test_type_parameters_are_part_of_the_signature():
    assert pair_of(DOC, signature="def f[T: int](a: T):").instruction.endswith("\ndef f[T: int](a: T):")


@pytest.mark.parametrize(
    ("source", "response"),
    [
        (f"def f(a): '''{DOC}'''; return a\n", None),
        (f"def f(a):\n    '''{DOC}'''; return a\n", None),
        (f"def f(a):\n    '''{DOC}'''; b = a\n    return b\n", None),
        (f"def f(a):\n    '''{DOC}'''; a()\n    a()\n", None),
        (f"def f(a):\n    '''{DOC}'''; return (\n        a)\n", None),
        (f'def f(a):\n    \'{DOC}\'; return """\n    # a"""\n', None),
        (f"def f(a): \\\n    '''{DOC}'''; \\\n    return a\n", "    return a"),
        ("def f(a):\n    ('Return the sum '\n     'of a and b.'\n    )\n    return a\n", "    return a"),
        (f"def f(a):\n    '''{DOC}'''  # noqa\n    return a; b\n", "    return a; b"),
        (f"def f(a):\n    '''{DOC}'''\n    @g\n    def h():\n        pass", "    @g\n    def h():\n        pass"),
        (f"def f(a):\n    '''{DOC}'''\n# left\n    return a", "# left\n    return a"),
        (
            f"class A:\n\tdef f(a):\n\t\t'''{DOC}'''\n\t\t# in\n\t\tif a:\n\t\t\treturn\t1",
            "    # in\n    if a:\n        return\t1",
        ),
        (f"def f(a):\n    '''{DOC}'''\n\f\n    b()\n \f\n\f    return a\n", "    b()\n\n    return a"),
        (f"def f(a):\n  '''{DOC}'''\n  if a:\n    return (a,\n  1)\n", "    if a:\n      return (a,\n    1)"),
        (f"def f(a):\n    '''{DOC}'''\n    return '''\n  x\n\ty'''\n", None),  # a tab that would become spaces
        (f"def f(a):\n    '''{DOC}'''\n    return '''\n  x\n y'''\n", "    return '''\n  x\n y'''"),
        (f"def f(a):\n    '''{DOC}'''\n    return '''\n\u2028x'''\n", "    return '''\n\u2028x'''"),
        (f"class A:\n    def f(a):\n        '''{DOC}'''\n        return '''\n        x'''\n", None),
        (f"class A:\n    def f(a):\n        '''{DOC}'''\n        return '''\nx'''\n", "    return '''\nx'''"),
        (f"class A:\n    def f(a):\n        '''{DOC}'''\n        return f'''\n        {{a}}'''\n", None),
        (f"def f(a):\n    '''{DOC}'''\n    return '''\n  \n'''\n", None),  # spaces that would go
    ],
)
def test_a_body_is_moved_whole_or_the_function_left_out(source, response):
    assert [pair.response for pair in mine_pairs(source)] == ([] if response is None else [response])
    assert_each_pair_is_its_function(source)


def test_a_body_that_is_a_thousand_deep_is_kept():
    assert pair_of(DOC, "return 1" + "+1" * 900).response == "    return 1" + "+1" * 900


def test_trees_are_compared_as_their_dumps_are():
    codes = [
        "1",
        "1.0",
        "True",
        "'1'",
        "u'1'",
        "b'1'",
        "[]",
        "[a]",
        "[a, b]",
        "(a, b)",
        "a + b",
        "a - b",
        "a[:1]",
        "a = b",
    ]
    for one in codes:
        for other in codes:
            trees = ast.parse(one), ast.parse(other)
            assert _are_equal(*trees) == (ast.dump(trees[0]) == ast.dump(trees[1])), (one, other)


@pytest.mark.filterwarnings("error")
def test_a_strangers_bad_escape_is_no_warning_of_ours():
    assert pair_of("Return the sum of \\d and b.", "return '\\d'").instruction.startswith(
        "Return the sum of \\d and b.\n"
    )


@pytest.mark.parametrize("source", ["def f(:\n", "print 'python 2'", "x = '\ud800'", "x\0", "x = 1" + "+1" * 100_000])
def test_what_is_no_python_raises_what_the_parser_raises(source):
    with pytest.raises((SyntaxError, ValueError, RecursionError, MemoryError)):
        mine_pairs(source)

import contextlib
import sys
import time
import warnings
from bisect import bisect_left

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import DataConfig
from kindling.data.filters import (
    alphanumeric_share,
    evidence_of_test_file,
    first_failed_filter,
    non_ascii_share,
    strip_header,
    syntax_error,
)

STRICT = DataConfig(
    min_chars=3,
    max_chars=200,
    min_lines=2,
    max_lines=20,
    max_line_chars=50,
    min_alphanumeric=0.3,
    max_non_ascii=0.2,
    drop_tests=True,
    drop_generated=True,
)


@pytest.mark.parametrize(
    ("text", "rule", "value"),
    [
        ("x = 1\ny = 2\n", None, ""),
        ("x = 1\n\0\n", "NUL", "character 6"),
        ("import unittest\nclass A(unittest.TestCase):\n    pass\n", "test file", "TestCase"),
        ("# AUTO-GENERATED, see make.py\nx = 1\n", "generated", "AUTO-GENERATED"),
        ("x", "characters", "1, not 3 to 200"),
        ("x = 1\n" * 60, "characters", "360, not 3 to 200"),
        ("xxxxxxxxxxxx", "lines", "1, not 2 to 20"),
        ("x\n" * 30, "lines", "30, not 2 to 20"),
        ("x = 1\ny = '" + "a" * 60 + "'\n", "line length", "66 characters, above 50"),
        ("x = 'äöü ☃☃☃'\ny = 2\n", "non-ASCII", "0.300 of the characters, above 0.2"),
        ("#-#-#-#-\n#-#-#-a\n", "alphanumeric", "0.059 of the characters, below 0.3"),
        ("def f(:\n    pass\n", "syntax", "line 1: invalid syntax"),
        ("print 'python 2'\nx = 1\n", "syntax", "Missing parentheses"),
    ],
)
def test_each_filter_drops_what_it_should_by_its_name_and_says_the_value(text, rule, value):
    drop = first_failed_filter(text, "a.py", "python", STRICT)
    assert (None if drop is None else drop.rule) == rule
    assert drop is None or value in drop.value


def test_by_default_nothing_is_dropped_but_what_is_broken():
    assert first_failed_filter("// DO NOT EDIT\n" + "é" * 5000, "tests/test_a.c", "c", DataConfig()) is None


def test_only_python_is_compiled():
    assert first_failed_filter("int main() { return 0; }\n", "a.c", "c", DataConfig()) is None
    assert first_failed_filter("int main() { return 0; }\n", "a.py", "python", DataConfig()).rule == "syntax"


@given(st.text())
def test_the_alphanumeric_share_is_that_of_str_isalnum(text):
    assert alphanumeric_share(text) == pytest.approx(sum(c.isalnum() for c in text) / max(1, len(text)))


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_the_non_ascii_share_is_that_of_str_isascii(text):
    assert non_ascii_share(text) == pytest.approx(sum(not c.isascii() for c in text) / max(1, len(text)))


@pytest.mark.parametrize(
    ("key", "language", "is_test"),
    [
        ("src/test_io.py", "python", True),
        ("src/io_test.py", "python", True),
        ("conftest.py", "python", True),
        ("repo/Tests/helper.py", "python", True),
        ("src/test/java/Foo.java", "java", True),
        ("FooTest.java", "java", True),
        ("TestFoo.java", "java", True),
        ("test_list.c", "c", True),
        ("testing_grounds.py", "python", False),  # a name that only begins like one
        ("Testament.java", "java", False),
        ("contest.py", "python", False),
        ("latest/fastest.py", "python", False),
        ("numpy/testing/overrides.py", "python", False),  # a library for tests, not a test
        ("repo/testing/test_io.py", "python", True),
        ("attest/test.md", "markdown", False),
    ],
)
def test_test_files_are_known_by_name_and_folder_and_not_by_words_that_begin_so(key, language, is_test):
    assert bool(evidence_of_test_file("x = 1\n", key, language)) == is_test


@pytest.mark.parametrize(
    ("text", "language", "is_suite"),
    [
        ("class A(TestCase):\n    pass\n", "python", True),
        ("class A(base.MyTestCase):\n    pass\n", "python", False),
        ("class TestCase(object):\n    pass\n", "python", False),  # the base class itself is not a suite
        ("class A {\n    @Test\n    void f() {}\n}\n", "java", True),
        ("/* see @Test */ class A {}\n", "java", False),
    ],
)
def test_suites_of_test_classes_are_known_by_their_content(text, language, is_suite):
    assert bool(evidence_of_test_file(text, "a.src", language)) == is_suite


LICENCE = [f"line {i} of a licence" for i in range(25)]
CODE = "import os\n\n# a comment of the code\nx = 1\n"


@pytest.mark.parametrize(
    ("before", "after", "language"),
    [
        ("".join(f"# {x}\n" for x in LICENCE) + CODE, CODE, "python"),
        (
            "#!/usr/bin/env python\n" + "".join(f"# {x}\n" for x in LICENCE) + CODE,
            "#!/usr/bin/env python\n" + CODE,
            "python",
        ),
        ('"""' + "\n".join(LICENCE) + '\n"""\n' + CODE, CODE, "python"),
        ("# short\n\n'''" + "\n".join(LICENCE) + "\n'''\n" + CODE, "# short\n" + CODE, "python"),
        ("/*\n" + "\n".join(LICENCE) + "\n*/\nint x;\n", "int x;\n", "c"),
        ("\n".join(f"// {x}" for x in LICENCE) + "\nint x;\n", "int x;\n", "java"),
        ("/* short */\n/*\n" + "\r\n".join(LICENCE) + "\r\n*/\r\nint x;\r\n", "/* short */\nint x;\r\n", "c"),
        (
            '"""' + "\n".join(LICENCE) + '"""\n' + '"""' + "\n".join(LICENCE) + '"""\n',
            '"""' + "\n".join(LICENCE) + '"""\n',
            "python",
        ),
        ("# short\n" + CODE, "# short\n" + CODE, "python"),
        ('"""Short."""  # noqa\n' + CODE * 30 + 'def f():\n    """Doc."""\n', None, "python"),
        ("/* package */ class X {\n" + "int f;\n" * 30 + "/* end */\n}\n", None, "java"),
        ("/* a */ #include <x.h>\n" + "int f;\n" * 30 + "/* end */\nint main;\n", None, "c"),
        ("x = 1\n" + '"""' + "\n".join(LICENCE) + '"""\n', None, "python"),  # not at the beginning
        ('"""' + "\n".join(LICENCE) + '""".format(1)\n', None, "python"),  # an expression, not a docstring
        ("".join(f"# {x}\n" for x in LICENCE), None, "markdown"),
    ],
)
def test_long_headers_and_docstrings_are_cut_off_and_nothing_else(before, after, language):
    assert strip_header(before, language, 20) == (before if after is None else after)


def test_cutting_the_headers_of_real_modules_leaves_them_valid(corpus):
    shorter = 0
    for path in corpus.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        body = strip_header(text, "python", 3)
        assert text.endswith(body[-200:]) and syntax_error(body) is None, path
        shorter += len(body) < len(text)
    assert shorter > 5


@pytest.mark.parametrize(
    "text",
    ["-" * 100_000, "(" * 100_000, "not " * 5000 + "x", "x\x00", "'" + "a" * 300_000 + "'", "1" * 5000, "await x"],
)
def test_strangers_code_cannot_break_the_syntax_filter(text):
    assert syntax_error(text)


@contextlib.contextmanager
def parser_limits(calls: int, digits: int):
    """What another library of this process may have set."""
    before = sys.getrecursionlimit(), sys.get_int_max_str_digits()
    sys.setrecursionlimit(calls), sys.set_int_max_str_digits(digits)
    try:
        yield
        assert (sys.getrecursionlimit(), sys.get_int_max_str_digits()) == (calls, digits)
    finally:
        sys.setrecursionlimit(before[0]), sys.set_int_max_str_digits(before[1])


def called_deeper(n: int, text: str) -> str | None:
    """What the filter says when it is called with `n` more calls under way, each of them through C."""
    return syntax_error(text) if n == 0 else next(map(lambda _: called_deeper(n - 1, text), [0]))


@pytest.mark.parametrize(("calls", "digits"), [(600, 4300), (1000, 640), (2000, 0), (20_000, 100_000)])
def test_what_the_syntax_filter_says_is_a_function_of_the_text(calls, digits):
    texts = ["not " * 100 + "x", "not " * 5000 + "x", "1" * 4300, "1" * 4301, "'\\d'", "x ="]
    if sys.version_info < (3, 12):  # later versions do not count Python's calls, and count those in C differently
        n_refused = bisect_left(range(6000), True, key=lambda n: syntax_error("not " * n + "x") is not None)
        texts += [word * n + "x" for n in (n_refused - 1, n_refused) for word in ("not ", "x + ", "-")]
    expected = [syntax_error(text) for text in texts]
    assert expected[0] is None and expected[2] is None and all((expected[1], expected[3], expected[5]))
    for n in (0, 40):
        with parser_limits(calls, digits), warnings.catch_warnings():
            warnings.simplefilter("error")
            assert [called_deeper(n, text) for text in texts] == expected


def test_compiling_does_not_run_the_code(tmp_path):
    assert syntax_error(f"open({str(tmp_path / 'ran')!r}, 'w')") is None
    assert not (tmp_path / "ran").exists()


PIECES = {
    "python": ["# c\n", "\n", "  \n", '"""d"""\n', '"""d\ne"""\n', '"""d""" + CODE\n', "CODE = 1\n", "#!c\n"],
    "c": ["// c\n", "\n", " \t\n", "/* c */\n", "/* c\nd */\r\n", "/* c */ CODE\n", "CODE;\n", "/* c */ /* d */\n"],
}


@given(st.sampled_from(["python", "c"]).flatmap(lambda x: st.tuples(st.just(x), st.lists(st.sampled_from(PIECES[x])))))
def test_cutting_headers_never_takes_code(case):
    language, text = case[0], "".join(case[1])
    body = strip_header(text, language, 1)
    assert body.count("CODE") == text.count("CODE")
    assert "CODE" not in body or text.endswith(body[body.find("CODE") :])


@pytest.mark.parametrize(
    ("text", "language"), [(" " * 1_000_000 + "x", "python"), ("\n" * 1_000_000 + "x", "c"), ("/*" * 500_000, "java")]
)
def test_cutting_headers_costs_time_in_proportion_to_the_text(text, language):
    started = time.process_time()
    assert strip_header(text, language, 20) == text
    assert time.process_time() - started < 30  # hours, if each blank were tried again from the next

"""Programs that give no right answer but try to decide the verdict, or to keep the process that judges busy for ever."""

import time

import pytest
from test_tests_as_written import DOC, MODE, POINT, Row, problem

from kindling.evaluation.check_correctness import check_answers
from kindling.sandbox.process import Limits

LIMITS = Limits(cpu_s=4, wall_s=30.0)
RIGHT = "return x * x"
ALL = "assert all(map(lambda a: candidate(a) == a * a, [1, 2, 3])) and list(map(candidate, [1, 2])) == [1, 4]"

FORGED = {  # the test, and a program that must not pass it
    "StopIteration ends a map": (
        "assert all(map(candidate, [1, 2, 3]))\nassert not any(map(lambda a: candidate(a) != a * a, [1, 2]))",
        "raise StopIteration",
    ),
    "StopIteration ends a zip": (
        "for a, b in zip(map(candidate, [1, 2]), [1, 4]): assert a == b",
        "raise StopIteration",
    ),
    "StopAsyncIteration": (ALL, "raise StopAsyncIteration"),
    "a field that is a question": (
        "assert candidate(1).startswith('abc')",
        "from collections import namedtuple\nreturn namedtuple('T', 'startswith')(bool)",
    ),
    "a field that is a type": (
        "c = candidate(1)\nassert c.has('a') and c.equals([1, 2])",
        "from collections import namedtuple\nreturn namedtuple('T', 'has equals')(bool, bool)",
    ),
    "an answer too large, where ValueError is awaited": (
        "try:\n    candidate(-1)\nexcept ValueError:\n    pass\nelse:\n    assert False",
        "return 'x' * 2_000_000",
    ),
    "an answer too deep, where an error is awaited": (
        "try:\n    candidate(-1)\nexcept (ValueError, RecursionError):\n    pass\nelse:\n    assert False",
        "v = []\nfor _ in range(5000):\n    v = [v]\nreturn v",
    ),
}
BUSY = {
    "views of views": "v = {}.values()\nfor _ in range(30):\n    v = {1: {v: 1}.keys()}.values()\nreturn v",
    "a ring of arguments": "x[:] = [x] * 10_000\nreturn 'x' * 200_000",
    "a fraction of a text": (
        "import fractions\nclass Fraction:\n    numerator, denominator = '1e3000000000', None\n"
        "fractions.Fraction = Fraction\nreturn Fraction()"
    ),
    "a fraction of huge numbers": "import fractions\nreturn fractions.Fraction(3 ** 600_000, 2 ** 900_000)",
    "many ranges": "return [range(2_000_000) for _ in range(1000)]",
}


@pytest.mark.parametrize("name", FORGED)
def test_a_program_does_not_give_its_own_verdict(name, tmp_path):
    test, wrong = FORGED[name]
    asked = problem(Row("def f(x):" + DOC, RIGHT, test), tmp_path)
    program = asked.prompt + "".join(f"    {line}\n" for line in wrong.split("\n"))
    assert check_answers(asked, program, MODE, LIMITS).verdict != "passed"


def test_an_attribute_of_a_shared_class_is_no_question(tmp_path):
    row = Row(POINT + "def f(x):" + DOC, "return Point(x, x)", "assert candidate(1).isdigit()")
    asked = problem(row, tmp_path)
    program = asked.prompt + "    p = Point(1, 1)\n    p.isdigit = object\n    return p\n"
    assert check_answers(asked, program, MODE, LIMITS).verdict != "passed"


@pytest.mark.parametrize("name", BUSY)
def test_an_answer_does_not_keep_the_judge_busy(name, tmp_path):
    test = "found = candidate([1])\nassert sum(len(list(r)) for r in found) == -1"
    asked = problem(Row("def f(x):" + DOC, "return []", test), tmp_path)
    program = asked.prompt + "".join(f"    {line}\n" for line in BUSY[name].split("\n"))
    started = time.process_time()
    assert check_answers(asked, program, MODE, LIMITS).verdict != "passed"
    assert time.process_time() - started < 5  # of this process; before, minutes


def test_a_loop_over_an_iterator_of_the_program_still_ends(tmp_path):
    row = Row("def f(x):" + DOC, "yield from range(x)", "assert list(candidate(3)) == [0, 1, 2]")
    asked = problem(row, tmp_path)
    assert check_answers(asked, asked.solution, MODE, LIMITS).verdict == "passed"

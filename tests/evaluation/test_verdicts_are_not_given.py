"""Programs that give no right answer but try to decide the verdict, or to keep the process that judges busy for ever."""

import signal
import time

import pytest
from test_objects_as_written import FLAGS, FROZEN
from test_tests_as_written import DOC, LINKED, MODE, POINT, Row, problem

from kindling.evaluation.check_correctness import check_answers
from kindling.sandbox.process import Limits
from kindling.sandbox.watch import Watch

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
    "an answer too large, where ValueError is awaited": (
        "try:\n    candidate(-1)\nexcept ValueError:\n    pass\nelse:\n    assert False",
        "return 'x' * 2_000_000",
    ),
    "an answer too deep, where an error is awaited": (
        "try:\n    candidate(-1)\nexcept (ValueError, RecursionError):\n    pass\nelse:\n    assert False",
        "v = []\nfor _ in range(5000):\n    v = [v]\nreturn v",
    ),
}
FORGED |= {
    "a context that drops the error": (
        "with candidate(1):\n    assert False",
        "class C:\n    __enter__ = lambda self: self\n    __exit__ = lambda *a: True\nreturn C()",
    ),
    "an error in place of the test's own": (
        "try:\n    with candidate(1):\n        assert False\nexcept ValueError:\n    pass",
        "class C:\n    __enter__ = lambda self: self\n    def __exit__(self, *a):\n        raise ValueError\nreturn C()",
    ),
    "an answer in a test's error": ("raise ValueError(candidate(1))", "return object()"),
    "an error with a method of its own": (
        "try:\n    candidate(1)\nexcept Bad as e:\n    assert e.isdigit()",
        "e = Bad()\ne.isdigit = bool\nraise e",
    ),
}
FORGE = "import sys\nsys.modules['kindling.sandbox.worker_values'].Values.answer = lambda *a: "
FORGED |= {
    "an error of a class's own method, while the answer is read": (
        "try:\n    candidate(-1)\nexcept RuntimeError:\n    return\nassert False",
        "h = Hashed(1)\nfound = {h}\nh.x = -1\nreturn found",
    ),
    "attributes of an error that are asked of the program": (
        "try:\n    candidate(1)\nexcept Bad as e:\n    return\nassert False",
        FORGE + """'{"error":[["Bad"],"x",{"t":[null,{"h":[0,"x"]}]}]}'""",
    ),
    "a StopIteration of the problem's own ends a map": (
        "assert all(map(candidate, [1, 2, 3]))",
        FORGE + """'{"error":[["Done"],"x",{"t":[null,{"d":[]}]}]}'""",
    ),
}
HEAD = (
    "class Bad(Exception):\n    pass\n\nclass Done(StopIteration):\n    pass\n\nclass Hashed:\n    def __init__(self, x):\n"
    "        self.x = x\n    def __hash__(self):\n        if self.x < 0:\n            raise RuntimeError\n        return 1\n\n"
)
BUSY = {
    "two of each list, one where it is numbered": (
        'v = \'{"l":[]}\'\nfor i in range(60):\n    v = \'{"l":[{"m":[%d,%s]},{"a":%d}]}\' % (i + 9, v, i + 9)\n'
        + FORGE
        + "'{\"ok\":' + v + '}'"
    ),
    "views of views": "v = {}.values()\nfor _ in range(30):\n    v = {1: {v: 1}.keys()}.values()\nreturn v",
    "a ring of arguments": "x[:] = [x] * 10_000\nreturn 'x' * 200_000",
    "a fraction of a text": (
        "import fractions\nclass Fraction:\n    numerator, denominator = '1e3000000000', None\n"
        "fractions.Fraction = Fraction\nreturn Fraction()"
    ),
    "a fraction of huge numbers": FORGE
    + """'{"ok":{"l":[{"v":["Fraction",[{"i":"' + 'f' * 240_000 + '"},{"i":"' + '3a7' * 80_000 + '"}]]}]}}'""",
    "lists of lists that are the same": "v = [1]\nfor _ in range(60):\n    v = [v, v]\nreturn v",
    "a ring of such lists": "first = v = []\nfor _ in range(60):\n    v = [v, v]\nfirst.append(v)\nreturn v",
    "a flag of many bits": "return Bits(2 ** 400_000 - 1)",
    "many ranges": "return [range(2_000_000) for _ in range(1000)]",
}


WALK = "node, n = candidate(2), 0\nwhile node is not None:\n    node, n = node.next, n + 1\nassert n == 2"
COUNT = (
    "def count(node):\n    return 1 + count(node.value) + count(node.next) if isinstance(node, Node) else 0\n"
    "assert count(candidate(2)) == 2"
)
CAUGHT = "try:\n    node = candidate(2)\n    while node:\n        node = node.next\nexcept:\n    pass"
ENDLESS = {  # the test, and a program whose answer a test would walk along for ever
    "a ring": (WALK, "node = Node(1)\nnode.next = node\nreturn node"),
    "a ring of an object with a hash": (
        "cell = candidate(2)\nwhile isinstance(cell, Cell):\n    cell = cell.place",
        "cell = Cell(1)\nobject.__setattr__(cell, 'place', cell)\nreturn cell",
    ),
    "a ring, and all errors are caught": (CAUGHT, "node = Node(1)\nnode.next = node\nreturn node"),
    "more paths than can be counted": (COUNT, "node = None\nfor i in range(60):\n    node = Node(node, node)\nreturn node"),
    "hashes of more paths than can be counted": (
        "assert len(candidate(1)) == 2",
        "Cell.__hash__ = lambda self: 1\nnode = Cell(1)\nfor i in range(60):\n    node = Cell((node, node))\nreturn {node}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS)
def test_a_test_that_walks_along_an_answer_without_end_is_ended(name, tmp_path, monkeypatch):
    monkeypatch.setattr("kindling.sandbox.process.Watch", lambda limit_s, fail: Watch(limit_s / 10, fail))
    test, wrong = ENDLESS[name]
    right = "return Node(1, Node(2)) if x == 2 else {Cell(1), Cell(2)}"
    asked = problem(Row(FROZEN + LINKED + "def f(x):" + DOC, right, test), tmp_path)
    limits = Limits(cpu_s=1, wall_s=30.0)
    assert check_answers(asked, asked.solution, MODE, limits).verdict == "passed"
    program = asked.prompt + "".join(f"    {line}\n" for line in wrong.split("\n"))
    started = time.process_time()
    assert check_answers(asked, program, MODE, limits).verdict in ("timeout", "exception")
    assert time.process_time() - started < 2  # of this process
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


@pytest.mark.parametrize("name", FORGED)
def test_a_program_does_not_give_its_own_verdict(name, tmp_path):
    test, wrong = FORGED[name]
    asked = problem(Row(HEAD + "def f(x):" + DOC, RIGHT, test), tmp_path)
    program = asked.prompt + "".join(f"    {line}\n" for line in wrong.split("\n"))
    assert check_answers(asked, program, MODE, LIMITS).verdict != "passed"


def test_an_attribute_of_a_shared_class_is_no_question(tmp_path):
    row = Row(POINT + "def f(x):" + DOC, "return Point(x, x)", "assert candidate(1).isdigit()")
    asked = problem(row, tmp_path)
    program = asked.prompt + "    p = Point(1, 1)\n    p.isdigit = object\n    return p\n"
    assert check_answers(asked, program, MODE, LIMITS).verdict != "passed"


@pytest.mark.parametrize("name", BUSY)
def test_an_answer_does_not_keep_the_judge_busy(name, tmp_path):
    test = "found = candidate([1])\nassert str(found) == '' or sum(len(list(r)) for r in found) == -1"
    asked = problem(Row(FLAGS + "def f(x):" + DOC, "return []", test), tmp_path)
    program = asked.prompt + "".join(f"    {line}\n" for line in BUSY[name].split("\n"))
    started = time.process_time()
    assert check_answers(asked, program, MODE, LIMITS).verdict != "passed"
    assert time.process_time() - started < 5  # of this process; before, minutes


def test_a_loop_over_an_iterator_of_the_program_still_ends(tmp_path):
    row = Row("def f(x):" + DOC, "yield from range(x)", "assert list(candidate(3)) == [0, 1, 2]")
    asked = problem(row, tmp_path)
    assert check_answers(asked, asked.solution, MODE, LIMITS).verdict == "passed"

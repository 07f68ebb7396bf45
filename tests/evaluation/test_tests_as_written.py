# ruff: noqa: E501  a test of the table is one line
"""Tests as the authors of problems write them: what is legal in HumanEval's format passes, and wrong programs do not.

Each row is a prompt, a reference, a test and a program that is wrong and must not pass.
"""

import json
import shutil
import textwrap
from typing import NamedTuple

import pytest

from kindling.evaluation.check_correctness import check_answers
from kindling.evaluation.tasks import Problem, load
from kindling.sandbox.process import Limits

MODE = "bwrap" if shutil.which("bwrap") else "none"
LIMITS = Limits(cpu_s=6, wall_s=60.0)


class Row(NamedTuple):
    """One problem: its reference, its test, and a wrong body of the function."""

    prompt: str
    solution: str
    test: str
    wrong: str = "    return None"


def problem(row: Row, folder) -> Problem:
    """Return the problem as it is read from a file in HumanEval's format."""
    prompt, solution, test = map(textwrap.dedent, row[:3])
    fields = {"task_id": "HumanEval/9000", "prompt": prompt.strip("\n") + "\n", "entry_point": "f"}
    fields |= {"canonical_solution": textwrap.indent(solution.strip("\n"), "    ") + "\n"}
    fields["test"] = f"def check(candidate):\n{textwrap.indent(test.strip(chr(10)), '    ')}\n"
    path = folder / "problems.jsonl"
    path.write_text(json.dumps(fields) + "\n", encoding="utf-8")
    return load("humaneval", str(path))[0]


DOC = '\n    """Do it."""'
LINKED = "class Node:\n    def __init__(self, value, next=None):\n        self.value, self.next = value, next\n\n"
POINT = "from dataclasses import dataclass\n\n@dataclass\nclass Point:\n    x: int\n    y: int\n\n"
NAMED = "from typing import NamedTuple\n\nclass Pair(NamedTuple):\n    a: int\n    b: int\n\n"
COLOR = "import enum\n\nclass Color(enum.Enum):\n    RED = 1\n    BLUE = 2\n\n"

FROM_REPORTS = {  # as in public bug reports
    "in place": Row("def f(xs):" + DOC, "xs.sort()", "a = [3, 1, 2]\ncandidate(a)\nassert a == [1, 2, 3]"),
    "an awaited error": Row(
        "def f(x):" + DOC,
        "if x < 0:\n    raise ValueError('negative')\nreturn x ** 0.5",
        "assert candidate(4) == 2\ntry:\n    candidate(-1)\nexcept ValueError:\n    return\nassert False",
        "    return abs(x) ** 0.5",
    ),
    "a long integer": Row(
        "import math\n\ndef f(n):" + DOC,
        "return math.factorial(n)",
        "import math\nassert candidate(2000) == math.factorial(2000)",
        "    return math.factorial(n) + 1",
    ),
    "a long list": Row(
        "def f(n):" + DOC,
        "return list(range(n))",
        "assert candidate(40000) == list(range(40000))",
        "    return list(range(n - 1)) + [0]",
    ),
    "a generator": Row(
        "def f(n):" + DOC,
        "yield from range(n)",
        "assert list(candidate(3)) == [0, 1, 2]\nassert next(candidate(9)) == 0",
    ),
    "a view": Row(
        "def f(d):" + DOC,
        "return d.keys()",
        "assert sorted(candidate({2: 3, 1: 0})) == [1, 2]\nassert candidate({1: 2}) == {1}",
        "    return d.values()",
    ),
    "a range": Row(
        "def f(n):" + DOC, "return range(n)", "assert candidate(4) == range(4)", "    return list(range(n))"
    ),
    "a Counter": Row(
        "from collections import Counter\n\ndef f(s):" + DOC,
        "return Counter(s)",
        "assert candidate('aab').most_common(1) == [('a', 2)]\nassert candidate('ab')['z'] == 0",
        "    return dict(Counter(s))",
    ),
    "a deque": Row(
        "from collections import deque\n\ndef f(s):" + DOC,
        "return deque(s, 2)",
        "from collections import deque\nassert candidate([1, 2, 3]) == deque([2, 3])\nassert candidate([1]).maxlen == 2",
        "    return list(s)[-2:]",
    ),
    "a dataclass": Row(
        POINT + "def f(x, y):" + DOC,
        "return Point(x, y)",
        "assert candidate(1, 2) == Point(1, 2)\nassert candidate(1, 2).y == 2",
        "    return Point(y, x)",
    ),
    "a named tuple": Row(
        "from collections import namedtuple\n\ndef f(x, y):" + DOC,
        "return namedtuple('P', 'a b')(x, y)",
        "assert candidate(1, 2) == (1, 2)\nassert candidate(1, 2).b == 2",
        "    return (x, y)",
    ),
}
OWN = {  # more of the same, from what the format allows
    "a nested list in place": Row(
        "def f(m):" + DOC,
        "for row in m:\n    row.reverse()",
        "m = [[1, 2], [3, 4]]\nrow = m[0]\nassert candidate(m) is None\nassert m == [[2, 1], [4, 3]] and m[0] is row",
    ),
    "one list given twice": Row(
        "def f(a, b):" + DOC,
        "a.append(1)\nreturn len(b)",
        "a = []\nassert candidate(a, a) == 1 and a == [1]\nassert candidate([], []) == 0",
    ),
    "the same object comes back": Row(
        "def f(a):" + DOC,
        "a.append(1)\nreturn a",
        "a = [0]\nassert candidate(a) is a and a == [0, 1]",
        "    a.append(1)\n    return list(a)",
    ),
    "a dict, a set and bytes in place": Row(
        "def f(d, s, b):" + DOC,
        "d.pop(1)\ns.add(5)\nb.extend(b'x')",
        "d, s, b = {1: 2, 3: 4}, {1}, bytearray(b'y')\ncandidate(d, s, b)\nassert (d, s, b) == ({3: 4}, {1, 5}, b'yx')",
    ),
    "a deque in place": Row(
        "from collections import deque\n\ndef f(q):" + DOC,
        "q.rotate(1)",
        "from collections import deque\nq = deque([1, 2, 3])\ncandidate(q)\nassert q == deque([3, 1, 2])",
    ),
    "changed before the error": Row(
        "def f(a):" + DOC,
        "a.clear()\nraise KeyError('gone')",
        "a = [1]\ntry:\n    candidate(a)\n    assert False\nexcept KeyError as e:\n    assert str(e) == \"'gone'\"\nassert a == []",
    ),
    "an error's text": Row(
        "def f(x):" + DOC,
        "raise ValueError(f'{x} is negative')",
        "try:\n    candidate(-1)\nexcept ValueError as e:\n    assert str(e) == '-1 is negative' and e.args == ('-1 is negative',)\nelse:\n    assert False",
        "    raise ValueError('x')",
    ),
    "an error caught by its base": Row(
        "import json\n\ndef f(s):" + DOC,
        "return json.loads(s)",
        "for error in (ValueError, Exception):\n    try:\n        candidate('{')\n    except error:\n        continue\n    assert False",
    ),
    "an error of the problem's own": Row(
        "class TooBig(Exception):\n    pass\n\ndef f(x):" + DOC,
        "if x > 9:\n    raise TooBig(x)\nreturn x",
        "assert candidate(1) == 1\ntry:\n    candidate(10)\nexcept TooBig as e:\n    assert e.args == (10,)\n    return\nassert False",
        "    if x > 9:\n        raise ValueError(x)\n    return x",
    ),
    "unittest's assertRaises": Row(
        "def f(x):" + DOC,
        "return 1 / x",
        "import unittest\nwith unittest.TestCase().assertRaises(ZeroDivisionError):\n    candidate(0)\nassert candidate(2) == 0.5",
    ),
    "contextlib.suppress around a call": Row(
        "def f(x):" + DOC,
        "return [1][x]",
        "import contextlib\nfound = []\nwith contextlib.suppress(IndexError):\n    found.append(candidate(5))\nassert found == [] and candidate(0) == 1",
    ),
    "a generator without end": Row(
        "def f():" + DOC,
        "n = 0\nwhile True:\n    yield n\n    n += 1",
        "import itertools\nassert list(itertools.islice(candidate(), 5)) == [0, 1, 2, 3, 4]",
    ),
    "a generator that is told": Row(
        "def f():" + DOC,
        "total = 0\nwhile True:\n    total += (yield total) or 0",
        "import inspect\ng = candidate()\nassert inspect.isgenerator(g) and next(g) == 0 and g.send(3) == 3 and g.send(4) == 7",
    ),
    "a map": Row("def f(xs):" + DOC, "return map(str, xs)", "assert ','.join(candidate([1, 2])) == '1,2'", "    return map(len, 'ab')"),
    "items and values": Row(
        "def f(d):" + DOC,
        "return d.items(), d.values()",
        "items, values = candidate({1: [2]})\nassert list(items) == [(1, [2])] and list(values) == [[2]]",
    ),
    "ordered and with defaults": Row(
        "from collections import OrderedDict, defaultdict\n\ndef f():" + DOC,
        "d = defaultdict(list)\nd[1].append(2)\nreturn OrderedDict(a=1, b=2), d",
        "from collections import OrderedDict\no, d = candidate()\nassert o != OrderedDict(b=2, a=1) and o == {'a': 1, 'b': 2}\nassert d == {1: [2]} and d[7] == []",
        "    return {'a': 1, 'b': 2}, {1: [2]}",
    ),
    "a Fraction and a Decimal": Row(
        "from fractions import Fraction\nfrom decimal import Decimal\n\ndef f():" + DOC,
        "return Fraction(1, 3), Decimal('0.10')",
        "from fractions import Fraction\nfrom decimal import Decimal\nassert candidate() == (Fraction(2, 6), Decimal('0.1'))",
        "    return 1 / 3, 0.1",
    ),
    "dates": Row(
        "import datetime\n\ndef f(d, days):" + DOC,
        "return d + datetime.timedelta(days=days)",
        "import datetime\nassert candidate(datetime.date(2024, 2, 28), 1) == datetime.date(2024, 2, 29)\n"
        "assert candidate(datetime.datetime(2024, 2, 28, 5), 2) == datetime.datetime(2024, 3, 1, 5)",
    ),
    "a dataclass as argument, in place": Row(
        POINT + "def f(p):" + DOC,
        "p.x += 1",
        "p = Point(1, 2)\ncandidate(p)\nassert p == Point(2, 2)",
    ),
    "a linked list": Row(
        LINKED + "def f(node):" + DOC,
        "last = None\nwhile node:\n    node.next, last, node = last, node, node.next\nreturn last",
        "head = Node(1, Node(2, Node(3)))\nnode, found = candidate(head), []\n"
        "while node is not None:\n    found.append(node.value)\n    node = node.next\nassert found == [3, 2, 1]",
        "    return node",
    ),
    "a long linked list": Row(
        LINKED + "def f(n):" + DOC,
        "node = None\nfor i in range(n):\n    node = Node(i, node)\nreturn node",
        "node, count = candidate(1000), 0\nwhile node is not None:\n    count, node = count + 1, node.next\nassert count == 1000",
    ),
    "a named tuple of the prompt": Row(
        NAMED + "def f(p):" + DOC,
        "return p._replace(a=p.b)",
        "assert candidate(Pair(1, 2)) == Pair(2, 2) and candidate(Pair(1, 2)).a == 2 and isinstance(candidate(Pair(1, 2)), Pair)",
    ),
    "an enumeration": Row(
        COLOR + "def f(c):" + DOC,
        "return Color.BLUE if c is Color.RED else Color.RED",
        "assert candidate(Color.RED) is Color.BLUE and candidate(Color.BLUE) == Color.RED",
        "    return c",
    ),
    "ranges, counters and dates as arguments": Row(
        "def f(*values):" + DOC,
        "return [type(v).__name__ for v in values]",
        "from collections import Counter, deque\nfrom fractions import Fraction\n"
        "assert candidate(range(3), Counter('a'), deque([1]), Fraction(1, 2), bytearray(b'')) == "
        "['range', 'Counter', 'deque', 'Fraction', 'bytearray']",
    ),
    "arguments nested deep": Row(
        "def f(x):" + DOC,
        "n = 0\nwhile x:\n    x, n = x[0], n + 1\nreturn n",
        "x = []\nfor _ in range(150):\n    x = [x]\nassert candidate(x) == 150",
    ),
    "an answer nested deep": Row(
        "def f(n):" + DOC,
        "x = []\nfor _ in range(n):\n    x = [x]\nreturn x",
        "x = []\nfor _ in range(150):\n    x = [x]\nassert candidate(150) == x",
    ),
    "a list that holds itself": Row(
        "def f(x):" + DOC, "return len(x), x[0] is x", "x = []\nx.append(x)\nassert candidate(x) == (1, True)"
    ),
    "a million zeros": Row("def f(xs):" + DOC, "return sum(xs)", "assert candidate([1] * 10**6) == 10**6"),
    "a long integer as argument": Row("def f(n):" + DOC, "return n % 7", "assert candidate(7**9000 + 3) == 3"),
    "a function that is answered": Row(
        "def f(n):" + DOC, "return lambda x: x + n", "assert candidate(3)(4) == 7", "    return lambda x: x"
    ),
    "a type that is answered": Row("def f(x):" + DOC, "return type(x)", "assert candidate(1) is int and candidate('') == str"),
    "an object with methods": Row(
        "def f(n):" + DOC,
        "class Stack:\n    def __init__(self):\n        self.items = []\n    def push(self, x):\n        self.items.append(x)\n"
        "    def __len__(self):\n        return len(self.items)\n    def __getitem__(self, i):\n        return self.items[i]\n"
        "return Stack()",
        "s = candidate(1)\ns.push(5)\ns.push(6)\nassert len(s) == 2 and s[1] == 6 and list(s) == [5, 6] and s.items == [5, 6]",
    ),
    "a coroutine": Row(
        "async def f(x):" + DOC,
        "return x + 1",
        "import asyncio\nassert asyncio.run(candidate(1)) == 2",
    ),
    "what a function says of itself": Row(
        "def f(a, b=2):" + DOC, "return a", "assert candidate.__name__ == 'f' and callable(candidate) and candidate(1) == 1", "    return b"
    ),
    "a map over the candidate": Row("def f(x):" + DOC, "return -x", "assert sorted([1, 3, 2], key=candidate) == [3, 2, 1]", "    return x"),
    "an array": Row(
        "import array\n\ndef f(xs):" + DOC, "return array.array('i', xs)", "assert list(candidate([1, 2])) == [1, 2]"
    ),
    "a nested answer that is looked into": Row(
        "def f():" + DOC, "return {'a': (1, [2.5, float('inf')], {3}), None: b'x'}",
        "assert candidate() == {'a': (1, [2.5, float('inf')], {3}), None: b'x'}"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [*FROM_REPORTS, *OWN])
def test_the_reference_passes_and_a_wrong_program_does_not(name, tmp_path):
    row = (FROM_REPORTS | OWN)[name]
    asked = problem(row, tmp_path)
    assert check_answers(asked, asked.solution, MODE, LIMITS) == ("passed", "")
    wrong = check_answers(asked, asked.head + row.wrong + "\n", MODE, LIMITS)
    assert wrong.verdict in ("wrong", "exception"), wrong

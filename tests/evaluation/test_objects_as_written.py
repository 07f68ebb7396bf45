# ruff: noqa: E501  a test of the table is one line
"""Objects in the tests of problems: rings, shared parts, flags, classes of the prompt, and what is changed after the call.

The rows are as in test_tests_as_written.py: a prompt, a reference, a test and a program that is wrong and must not pass.
"""

import pytest
from test_tests_as_written import DOC, LINKED, MODE, Row, problem

from kindling.evaluation.check_correctness import check_answers
from kindling.sandbox.process import Limits

LIMITS = Limits(cpu_s=6, wall_s=60.0)
DOUBLE = "class Node:\n    def __init__(self, value):\n        self.value, self.prev, self.next = value, None, None\n\n"
TREE = "class Node:\n    def __init__(self, value, parent=None):\n        self.value, self.parent, self.children = value, parent, []\n\n"
FLAGS = "import enum\n\nclass Right(enum.Flag):\n    READ = 1\n    WRITE = 2\n    RUN = 4\n\nclass Bits(enum.IntFlag):\n    A = 1\n    B = 2\n\n"
KEYED = (
    "from dataclasses import dataclass, field\nfrom typing import Callable\n\n@dataclass\nclass Sorter:\n"
    "    name: str\n    key: Callable = len\n    other: Callable = lambda x: -x\n    made: list = field(default_factory=list)\n\n"
)
FROZEN = (
    "from dataclasses import dataclass\n\n@dataclass(frozen=True)\nclass Cell:\n    at: tuple\n    name: str = ''\n\n"
)
NAMED_NODE = (
    "class Node:\n    def __init__(self, name):\n        self.name, self.near = name, set()\n"
    "    def __hash__(self):\n        return hash(self.name)\n    def __eq__(self, other):\n        return self.name == other.name\n\n"
)
DERIVED = (
    "class Stack(list):\n    def top(self):\n        return self[-1]\n\nclass Table(dict):\n    def __missing__(self, key):\n        return 0\n\n"
    "class Money(int):\n    def shown(self):\n        return f'{int(self)} EUR'\n\nclass Name(str):\n    pass\n\n"
)

RINGS = {
    "a list linked both ways": Row(
        DOUBLE + "def f(values):" + DOC,
        "first = last = None\nfor v in values:\n    node = Node(v)\n    if last is None:\n        first = node\n    else:\n"
        "        node.prev, last.next = last, node\n    last = node\nreturn first",
        "node, found = candidate([1, 2, 3]), []\nwhile node.next is not None:\n    assert node.next.prev is node\n    node = node.next\n"
        "while node is not None:\n    found.append(node.value)\n    node = node.prev\nassert found == [3, 2, 1] and isinstance(candidate([1]), Node)",
        "    first = last = None\n    for v in values:\n        node = Node(v)\n        if last is None:\n            first = node\n        else:\n            last.next = node\n        last = node\n    return first",
    ),
    "a long list linked both ways, as argument and answer": Row(
        DOUBLE + "def f(node):" + DOC,
        "while node is not None:\n    node.prev, node.next, last, node = node.next, node.prev, node, node.next\nreturn last",
        "nodes = [Node(i) for i in range(1500)]\nfor a, b in zip(nodes, nodes[1:]):\n    a.next, b.prev = b, a\n"
        "node = candidate(nodes[0])\nassert node is nodes[-1]\nfor expected in reversed(nodes):\n    assert node is expected\n    node = node.next\nassert node is None",
        "    return node",
    ),
    "a tree with parents": Row(
        TREE + "def f(depth, parent=None):" + DOC,
        "node = Node(depth, parent)\nif depth:\n    node.children = [f(depth - 1, node), f(depth - 1, node)]\nreturn node",
        "root = candidate(3)\nassert root.parent is None\nfor child in root.children:\n    assert child.parent is root and child.children[1].parent is child",
        "    node = Node(depth, parent)\n    if depth:\n        node.children = [f(depth - 1), f(depth - 1)]\n    return node",
    ),
    "the parent of an argument's child": Row(
        TREE + "def f(node):" + DOC,
        "while node.parent:\n    node = node.parent\nnode.children.append(Node(9, node))\nreturn node",
        "root = Node(1)\nchild = Node(2, root)\nroot.children.append(child)\nassert candidate(child) is root and root.children[1].value == 9 and root.children[1].parent is root",
        "    return node",
    ),
    "a copy of a graph": Row(
        TREE + "def f(node):" + DOC,
        "import copy\nreturn copy.deepcopy(node)",
        "a, b = Node(1), Node(2)\na.children, b.children = [b, b, a], [a]\nc = candidate(a)\nassert c is not a and c.children[0] is c.children[1] and c.children[2] is c and c.children[0].children[0] is c and c.children[0].value == 2",
        "    return node",
    ),
    "a node whose next is itself": Row(
        LINKED + "def f(node):" + DOC,
        "return node.next is node",
        "n = Node(1)\nn.next = n\nassert candidate(n) is True and candidate(Node(1)) is False",
        "    return False",
    ),
    "a ring that is made of an argument": Row(
        LINKED + "def f(node):" + DOC,
        "last = node\nwhile last.next:\n    last = last.next\nlast.next = node\nreturn node",
        "n = Node(1, Node(2))\nassert candidate(n) is n and n.next.next is n",
        "    return node",
    ),
    "a ring that is opened": Row(
        LINKED + "def f(node):" + DOC,
        "last = node\nwhile last.next is not node:\n    last = last.next\nlast.next = None",
        "n = Node(1, Node(2))\nn.next.next = n\ncandidate(n)\nassert n.next.value == 2 and n.next.next is None",
    ),
    "a list put in itself": Row(
        "def f(a):" + DOC, "a.append(a)", "a = [1]\ncandidate(a)\nassert a[1] is a and len(a) == 2"
    ),
    "a list in itself, answered": Row(
        "def f():" + DOC,
        "a = [1]\na.append(a)\nreturn a",
        "a = candidate()\nassert a[0] == 1 and a[1] is a",
        "    return [1, [1, [1]]]",
    ),
    "dicts as a trie with parents": Row(
        "def f(word):" + DOC,
        "root = node = {}\nfor c in word:\n    node[c] = {'up': node}\n    node = node[c]\nreturn root",
        "root = candidate('ab')\nassert root['a']['b']['up'] is root['a'] and root['a']['up'] is root",
        "    return {'a': {'b': {'up': {}}, 'up': {}}}",
    ),
    "one row three times": Row(
        "def f(n):" + DOC,
        "return [[0] * n] * n",
        "m = candidate(3)\nm[0][0] = 1\nassert m == [[1, 0, 0]] * 3",
        "    return [[0] * n for _ in range(n)]",
    ),
    "three rows": Row(
        "def f(n):" + DOC,
        "return [[0] * n for _ in range(n)]",
        "m = candidate(3)\nm[0][0] = 1\nassert m[1] == [0, 0, 0]",
        "    return [[0] * n] * n",
    ),
    "one list in two arguments": Row(
        "def f(a, b):" + DOC,
        "a['x'].append(1)\nreturn b['y'] is a['x']",
        "s = []\na, b = {'x': s}, {'y': s}\nassert candidate(a, b) is True and b['y'] == [1] and a['x'] is s",
        "    return True",
    ),
    "objects hashed by name that know each other": Row(
        NAMED_NODE + "def f(pairs):" + DOC,
        "nodes = {}\nfor a, b in pairs:\n    a, b = nodes.setdefault(a, Node(a)), nodes.setdefault(b, Node(b))\n    a.near.add(b)\n    b.near.add(a)\nreturn nodes",
        "nodes = candidate([('a', 'b'), ('b', 'c')])\nassert nodes['b'].near == {Node('a'), Node('c')} and all(nodes['b'] in n.near for n in nodes['b'].near)",
        "    return {a: Node(a) for p in pairs for a in p}",
    ),
    "frozen objects as keys that lead to each other": Row(
        FROZEN + "def f(cells):" + DOC,
        "return {a: b for a, b in zip(cells, cells[1:] + cells[:1])}",
        "a, b = Cell((1, 2)), Cell((3, 4), 'x')\nassert candidate([a, b]) == {a: b, b: a} and candidate([a, b])[Cell((1, 2))] is b",
        "    return {a: a for a in cells}",
    ),
    "new frozen objects as keys": Row(
        FROZEN + "def f(n):" + DOC,
        "cells = [Cell((i, i)) for i in range(n)]\nreturn dict(zip(cells, cells[::-1])), frozenset(cells)",
        "d, s = candidate(3)\nassert d[Cell((0, 0))] == Cell((2, 2)) and s == {Cell((i, i)) for i in range(3)}",
    ),
    "a grid of nodes with more paths than can be counted": Row(
        TREE + "def f(n):" + DOC,
        "last = Node(0)\nfor i in range(n):\n    last, node = Node(i + 1), last\n    last.children = [node, node]\nreturn last",
        "node = candidate(60)\nfor i in range(60):\n    assert node.children[0] is node.children[1] and node.value == 60 - i\n    node = node.children[0]",
        "    return Node(n)",
    ),
    "nodes of the program's own, in a ring": Row(
        "def f(n):" + DOC,
        "class N:\n    pass\na, b = N(), N()\na.value, b.value, a.next, b.next = 1, 2, b, a\nreturn a",
        "a = candidate(1)\nassert a.next.next is a and a.next.value == 2 and a.next is not a",
        "    class N:\n        value = 2\n    a = N()\n    a.next = a\n    return a",
    ),
}
CLASSES = {
    "flags": Row(
        FLAGS + "def f(r):" + DOC,
        "return r | Right.RUN",
        "assert candidate(Right.READ | Right.WRITE) == Right.READ | Right.WRITE | Right.RUN and Right.WRITE in candidate(Right.WRITE) and candidate(Right(0)) is Right.RUN",
        "    return r",
    ),
    "flags that are integers": Row(
        FLAGS + "def f(r):" + DOC,
        "return r | Bits.B",
        "assert candidate(Bits.A) == Bits.A | Bits.B == 3 and isinstance(candidate(Bits.A), Bits) and candidate(Bits(8)) == 10",
        "    return int(r)",
    ),
    "no flag at all": Row(
        FLAGS + "def f(rs):" + DOC,
        "x = Right(0)\nfor r in rs:\n    x |= r\nreturn x",
        "assert candidate([]) == Right(0) and not candidate([]) and candidate([Right.READ, Right.RUN]) == Right(5)",
        "    return 0",
    ),
    "fields with callable defaults": Row(
        KEYED + "def f(name):" + DOC,
        "return Sorter(name)",
        "s = candidate('a')\nassert s == Sorter('a') and s.key([1, 2]) == 2 and s.other(3) == -3 and s.made == []",
        "    return Sorter('b')",
    ),
    "fields with callable defaults as arguments": Row(
        KEYED + "def f(s, xs):" + DOC,
        "s.made = sorted(xs, key=s.key)\nreturn [s.other(len(x)) for x in xs]",
        "s = Sorter('a')\nassert candidate(s, ['bb', 'a']) == [-2, -1] and s == Sorter('a', made=['a', 'bb'])",
        "    s.made = xs\n    return [-2, -1]",
    ),
    "a field that is set to a function": Row(
        KEYED + "def f(name):" + DOC,
        "return Sorter(name, key=lambda x: 7)",
        "assert candidate('a').key('') == 7 and candidate('a').name == 'a'",
        "    return Sorter(name)",
    ),
    "a list, a dict, an int and a text of the prompt's": Row(
        DERIVED + "def f(s, t, m, n):" + DOC,
        "s.append(s.top() + 1)\nt['x'] = t['x'] + 1\nreturn m.shown(), type(n).__name__, n + '!'",
        "s, t = Stack([1]), Table()\nassert candidate(s, t, Money(3), Name('n')) == ('3 EUR', 'Name', 'n!')\nassert s == [1, 2] and s.top() == 2 and t == {'x': 1}",
    ),
    "answers of such classes": Row(
        DERIVED + "def f(x):" + DOC,
        "s = Stack([x, Money(x)])\ns.label = Name('l')\nreturn s, Table(a=s)",
        "s, t = candidate(3)\nassert isinstance(s, Stack) and s == [3, 3] and s.top().shown() == '3 EUR' and s.label == 'l' and isinstance(s.label, Name) and t['a'] is s and t['b'] == 0",
        "    return [x, x], {}",
    ),
    "a builtin function": Row(
        "def f(g, xs):" + DOC,
        "return [g(x) for x in xs]",
        "import math\nimport operator\nassert candidate(abs, [-1]) == [1] and candidate(math.sqrt, [4]) == [2.0] and candidate(operator.neg, [2]) == [-2] and candidate(str, [1]) == ['1']",
        "    return xs",
    ),
    "an error of the prompt's as an answer": Row(
        "class Bad(Exception):\n    pass\n\ndef f(x):" + DOC,
        "return Bad(x)",
        "assert candidate(3).args == (3,)",
        "    return x",
    ),
}
LATER = {
    "a generator": Row(
        "def f(a):" + DOC, "while a:\n    yield a.pop()", "a = [1, 2, 3]\ng = candidate(a)\nassert a == [1, 2, 3] and next(g) == 3 and a == [1, 2] and next(g) == 2 and a == [1]",
        "    yield from a[::-1]",
    ),
    "a generator that is told, of rows": Row(
        "def f(m):" + DOC, "for row in m:\n    row.append((yield len(row)))",
        "m = [[], [1]]\ng = candidate(m)\nassert next(g) == 0 and g.send(5) == 1 and m == [[5], [1]]", "    for row in m:\n        yield len(row)"
    ),
    "an iterator": Row("def f(a):" + DOC, "return map(a.append, [7, 8])", "a = []\ni = candidate(a)\nnext(i)\nassert a == [7]\nlist(i)\nassert a == [7, 8]", "    a.append(7)\n    return iter([1])"),
    "a coroutine": Row("async def f(a):" + DOC, "a.append(1)\nreturn len(a)", "import asyncio\na = []\nc = candidate(a)\nassert a == []\nassert asyncio.run(c) == 1 and a == [1]", "    return 1"),
    "a closure": Row("def f(a):" + DOC, "def add(x):\n    a.append(x)\nreturn add", "a, b = [], []\nadd, other = candidate(a), candidate(b)\nadd(1)\nother(3)\nadd(2)\nassert a == [1, 2] and b == [3]", "    return [].append"),
    "an object with methods": Row(
        "def f(a):" + DOC,
        "class Log:\n    def __init__(self, a):\n        self.a, self.others = a, []\n    def take(self, other):\n        self.others.append(other)\n"
        "    def write(self, x):\n        self.a.append(x)\n        for o in self.others:\n            o[x] = len(self.a)\nreturn Log(a)",
        "a, d = [], {}\nlog = candidate(a)\nlog.write(1)\nlog.take(d)\nlog.write(2)\nassert a == [1, 2] and d == {2: 2}\nassert log.a is a",
        "    return None",
    ),
    "a matrix that a function which was answered changes": Row(
        "def f(m):" + DOC, "def turn():\n    m[:] = [list(r) for r in zip(*m[::-1])]\nreturn turn", "m = [[1, 2], [3, 4]]\nturn = candidate(m)\nturn()\nassert m == [[3, 1], [4, 2]]\nturn()\nassert m == [[4, 3], [2, 1]]", "    return lambda: None"
    ),
    "a long list in a generator": Row(
        "def f(a):" + DOC, "for i in range(len(a)):\n    a[i] *= 2\n    yield a[i]", "a = list(range(3000))\ng = candidate(a)\nfor i in range(100):\n    assert next(g) == 2 * i == a[i]\nassert a[100] == 100", "    for x in a:\n        yield 2 * x"
    ),
}  # fmt: skip
SAID = {
    "what can be called": Row(
        "def f(x):" + DOC, "return (lambda: x) if x else object()", "assert callable(candidate(1)) and not callable(candidate(0)) and callable(candidate)", "    return object()"
    ),
    "what a function says of itself": Row(
        "def f(x):\n    \"\"\"Do it.\"\"\"", "return x", "assert candidate.__doc__ == 'Do it.' and candidate.__name__ == candidate.__qualname__ == 'f' and isinstance(candidate.__module__, str)", "\ndef f(x):\n    pass"
    ),
    "what answers say of themselves": Row(
        "def f():" + DOC, "def inner():\n    'Say.'\nclass A:\n    'An A.'\nreturn inner, A, A()",
        "g, cls, a = candidate()\nassert g.__doc__ == 'Say.' and g.__name__ == 'inner' and g.__qualname__ == 'f.<locals>.inner'\nassert cls.__doc__ == a.__doc__ == 'An A.' and cls.__module__ == a.__module__ == g.__module__ == candidate.__module__",
    ),
}  # fmt: skip
OWN = {
    "an error's own attributes": Row(
        "class Bad(Exception):\n    def __init__(self, code):\n        super().__init__(f'code {code}')\n        self.code = code\n\ndef f(x):" + DOC,
        "raise Bad(x)", "try:\n    candidate(7)\n    assert False\nexcept Bad as e:\n    assert e.code == 7 and str(e) == 'code 7'", "    raise Bad(1)"
    ),
    "a context": Row(
        "def f(a):" + DOC, "import contextlib\n@contextlib.contextmanager\ndef inside():\n    a.append('in')\n    yield 5\n    a.append('out')\nreturn inside()",
        "a = []\nwith candidate(a) as x:\n    assert x == 5 and a == ['in']\nassert a == ['in', 'out']",
    ),
    "an asynchronous generator": Row(
        "async def f(n, a):" + DOC, "import asyncio\nfor i in range(n):\n    await asyncio.sleep(0)\n    a.append(i)\n    yield i",
        "import asyncio\na = []\nasync def run():\n    return [(i, len(a)) async for i in candidate(3, a)]\nassert asyncio.run(run()) == [(0, 1), (1, 2), (2, 3)]", "    for i in range(n):\n        yield i"
    ),
    "how an object shows itself": Row(
        "def f(x):" + DOC, "class V:\n    def __str__(self):\n        return f'<{x}>'\n    def __repr__(self):\n        return f'V({x})'\nreturn V()",
        "assert str(candidate(1)) == f'{candidate(1)}' == '<1>' and repr(candidate(2)) == 'V(2)'",
    ),
    "a slice": Row("def f(xs, s):" + DOC, "return xs[s]", "assert candidate([1, 2, 3, 4], slice(0, None, 2)) == [1, 3]"),
    "an endless iterator of the library": Row(
        "def f(xs):" + DOC, "import itertools\nreturn itertools.cycle(xs)", "import itertools\nassert list(itertools.islice(candidate([1, 2]), 5)) == [1, 2, 1, 2, 1]"
    ),
    "a class that is answered": Row(
        "def f(name):" + DOC, "return type(name, (), {'x': 5, '__init__': lambda self, y: setattr(self, 'y', y)})",
        "cls = candidate('A')\nassert cls.__name__ == 'A' and cls.x == 5 and cls(3).y == 3 and callable(cls) and not callable(cls(1))",
    ),
    "keywords and stars": Row(
        "def f(*xs, key=None, **more):" + DOC, "return sorted(xs, key=key), more", "assert candidate(3, -4, key=abs, z=[1]) == ([3, -4], {'z': [1]})"
    ),
    "a default that keeps its value": Row(
        "def f(x, seen=[]):" + DOC, "seen.append(x)\nreturn seen", "assert candidate(1) == [1] and candidate(2) == [1, 2]", "    return [x]"
    ),
}  # fmt: skip
BOX = "from dataclasses import dataclass\nfrom typing import Generic, TypeVar\nT = TypeVar('T')\n\n@dataclass\nclass Box(Generic[T]):\n    held: T\n\n"
TYPED = "class Column:\n    def __init__(self, name, type):\n        self.name, self.type = name, type\n\n"
BOTH = "class Bad(Exception):\n    def __init__(self, code, notes):\n        super().__init__(code)\n        self.code, self.notes = code, notes\n"
FOUND = {
    "fields of a named tuple that a tuple has too": Row(
        "def f(x):" + DOC, "from collections import namedtuple\nreturn namedtuple('Hit', 'index count')(x, 4)",
        "hit = candidate(3)\nassert hit.index == 3 and hit.count == 4 and hit == (3, 4) and repr(hit) == 'Hit(index=3, count=4)'",
        "    from collections import namedtuple\n    return namedtuple('Hit', 'index count')(4, x)",
    ),
    "a named tuple that is handed back": Row(
        "def f(x):" + DOC, "from collections import namedtuple\nif isinstance(x, tuple):\n    return x.a + x.b\nreturn namedtuple('P', 'a b')(x, [1])",
        "p = candidate([2])\nassert p.a == [2] and candidate(p) == [2, 1]",
        "    return x",
    ),
    "a generator as a keyword, which changes an argument of an earlier call": Row(
        "def f(a, g=None):" + DOC, "def step():\n    while True:\n        a.append(1)\n        yield 1\nreturn step() if g is None else next(g)",
        "a = []\ng = candidate(a)\nassert candidate(0, g=g) == 1 and a == [1]", "    return 1"
    ),
    "an attribute that is a type": Row(
        TYPED + "def f(row):" + DOC, "return [Column(k, type(v)) for k, v in row.items()]",
        "a, b = candidate({'a': 1, 'b': ''})\nassert a.type is int and b.type is str and b.name == 'b'",
        "    return [Column(k, int) for k in row]",
    ),
    "an error raised with a tuple and a list": Row(
        BOTH + "\ndef f(key):" + DOC, "if key:\n    return {}[key]\nraise Bad((1, 2), [key])",
        "try:\n    candidate((1, 2))\n    assert False\nexcept KeyError as e:\n    assert e.args == ((1, 2),) and str(e) == '(1, 2)'\n"
        "try:\n    candidate(0)\n    assert False\nexcept Bad as e:\n    assert e.args == ((1, 2),) and e.code == (1, 2) and e.notes == [0]",
        "    raise KeyError('(1, 2)')",
    ),
    "coroutines that are gathered": Row(
        "async def f(x):" + DOC, "import asyncio\nawait asyncio.sleep(0)\nreturn 2 * x",
        "import asyncio\nasync def run():\n    return await asyncio.gather(candidate(1), candidate(2))\nassert asyncio.run(run()) == [2, 4]", "    return x"
    ),
    "an error of bytes": Row(
        "def f(data):" + DOC, "return data.decode('ascii')",
        "try:\n    candidate(b'a\\xff')\n    assert False\nexcept UnicodeDecodeError as e:\n    assert e.start == 1 and e.object == b'a\\xff'"
    ),
    "an object of a generic class": Row(
        BOX + "def f(box):" + DOC, "return Box[str](str(box.held))",
        "box = Box[int](3)\nassert candidate(box) == Box('3') and candidate(Box(4)).held == '4' and box == Box(3)"
    ),
    "an item that is deleted": Row(
        "def f(d):" + DOC, "class Store:\n    def __init__(self):\n        self.d = d\n    def __delitem__(self, key):\n        del self.d[key]\nreturn Store()",
        "d = {1: 2, 3: 4}\ns = candidate(d)\ndel s[1]\nassert d == {3: 4}", "    return dict(d)"
    ),
}  # fmt: skip
ROWS = FOUND | RINGS | CLASSES | LATER | SAID | OWN


@pytest.mark.parametrize("name", ROWS)
def test_the_reference_passes_and_a_wrong_program_does_not(name, tmp_path):
    asked = problem(ROWS[name], tmp_path)
    assert check_answers(asked, asked.solution, MODE, LIMITS) == ("passed", "")
    wrong = check_answers(asked, asked.head + ROWS[name].wrong + "\n", MODE, LIMITS)
    assert wrong.verdict in ("wrong", "exception"), wrong

"""What crosses the sandbox: values are the same on both sides, and no forged answer costs more than itself."""

import contextlib
import datetime
import enum
import json
import random
import time
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kindling.sandbox.process import Limits, Program, ProgramError
from kindling.sandbox.remote import RemoteObject
from kindling.sandbox.values import FEW_BYTES, Answers

LIMITS = Limits(cpu_s=60, wall_s=300.0)
REFUSED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


@dataclass
class Point:
    x: int
    y: int

    def same(self, other):
        return (self.x, self.y) == (other.x, other.y)

    def __eq__(self, other):
        return self.same(other)

    __hash__ = None


@dataclass
class Keyed:
    size: int = 3
    key: Callable = len

    def same(self, other):
        return True


class Bits(enum.Flag):
    A = 1


class Many(enum.IntFlag):
    A = 1


class Money(int):
    pass


class Bad(Exception):
    pass


OWN = {cls.__name__: cls for cls in (Point, Keyed, Bits, Many, Money, Bad)}


def program(source: str) -> Program:
    return Program(source, "none", LIMITS, own={"Point": Point})


SOURCE = """
from collections import *
class Point:
    def __init__(self, x, y):
        self.x, self.y = x, y
def echo(*values):
    return [*values]
def copied(*values):
    import copy
    return copy.deepcopy([*values])
def shuffle(values, seed):
    import random
    random.Random(seed).shuffle(values)
def deeds(value, deeds):
    for name, *rest in deeds:
        getattr(value, name)(*rest)
"""


@pytest.fixture(scope="module")
def echo():
    with program(SOURCE) as loaded:
        yield loaded


NUMBERS = st.integers() | st.integers(-(10**6000), 10**6000)
LIBRARY = (
    st.builds(range, st.integers(-9, 9), st.integers(-99, 99))
    | st.fractions()
    | st.decimals(allow_nan=False).filter(lambda d: not d.is_finite() or abs(d.adjusted()) < 9000)
    | st.dates()
    | st.times()
    | st.datetimes()
    | st.timedeltas()
    | NUMBERS
    | st.text(max_size=3)
)
CONTAINERS = st.recursive(
    LIBRARY,
    lambda x: (
        st.lists(x, max_size=4)
        | st.lists(x, max_size=3).map(tuple)
        | st.builds(deque, st.lists(x, max_size=4), st.none() | st.integers(0, 5))
        | st.dictionaries(st.text(max_size=3), x, max_size=3)
        | st.dictionaries(st.text(max_size=3), x, max_size=3).map(OrderedDict)
        | st.dictionaries(st.text(max_size=3), x, max_size=3).map(lambda d: defaultdict(list, d))
        | st.lists(st.text(max_size=2), max_size=5).map(Counter)
        | st.binary(max_size=5).map(bytearray)
        | st.builds(Point, x, x)
    ),
    max_leaves=10,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(CONTAINERS, max_size=3))
def test_values_of_the_standard_library_come_back_the_same(echo, values):
    (same, copies) = echo.call("echo", *values), echo.call("copied", *values)
    assert same == values == copies
    assert [type(v) for v in copies] == [type(v) for v in values]
    for sent, back in zip(values, same):
        if isinstance(sent, (list, dict, deque, bytearray, Point)):
            assert back is sent  # an argument that is handed back is the same object


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers() | st.lists(st.integers(), max_size=2), max_size=6), st.integers(0, 99))
def test_a_shuffled_list_holds_the_callers_own_objects(echo, values, seed):
    expected, before = list(values), list(values)
    random.Random(seed).shuffle(expected)
    echo.call("shuffle", values, seed)
    assert values == expected
    assert {id(v) for v in values if isinstance(v, list)} == {id(v) for v in before if isinstance(v, list)}


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.lists(st.sampled_from([["append", 3], ["reverse"], ["sort"], ["extend", [1, 2]], ["insert", 0, 7]]), max_size=6),
)
def test_what_a_call_does_to_its_argument_is_done_to_the_callers(echo, values, deeds):
    expected = list(values)
    for name, *rest in deeds:
        getattr(expected, name)(*rest)
    echo.call("deeds", values, deeds)
    assert values == expected


def test_what_has_not_changed_is_not_written():
    with program("def f(x):\n    x.append(1)\n    x.pop()\n    return len(x)") as loaded:
        values = [[1], [2]]
        inner = values[0]
        assert loaded.call("f", values) == 2 and values[0] is inner


# -- forged answers


def answers(given: list, is_long: bool = False) -> Answers:
    def remote(tag, number, name):
        return RemoteObject(None, number, name)

    return Answers(OWN, given, remote, is_long, lambda: None)


FORGED = {
    "an argument that is not there": ({"a": 1}, []),
    "an argument from behind": ({"a": -1}, []),
    "a change of what is not there": (None, [[1, [1]]]),
    "a change from behind": (None, [[-1, [1]]]),
    "a change that is no list": (None, [[0, {"l": [1]}]]),
    "an object that is not there": ({"a": 2}, [], [[1, {"l": []}]]),
    "an object with an argument's number": (None, [], [[0, {"l": []}]]),
    "an object from behind": (None, [], [[-1, {"l": []}]]),
    "two objects with one number": (None, [], [[1, {"l": []}], [1, {"l": []}]]),
    "two objects with one number, inside": ({"m": [1, {"l": []}]}, [], [[1, {"l": []}]]),
    "an object without a number": (None, [], [[True, {"l": []}]]),
    "an object that cannot change": (None, [], [[1, {"t": []}]]),
    "an object of a class that is not shared": (None, [], [[1, {"o": ["Path", []]}]]),
    "an enumeration as an object": (None, [], [[1, {"o": ["Bits", ["x", 1]]}]]),
    "an error as an object": (None, [], [[1, {"o": ["Bad", ["x", 1]]}]]),
    "a method put in an object behind": (None, [], [[1, {"o": ["Point", ["same", 1]]}]]),
    "a function where a dataclass has a method": ({"m": [1, {"o": ["Keyed", ["isdigit", {"y": "bool"}]]}]}, []),
    "an int of the problem's own that is none": ({"m": [1, {"o": ["Money", [], ["5"]]}]}, []),
    "a flag that is no flag": ({"E": ["Point", 1]}, []),
    "a flag that is not known": ({"E": ["Bits", 64]}, []),
    "a flag of a million bits": ({"E": ["Many", {"i": "f" * 10**6}]}, []),
    "a default that is not there": ({"D": ["Keyed", "same"]}, []),
    "a default that is no function": ({"D": ["Keyed", "size"]}, []),
    "lists in a ring that hold too much": (
        {"a": 1},
        [],
        [[i, {"l": [{"a": i + 1}, {"a": i + 1}]}] for i in range(1, 30)] + [[30, {"l": [{"a": 1}]}]],
    ),
    "a class that is not shared": ({"o": ["Path", []]}, []),
    "a builtin that is no type": ({"y": "exec"}, []),
    "a class of another module": ({"v": ["Popen", ["ls"]]}, []),
    "a method put in an object": ({"o": ["Point", ["same", 1]]}, []),
    "a special method put in an object": ({"o": ["Point", ["__class__", 1]]}, []),
    "a range without end": ({"r": [0, 10**18]}, []),
    "a Decimal that fills the memory as an int": ({"v": ["Decimal", ["1e999999"]]}, []),
    "a key without a value": ({"d": [1]}, []),
    "a date that is none": ({"v": ["date", ["today"]]}, []),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_answer_is_refused(name):
    given = [[1, 2]]
    with pytest.raises(REFUSED):
        answers(given).decode(*json.loads(json.dumps(FORGED[name])))


def test_references_may_not_be_written_out_without_end():
    given = [[] for _ in range(40)]
    changed = [[i, [{"a": i + 1}, {"a": i + 1}]] for i in range(39)]
    started = time.process_time()
    with pytest.raises(ValueError, match="too much"):
        answers(given).decode(None, changed)
    assert time.process_time() - started < 1


@pytest.mark.parametrize("form", ["l", "s", "t", "f"])
def test_many_values_of_one_hash_are_refused(form):
    values = [i * (2**61 - 1) for i in range(20_000)]
    assert len(json.dumps(values)) > FEW_BYTES
    started = time.process_time()
    with pytest.raises(ValueError, match="with one hash"):
        answers([], is_long=True).decode({form: values})
    assert time.process_time() - started < 2


def test_long_answers_of_ordinary_values_are_not_refused():
    for values in ([0] * 50_000, list(range(50_000)), ["ab"] * 50_000, [i / 7 for i in range(50_000)]):
        assert answers([], is_long=True).decode({"l": values}) == values


def test_a_generator_without_end_uses_up_its_bytes_and_not_the_memory():
    with program("def f():\n    while True:\n        yield 'x' * 500_000") as loaded:
        with pytest.raises(ProgramError, match="all answers together"):
            list(loaded.function("f")())
        with pytest.raises(ProgramError, match="all answers together"):  # also when a test has caught it
            loaded.function("f")()


def test_an_object_cannot_answer_for_a_plain_value():
    source = """
class Yes:
    __getattr__ = lambda self, name: lambda *args: True
    __eq__ = __contains__ = lambda self, other: True
    __len__ = lambda self: 2**40
    def startswith(self, text):
        return True
def f():
    return Yes()
"""
    with program(source) as loaded:
        yes = loaded.call("f")
        for use in (
            lambda: yes.startswith("a"),
            lambda: yes.isdigit(),
            lambda: yes.issubset({1}),
            lambda: yes.__contains__(1),
            lambda: yes.__le__(1),
            lambda: len(yes),
            lambda: bool(yes),
        ):
            with pytest.raises((AttributeError, TypeError)):
                use()
        assert (yes == 1) is False and 1 not in [yes]


@pytest.mark.parametrize("name", ["KeyboardInterrupt", "GeneratorExit", "MemoryError", "BaseException"])
def test_errors_that_no_test_awaits_are_the_programs_end(name):
    with program(f"def f():\n    raise {name}") as loaded, pytest.raises(ProgramError):
        loaded.function("f")()


def test_an_end_of_the_process_is_no_awaited_error():
    with program("import os\ndef f():\n    os._exit(0)") as loaded:
        with contextlib.suppress(BaseException):
            loaded.function("f")()
        assert loaded.failure is not None and loaded.failure.kind == "exception"


def test_values_that_are_used_here_are_used():  # one of each kind, as an author of problems reads them
    source = "import datetime\nfrom decimal import Decimal\nfrom fractions import Fraction\ndef f():\n"
    source += "    return Fraction(1, 2), Decimal('1.50'), datetime.time(1, 2), {1: 2}.items(), range(3, 0, -1)\n"
    with program(source) as loaded:
        half, price, clock, items, down = loaded.call("f")
    assert (half, price, clock) == (Fraction(1, 2), Decimal("1.5"), datetime.time(1, 2))
    assert str(price) == "1.50" and (1, 2) in items and list(down) == [3, 2, 1]

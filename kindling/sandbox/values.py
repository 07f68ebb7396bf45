"""Carries values into the sandbox and back: the trusted side of the protocol.

    request, given = Arguments(own).encode(("call", ...))
    value = Answers(own, given, remote).decode(content)

Into the sandbox goes marshalled plain data, which is safe in this direction. What comes back is JSON of a few known forms; every
other form is an error. Nothing is unpickled, no class is looked up but those listed here and the problem's own (`own`, by name),
and no method of the program's ever runs here. What a hostile answer can cost is bounded: its bytes, its nesting, what it would
hold if every reference in it were written out, and how many of its values share a hash.
"""

from __future__ import annotations

import builtins
import datetime
import marshal
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from itertools import groupby
from types import GeneratorType
from typing import Any

from kindling.sandbox.remote import QUESTIONS, RemoteObject

PLAIN = frozenset({type(None), bool, int, float, str})
SCALARS = PLAIN | {complex, bytes}
DATES = (datetime.datetime, datetime.date, datetime.time)
MAX_EXPANDED = 2**21  # values in an answer and its arguments, with every reference written out
MAX_EXPONENT = 10_000  # of a Decimal: as an int, one of 10**9 would fill the memory
MAX_FRACTION_BITS = 100_000  # of a numerator or denominator: their greatest common divisor takes the square of it
MAX_SAME_HASH = 200  # a set of n values with one hash takes n * n comparisons
FEW_BYTES = 2**17  # an answer of no more makes a set in a second, whatever its hashes


class NotPlain(TypeError):
    """An argument cannot be sent into the sandbox."""


class NamedTuple(tuple):
    """A named tuple of a class that only the program has."""

    _fields: tuple[str, ...]

    def __getattr__(self, name: str) -> Any:
        if name != "_fields" and name in self._fields:
            return self[self._fields.index(name)]
        raise AttributeError(f"this named tuple has no field {name!r}")

    def _asdict(self) -> dict[str, Any]:
        return dict(zip(self._fields, self))


def attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, those in slots too."""
    slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ()) if name != "__weakref__"]
    found = {name: getattr(value, name) for name in slots if name != "__dict__" and hasattr(value, name)}
    return {**found, **getattr(value, "__dict__", {})}


def _flat(mapping: dict[Any, Any]) -> list[Any]:
    return [part for pair in mapping.items() for part in pair]


class Arguments:
    """Encodes requests. `own` are the problem's classes by name; `handle` gives the number of a program's object, or None."""

    def __init__(self, own: dict[str, type], handle: Callable[[Any], int | str | None]):
        self._own, self._handle = own, handle
        self.given: list[Any] = []
        self._numbers: dict[int, int] = {}

    def encode(self, request: tuple[Any, ...]) -> bytes:
        """Return a request; `given` then lists the objects in it that can change. Raises NotPlain for what cannot be sent."""
        try:
            return marshal.dumps(self._all(request))
        except (RecursionError, ValueError):
            raise NotPlain("an argument must be plain data, but is nested too deep") from None

    def _all(self, values: Iterable[Any]) -> list[Any]:
        return [v if type(v) in SCALARS else self._one(v) for v in values]

    def _one(self, value: Any) -> Any:
        kind = type(value)
        if id(value) in self._numbers:
            return ("a", self._numbers[id(value)])
        if kind in (tuple, frozenset):
            return ("t" if kind is tuple else "f", self._all(value))
        number = self._handle(value)
        if number is not None:
            return ("h" if isinstance(number, int) else "g", number)
        if kind is type and getattr(builtins, name := type.__repr__(value)[8:-2], None) is value:
            return ("y", name)
        is_own = self._own.get(kind.__name__) is kind
        if is_own and isinstance(value, Enum):
            return ("e", kind.__name__, value.name)
        if is_own and isinstance(value, tuple):
            return ("n", kind.__name__, self._all(value))
        if kind is range:
            return ("v", "builtins", "range", [value.start, value.stop, value.step])
        if kind is Fraction:
            return ("v", "fractions", "Fraction", [value.numerator, value.denominator])
        if kind is Decimal:
            return ("v", "decimal", "Decimal", [str(value)])
        if kind is datetime.timedelta:
            return ("v", "datetime", "timedelta", [value.days, value.seconds, value.microseconds])
        if kind in DATES and getattr(value, "tzinfo", None) is None:
            return ("v", "datetime", kind.__name__, _date_fields(value))
        self._numbers[id(value)] = len(self.given)  # from here on, what can change
        self.given.append(value)
        return self._changeable(value, kind, is_own)

    def _changeable(self, value: Any, kind: type, is_own: bool) -> Any:
        if kind in (list, set):
            return ("l" if kind is list else "s", self._all(value))
        if kind is dict:
            return ("d", self._all(_flat(value)))
        if kind is bytearray:
            return ("B", bytes(value))
        if kind is deque:
            return ("q", value.maxlen, self._all(value))
        if kind in (Counter, OrderedDict):
            return (kind.__name__, self._all(_flat(value)))
        if kind is defaultdict:
            factory = value.default_factory
            name = factory.__name__ if type(factory) is type else None
            if factory is None or (name and getattr(builtins, name, None) is factory):
                return ("D", name, self._all(_flat(value)))
        # of a class that is derived from list or int, the attributes are not all
        if is_own and next(cls for cls in kind.__mro__ if cls.__module__ == "builtins") is object:
            return ("o", kind.__name__, self._all(_flat(attributes(value))))
        raise NotPlain(f"an argument must be plain data, but is of type {kind.__name__}")


def _date_fields(value: Any) -> list[int]:
    names = "hour minute second microsecond" if type(value) is datetime.time else "year month day"
    names += " hour minute second microsecond" if type(value) is datetime.datetime else ""
    return [getattr(value, name) for name in names.split()]


class Answers:
    """Decodes answers. `given` are the objects of the request that can change; `remote` makes an object of the program's.

    Every method raises ValueError, TypeError, LookupError, AttributeError, ArithmeticError or RecursionError for a form that the
    worker does not write.
    """

    def __init__(self, own: dict[str, type], given: list[Any], remote: Callable[[str, int, str], Any], is_long: bool):
        self._own, self._given, self._remote, self._is_long = own, given, remote, is_long
        self._refers = False
        self._in_ranges = 0  # numbers in all ranges of the answer

    def decode(self, content: Any, changed: Any = ()) -> Any:
        """Return an answer, and write what the call has changed into the caller's own objects."""
        new = [(target, self._changed(target, inner)) for target, inner in ((self._argument(n), i) for n, i in changed)]
        value = self.value(content)
        all_parts = [parts for _, parts in new]
        if self._is_long:
            _require_finite([value, all_parts])  # or hashing may never end
            _require_different_hashes(_hashable([value, all_parts]))
        for target, parts in new:
            _write(target, parts)
        if self._refers:
            _require_finite([value, *self._given])
        return value

    def _argument(self, number: Any) -> Any:
        if type(number) is not int or number < 0:
            raise ValueError("no number of an argument")
        self._refers = True
        return self._given[number]

    def _changed(self, target: Any, inner: Any) -> Any:
        if type(target) is bytearray:
            return bytes.fromhex(inner)
        if type(target) in (list, deque):
            return self._all(inner)
        if type(target) is set:
            return self._keys(inner)
        return self._pairs(inner)

    def _all(self, inner: Any) -> list[Any]:
        if type(inner) is not list:
            raise ValueError("no list")
        return [v if type(v) in PLAIN else self.value(v) for v in inner]

    def _keys(self, inner: Any) -> list[Any]:
        keys = self._all(inner)
        if self._is_long:
            _require_different_hashes(keys)
        return keys

    def _pairs(self, inner: Any) -> dict[Any, Any]:
        self._all(inner[:0])  # a list
        return dict(zip(self._keys(inner[::2]), self._all(inner[1::2]), strict=True))

    def value(self, content: Any) -> Any:
        """Return the value that a part of an answer stands for."""
        if type(content) in PLAIN:
            return content
        ((tag, inner),) = content.items()
        if tag in ("l", "t"):
            return self._all(inner) if tag == "l" else tuple(self._all(inner))
        if tag in ("s", "f"):
            return (set if tag == "s" else frozenset)(self._keys(inner))
        if tag == "d":
            return self._pairs(inner)
        if tag == "n":
            return {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}[inner]
        if tag == "i":
            return int(inner, 16)
        if tag in ("b", "B"):
            return (bytes if tag == "b" else bytearray).fromhex(inner)
        if tag == "c":
            return complex(*self._all(inner))
        if tag == "a":
            return self._argument(inner)
        if tag in ("h", "x", "G", "w"):
            number, name = inner
            if type(number) is not int or not isinstance(name, str):
                raise ValueError(tag)
            return self._remote(tag, number, name)
        return self._of_a_class(tag, inner)

    def _of_a_class(self, tag: str, inner: Any) -> Any:
        if tag == "r":
            found = range(*self._all(inner))
            self._in_ranges += len(found)
            return found if self._in_ranges <= MAX_EXPANDED else _refused(found)
        if tag == "y":
            found = getattr(builtins, inner)
            return found if type(found) is type else _refused(inner)
        if tag == "T":
            made = NamedTuple(self._all(inner[2]))
            made._fields = tuple(map(str, inner[1]))
            for name, value in zip(made._fields, made):
                _require_no_question(name, value, ())
            return made
        name, parts = inner
        if tag == "k":
            return self._view(name, parts)
        if tag == "v":
            return self._of_the_library(name, parts)
        cls = self._own[name]
        if tag == "e":
            return cls[parts] if issubclass(cls, Enum) else _refused(name)
        if tag == "N":
            return tuple.__new__(cls, self._all(parts)) if issubclass(cls, tuple) else _refused(name)
        if tag != "o" or issubclass(cls, (Enum, tuple, BaseException)):
            _refused(name)
        made = object.__new__(cls)
        _set_attributes(made, self._pairs(parts))
        return made

    def _view(self, name: str, parts: Any) -> Any:
        if name == "dict_items":
            return self._pairs(parts).items()
        if name == "dict_keys":
            return dict.fromkeys(self._keys(parts)).keys()
        return dict(enumerate(self._all(parts))).values()

    def _of_the_library(self, name: str, parts: Any) -> Any:
        if name in ("Counter", "OrderedDict"):
            pairs = self._pairs(parts)
            return Counter(pairs) if name == "Counter" else OrderedDict(pairs)
        if name == "defaultdict":
            factory = self.value(parts[0])
            return defaultdict(factory if isinstance(factory, type) else None, self._pairs(parts[1:]))
        values = self._all(parts)
        if name == "deque":
            return deque(values[1:], values[0])
        types, most = {"Decimal": (str, 1), "Fraction": (int, 2), "timedelta": (int, 3)}.get(name, (str, 1))
        if len(values) != most or not all(
            type(v) is types for v in values
        ):  # Fraction("1e3000000000") would fill the memory
            _refused(name)
        if name == "Fraction" and max(map(int.bit_length, values)) > MAX_FRACTION_BITS:
            _refused(name)
        if name == "Decimal":
            number = Decimal(*values)
            return number if not number.is_finite() or abs(number.adjusted()) <= MAX_EXPONENT else _refused(name)
        if name == "Fraction":
            return Fraction(*values)
        if name == "timedelta":
            return datetime.timedelta(*values)
        return {cls.__name__: cls for cls in DATES}[name].fromisoformat(*values)


def _refused(name: Any) -> Any:
    raise ValueError(f"{name} is no form of an answer")


def _set_attributes(target: Any, values: dict[Any, Any]) -> None:
    known = attributes(target)
    for name in known.keys() - values.keys():
        object.__delattr__(target, name)
    for name, value in values.items():
        # a method may not be replaced: the one that compares could call it
        if not isinstance(name, str) or name.startswith("__") or callable(getattr(type(target), name, None)):
            _refused(name)
        _require_no_question(name, value, getattr(type(target), "__annotations__", ()))
        object.__setattr__(target, name, value)


def _require_no_question(name: str, value: Any, declared: Iterable[str]) -> None:
    """Raise ValueError for an attribute that a test could call, so that the program, and not the test, gives the verdict."""
    if name in QUESTIONS or (isinstance(value, type) and name not in declared):
        _refused(name)


def _write(target: Any, parts: Any) -> None:
    """Write what a call has changed into the caller's own object."""
    if isinstance(target, (list, bytearray)):
        target[:] = parts
    elif isinstance(target, dict):
        target.clear()
        for key, value in parts.items():  # a Counter's update() adds
            target[key] = value
    elif isinstance(target, set):
        target.clear()
        target.update(parts)
    elif isinstance(target, deque):
        target.clear()
        target.extend(parts)
    else:
        _set_attributes(target, parts)


def _inside(value: Any) -> Iterable[Any]:
    """Return what a value holds."""
    if type(value) in SCALARS:
        return ()
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, (list, tuple, set, frozenset, deque, type({}.keys()), type({}.values()))):
        return value
    if isinstance(value, type({}.items())):
        return list(value)
    return () if isinstance(value, (type, GeneratorType, Enum, RemoteObject)) else attributes(value).values()


def _require_finite(values: list[Any]) -> None:
    """Raise ValueError if values hold themselves, or hold each other so often that writing them out would take the memory."""
    sizes: dict[int, int | None] = {}

    def size(value: Any) -> int:
        if id(value) not in sizes:
            sizes[id(value)] = None
            sizes[id(value)] = 1 + sum([1 if type(v) in SCALARS else size(v) for v in _inside(value)])
        found = sizes[id(value)]
        if found is None or found > MAX_EXPANDED:
            raise ValueError("a value that holds itself, or too much")
        return found

    size(values)


def _hashable(values: list[Any]) -> list[Any]:
    """Return what is hashable anywhere in values."""
    found, todo, seen = [], values, set()
    while todo:
        value = todo.pop()
        if type(value) not in SCALARS:
            if id(value) in seen:
                continue
            seen.add(id(value))
        try:
            hash(value)
            found.append(value)
        except TypeError:
            pass
        todo.extend(_inside(value))
    return found


def _require_different_hashes(values: list[Any]) -> None:
    """Raise ValueError if many different values have one hash: a set of them would take hours to build."""
    for _, group in groupby(sorted(values, key=hash), key=hash):
        different: list[Any] = []
        for value in group:
            if value not in different:
                different.append(value)
            if len(different) > MAX_SAME_HASH:
                raise ValueError(f"more than {MAX_SAME_HASH} values with one hash")

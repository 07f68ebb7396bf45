"""Carries values into the sandbox: a request is marshalled plain data, which is safe in this direction.

    arguments = Arguments(own, handle)
    request = arguments.encode(("call", ...))

An object that can change has a number. Where it comes again, only its number is sent, so what was one object is one object on
the other side too, also in a ring. An object of the problem's own classes (`own`, by name) is sent behind the request, in a list:
so a chain of them may be long.
"""

from __future__ import annotations

import builtins
import datetime
import marshal
import math
import operator
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from enum import Enum, Flag
from fractions import Fraction
from types import BuiltinFunctionType
from typing import Any

from kindling.sandbox.remote import NamedTuple

PLAIN = frozenset({type(None), bool, int, float, str})
SCALARS = PLAIN | {complex, bytes}
DATES = (datetime.datetime, datetime.date, datetime.time)
BASES = (object, int, float, str, list, dict, set)  # of the problem's own classes
MODULES = (builtins, math, operator)  # whose functions can be arguments
HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: the class was made by a class statement


class NotPlain(TypeError):
    """An argument cannot be sent into the sandbox."""


def attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, those in slots too."""
    slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ()) if name != "__weakref__"]
    found = {name: getattr(value, name) for name in slots if name != "__dict__" and hasattr(value, name)}
    named = getattr(value, "__dict__", {})
    return {**found, **{name: held for name, held in named.items() if name != "__orig_class__"}}  # of Box[int](1)


def base_of(cls: type) -> type | None:
    """Return the builtin class that holds the content of a class's objects, or None if such objects cannot be sent."""
    while cls.__flags__ & HEAP_TYPE:
        assert cls.__base__ is not None, "only object has none"
        cls = cls.__base__
    return cls if cls in BASES else None


def content_of(value: Any, base: type) -> list[Any]:
    """Return what an object of the problem's own class holds as one of a builtin class. No method of its own class runs."""
    if base is dict:
        return _flat(dict.items(value))
    if base in (list, set):
        return list(base.__iter__(value))
    plain = {int: int.__int__, float: float.__float__, str: str.__str__}
    return [plain[base](value)] if base in plain else []


def defaults(own: dict[str, type]) -> dict[int, tuple[str, str]]:
    """Return the class and the field of each default in a dataclass that can be called, by its id."""
    fields = [(cls, field) for cls in own.values() for field in getattr(cls, "__dataclass_fields__", {}).values()]
    return {id(field.default): (cls.__name__, field.name) for cls, field in fields if callable(field.default)}


def _flat(pairs: Iterable[tuple[Any, Any]]) -> list[Any]:
    return [part for pair in pairs for part in pair]


class Arguments:
    """Encodes requests. `own` are the problem's classes by name; `handle` gives the number of a program's object, or None.

    `kept` are objects of earlier requests that the program may still change.
    """

    def __init__(
        self, own: dict[str, type], handle: Callable[[Any], int | str | None], kept: Sequence[Any] = ()
    ) -> None:
        self._own, self._handle = own, handle
        self.given: list[Any] = list(kept)
        self._numbers = {id(value): number for number, value in enumerate(self.given)}
        self._later: list[tuple[int, Any]] = []  # objects whose attributes are sent behind the request

    def encode(self, request: tuple[Any, ...], *prefix: Any) -> bytes:
        """Return a request; `given` then lists the objects in it that can change. Raises NotPlain for what cannot be sent."""
        try:
            parts, behind = self._all(request), []
            for number, value in self._later:  # which grows meanwhile
                behind.append((number, *self._own_parts(value)))
            return marshal.dumps([*prefix, len(self.given), parts, behind])
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
        if kind in (list, dict, set):
            return self._changeable(value, kind, False, self._number(value))
        number = self._handle(value)
        if number is not None:
            return ("h" if isinstance(number, int) else "g", number)
        if kind is type and getattr(builtins, name := type.__repr__(value)[8:-2], None) is value:
            return ("y", "builtins", name)
        is_own = self._own.get(kind.__name__) is kind
        if is_own and isinstance(value, Flag):
            return ("E", kind.__name__, value.value)
        if is_own and isinstance(value, Enum):
            return ("e", kind.__name__, value.name)
        if is_own and isinstance(value, tuple):
            return ("n", kind.__name__, self._all(value))
        if kind is NamedTuple:
            return ("N", value._class, self._all(value))
        if kind is range:
            return ("v", "builtins", "range", [value.start, value.stop, value.step])
        if kind is slice:
            return ("v", "builtins", "slice", self._all([value.start, value.stop, value.step]))
        if kind is Fraction:
            return ("v", "fractions", "Fraction", [value.numerator, value.denominator])
        if kind is Decimal:
            return ("v", "decimal", "Decimal", [str(value)])
        if kind is datetime.timedelta:
            return ("v", "datetime", "timedelta", [value.days, value.seconds, value.microseconds])
        if kind in DATES and getattr(value, "tzinfo", None) is None:
            return ("v", "datetime", kind.__name__, _date_fields(value))
        if callable(value) and not is_own:
            return self._function(value, kind)
        return self._changeable(value, kind, is_own, self._number(value))

    def _number(self, value: Any) -> int:
        """Number an object that can change."""
        self._numbers[id(value)] = number = len(self.given)
        self.given.append(value)
        return number

    def _function(self, value: Any, kind: type) -> Any:
        """Return a function or a class that both sides have."""
        if id(value) in (known := defaults(self._own)):
            return ("D", *known[id(value)])
        if kind is BuiltinFunctionType:
            name = value.__name__
            for module in MODULES:
                if getattr(module, name, None) is value:
                    return ("y", module.__name__, name)
        if isinstance(value, type) and self._own.get(value.__name__) is value:
            return ("g", value.__name__)
        raise NotPlain(f"an argument must be plain data, but is of type {kind.__name__}")

    def _changeable(self, value: Any, kind: type, is_own: bool, number: int) -> Any:
        if kind in (list, set):
            return ("l" if kind is list else "s", number, self._all(value))
        if kind is dict:
            return ("d", number, self._all(_flat(value.items())))
        if kind is bytearray:
            return ("B", number, bytes(value))
        if kind is deque:
            return ("q", number, value.maxlen, self._all(value))
        if kind in (Counter, OrderedDict):
            return (kind.__name__, number, self._all(_flat(value.items())))
        if kind is defaultdict:
            factory = value.default_factory
            name = factory.__name__ if isinstance(factory, type) else None
            if factory is None or (name and getattr(builtins, name, None) is factory):
                return ("C", number, name, self._all(_flat(value.items())))
        if is_own and base_of(kind) is not None:
            hashed: Any = kind.__hash__
            if hashed not in (None, object.__hash__):  # its hash may need its attributes, so they come first
                return ("o", number, *self._own_parts(value))
            self._later.append((number, value))
            return ("a", number)
        raise NotPlain(f"an argument must be plain data, but is of type {kind.__name__}")

    def _own_parts(self, value: Any) -> tuple[str, str, list[Any], list[Any]]:
        """Return the class of an object, its builtin class, what it holds as one of that, and its attributes."""
        kind = type(value)
        base = base_of(kind)
        assert base is not None, "only such objects are numbered"
        return (
            kind.__name__,
            base.__name__,
            self._all(content_of(value, base)),
            self._all(_flat(attributes(value).items())),
        )


def _date_fields(value: Any) -> list[int]:
    names = "hour minute second microsecond" if type(value) is datetime.time else "year month day"
    names += " hour minute second microsecond" if type(value) is datetime.datetime else ""
    return [getattr(value, name) for name in names.split()]

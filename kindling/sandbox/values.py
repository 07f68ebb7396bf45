"""Reads what comes back from the sandbox: the trusted side of the protocol.

    value = Answers(own, given, remote).decode(content)

An answer is JSON of a few known forms; every other form is an error. Nothing is unpickled, no class is looked up but those listed
here and the problem's own (`own`, by name), and no method of the program's ever runs here. What a hostile answer can cost is
bounded: its bytes, its nesting, what it would hold if every reference in it were written out, and how many of its values share a
hash. Only objects of the problem's own classes may hold each other without end, and process.py then watches the time.
"""

from __future__ import annotations

import builtins
import datetime
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from decimal import Decimal
from enum import Enum, Flag
from fractions import Fraction
from typing import Any

from kindling.sandbox.arguments import DATES, PLAIN, attributes, base_of
from kindling.sandbox.finite import MAX_EXPANDED, hashable, require_different_hashes, require_finite
from kindling.sandbox.remote import QUESTIONS, NamedTuple

MAX_FLAGS = 256  # bits
MAX_EXPONENT = 10_000  # of a Decimal: as an int, one of 10**9 would fill the memory
MAX_FRACTION_BITS = 100_000  # of a numerator or denominator: their greatest common divisor takes the square of it
FEW_BYTES = 2**17  # an answer of no more makes a set in a second, whatever its hashes


class Answers:
    """Decodes answers. `given` are the objects of the request that can change; `remote` makes an object of the program's.

    Every method raises an Exception of any class for a form that the worker does not write: methods of the problem's own
    classes run too, such as `__hash__`.
    """

    def __init__(
        self,
        own: dict[str, type],
        given: list[Any],
        remote: Callable[[str, int, str], Any],
        is_long: bool,
        watch: Callable[[], None],
    ):
        """`watch` is called when an object comes twice: then a walk from one to the next may be without end."""
        self._own, self._given, self._remote, self._is_long, self._watch = own, given, remote, is_long, watch
        self._made: dict[int, Any] = {}  # objects of the answer that come more than once, or have attributes
        self._referred: set[int] = set()
        self._is_endless = False
        self._in_ranges = 0  # numbers in all ranges of the answer

    def decode(self, content: Any, changed: Any = (), made: Any = ()) -> Any:
        """Return an answer, and write what the call has changed into the caller's own objects. `made` are objects in it."""
        for number, form in made:
            self._number(number, self._empty(form))
        value = self.value(content)
        new = [(target, self._changed(target, inner)) for target, inner in ((self._old(n), i) for n, i in changed)]
        for number, form in made:
            self._fill(self._made[number], form)
        all_parts = [parts for _, parts in new]
        objects = list(self._made.values())
        if self._is_long:
            require_finite([value, all_parts, objects])  # or hashing may never end
            require_different_hashes(hashable([value, all_parts, objects]))
        for target, parts in new:
            _write(target, parts)
        if self._is_endless:
            require_finite([value, *objects, *self._given])
        return value

    def _number(self, number: Any, made: Any) -> None:
        if type(number) is not int or number < len(self._given) or number in self._made:
            raise ValueError("no number of a new object")
        self._made[number] = made

    def _old(self, number: Any) -> Any:
        if type(number) is not int or number < 0:
            raise ValueError("no number of an argument")
        return self._given[number]

    def _referred_to(self, number: Any) -> Any:
        """Return the object that a reference in an answer stands for."""
        if not self._is_endless and (number in self._referred or number not in self._made):
            self._is_endless = True
            self._watch()
        self._referred.add(number)
        return self._made[number] if number in self._made else self._old(number)

    def _empty(self, form: Any) -> Any:
        """Return an object that can change without what it holds, because it may hold itself."""
        ((tag, inner),) = form.items()
        if tag in ("l", "s", "d", "B"):
            return {"l": list, "s": set, "d": dict, "B": bytearray}[tag]()
        name = inner[0]
        if tag == "v":
            if name == "deque":
                return deque(maxlen=self.value(inner[1][0]))
            if name == "defaultdict":
                return defaultdict(self._factory(inner[1][0]))
            return {"Counter": Counter, "OrderedDict": OrderedDict}[name]()
        cls = self._own[name]
        base = base_of(cls)
        if tag != "o" or base is None or issubclass(cls, (Enum, tuple)):
            return _refused(name)
        new: Callable[..., Any] = base.__new__
        if base in (int, float, str):
            content = self.value(inner[2][0])
            return new(cls, content) if type(content) is base else _refused(name)
        return new(cls)

    def _fill(self, target: Any, form: Any) -> None:
        """Give an empty object what it holds."""
        ((tag, inner),) = form.items()
        if tag == "o":
            simple = dict(zip(inner[1][::2], inner[1][1::2]))  # first, because the hash may need them
            _set_attributes(target, {k: v for k, v in simple.items() if type(v) in PLAIN}, False)
            _write(target, self._own_parts(target, *inner[1:]))
        elif tag == "v":
            _write(target, (self._all if inner[0] == "deque" else self._pairs)(inner[1][inner[0][0] == "d" :]))
        else:
            _write(target, self._changed(target, inner))

    def _own_parts(self, target: Any, named: Any, content: Any = ()) -> tuple[dict[Any, Any], Any]:
        """Return the attributes of an object of the problem's own class, and what it holds as one of a builtin class."""
        base, attributes = base_of(type(target)), self._pairs(named)
        readers: dict[Any, Callable[[Any], Any]] = {dict: self._pairs, set: self._keys, list: self._all}
        held = readers.get(base)
        return attributes, None if held is None else held(content)

    def _changed(self, target: Any, inner: Any) -> Any:
        if self._own.get(type(target).__name__) is type(target):
            return self._own_parts(target, *inner)
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
            require_different_hashes(keys)
        return keys

    def _pairs(self, inner: Any) -> dict[Any, Any]:
        parts = self._all(inner)  # in turn: a value may refer to a key, and a key to a value
        if self._is_long:
            require_different_hashes(parts[::2])
        return dict(zip(parts[::2], parts[1::2], strict=True))

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
            return self._referred_to(inner)
        if tag == "m":
            number, form = inner
            self._number(number, made := self._empty(form))
            self._referred.add(number)  # before it is filled: what it holds may lead back to it
            self._fill(made, form)
            return made
        if tag in ("h", "C", "x", "G", "w", "A"):
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
            name, fields, values, number = inner
            if type(number) is not int or not QUESTIONS.isdisjoint(fields):
                _refused(name)
            made = NamedTuple(self._all(values))
            made._name, made._fields, made._class = str(name), tuple(map(str, fields)), number
            return made
        name, parts = inner
        if tag == "k":
            return self._view(name, parts)
        if tag == "v":
            return self._of_the_library(name, parts)
        cls = self._own[name]
        if tag == "e":
            return cls[parts] if issubclass(cls, Enum) else _refused(name)
        if tag == "E":
            is_flags = issubclass(cls, Flag) and type(parts) is int and parts.bit_length() <= MAX_FLAGS
            return cls(parts) if is_flags else _refused(name)
        if tag == "D":
            default = getattr(cls, "__dataclass_fields__", {})[parts].default  # the caller's own
            return default if callable(default) else _refused(name)
        return tuple.__new__(cls, self._all(parts)) if tag == "N" and issubclass(cls, tuple) else _refused(name)

    def _view(self, name: str, parts: Any) -> Any:
        if name == "dict_items":
            return self._pairs(parts).items()
        if name == "dict_keys":
            return dict.fromkeys(self._keys(parts)).keys()
        return dict(enumerate(self._all(parts))).values()

    def _factory(self, form: Any) -> type | None:
        factory = self.value(form)
        return factory if isinstance(factory, type) else None

    def _of_the_library(self, name: str, parts: Any) -> Any:
        if name in ("Counter", "OrderedDict"):
            pairs = self._pairs(parts)
            return Counter(pairs) if name == "Counter" else OrderedDict(pairs)
        if name == "defaultdict":
            return defaultdict(self._factory(parts[0]), self._pairs(parts[1:]))
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


def _set_attributes(target: Any, values: dict[Any, Any], are_all: bool = True) -> None:
    known, cls = attributes(target), type(target)
    for name in known.keys() - values.keys() if are_all else ():
        object.__delattr__(target, name)
    for name, value in values.items():
        # a method may not be replaced: the one that compares could call it. A field's default may be a function
        is_method = callable(getattr(cls, name, None)) if isinstance(name, str) else True
        if is_method and name in getattr(cls, "__dataclass_fields__", ()):
            is_method = False
        if is_method or name.startswith("__") or name in QUESTIONS:
            _refused(name)
        object.__setattr__(target, name, value)


def _write(target: Any, parts: Any) -> None:
    """Write what an object holds into it. Only an own class's attributes and content are in a tuple."""
    if type(parts) is tuple:
        named, parts = parts
        _set_attributes(target, named)
    if isinstance(target, list):
        list.__setitem__(target, slice(None), parts)
    elif isinstance(target, bytearray):
        target[:] = parts
    elif isinstance(target, dict):
        kind = OrderedDict if isinstance(target, OrderedDict) else dict  # a Counter's own update() adds
        kind.clear(target)
        kind.update(target, parts)
    elif isinstance(target, set):
        set.clear(target)
        set.update(target, parts)
    elif isinstance(target, deque):
        target.clear()
        target.extend(parts)

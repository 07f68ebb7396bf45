"""Objects that stay in the program's process: the trusted side sees them through these classes.

What they answer is a value and never a verdict. So an object is equal to nothing, is neither true nor false, and has no
comparison or arithmetic, which would show the program what it is compared with.
"""

from __future__ import annotations

import builtins
import collections
import contextlib
from collections.abc import AsyncIterator, Coroutine, Generator, Iterator
from functools import partial
from typing import Any, Protocol

MAX_KEPT = 1000  # objects that the program may still change through one of its own
MAX_LENGTH = 2**20  # list() makes room for as many items as an object says it has
SAID = frozenset(
    {"__name__", "__qualname__", "__doc__", "__module__", "__defaults__", "__annotations__", "__dict__", "__wrapped__"}
)
# questions to a plain value, whose answer is the verdict: assert f(x).startswith("a"). A plain value would not be an object here
QUESTIONS = frozenset(
    name
    for kind in (str, bytes, int, float, set, range, collections.Counter)
    for name in dir(kind)
    if name.startswith("is") or name.endswith("swith")
)


class Program(Protocol):
    """What an object needs of its program (process.py)."""

    def request(self, *request: Any) -> Any:
        """Send one request and return the answer."""

    def handle(self, value: Any) -> tuple[int | str, str]:
        """Return the number and the type of an object of the program."""


class NamedTuple(tuple):
    """A named tuple of a class that only the program has."""

    _name: str
    _fields: tuple[str, ...]
    _class: int
    """Which of the program's objects its class is."""

    def __getattribute__(self, name: str) -> Any:
        if name[0] != "_" and name in self._fields:  # also if a tuple has a method of this name, such as count
            return self[self._fields.index(name)]
        return tuple.__getattribute__(self, name)

    def __repr__(self) -> str:
        return f"{self._name}({', '.join(f'{name}={value!r}' for name, value in self._asdict().items())})"

    def _asdict(self) -> dict[str, Any]:
        return dict(zip(self._fields, self))


class RemoteObject:
    """An object of the program. It can be passed back, and its attributes can be used; it equals nothing."""

    __slots__ = ("__weakref__", "_number", "_program", "_type")
    __hash__ = None  # type: ignore[assignment]  # its class may have values that are equal: a set would count them wrongly

    def __init__(self, program: Program, number: int | str, type_name: str):
        """`number`: the name of a function or class, or which of the program's other objects it is."""
        for name, value in (("_program", program), ("_number", number), ("_type", type_name)):
            object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        return False

    def __ne__(self, other: object) -> bool:
        raise TypeError(f"the program answered with an object of type {self._type}, which is no plain value")

    __lt__ = __le__ = __gt__ = __ge__ = __ne__

    def __bool__(self) -> bool:
        raise TypeError(f"the program answered with an object of type {self._type}, which is no plain value")

    def __getattr__(self, name: str) -> Any:
        if name in QUESTIONS or (name.startswith("__") and name not in SAID):
            raise AttributeError(f"the program answered with an object of type {self._type}, which has no {name}")
        return self._program.request("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._program.request("set", self, name, value)

    def __str__(self) -> str:
        return str(self._program.request("str", self))

    def __repr__(self) -> str:
        return str(self._program.request("repr", self))

    def __enter__(self) -> Any:
        return self._program.request("enter", self)

    def __exit__(self, kind: object, *error: object) -> None:
        """Leave the context. The program neither sees nor takes back an error, which may be the test's own verdict."""
        if kind is None:
            self._program.request("exit", self)

    def __len__(self) -> int:
        length = self._program.request("len", self)
        if type(length) is not int or not 0 <= length <= MAX_LENGTH:
            raise TypeError(f"the length of an object of type {self._type} must be up to {MAX_LENGTH:,}")
        return length

    def __iter__(self) -> Any:
        return RemoteIterator(self._program, *self._program.handle(self._program.request("iter", self)))

    def __getitem__(self, key: Any) -> Any:
        return self._program.request("item", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._program.request("setitem", self, key, value)

    def __delitem__(self, key: Any) -> None:
        self._program.request("delitem", self, key)


class RemoteFunction(RemoteObject):
    """What can be called: a function, a class, an object with `__call__`."""

    __slots__ = ()

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._program.request("call", self, args, named)


class RemoteIterator(RemoteObject, Iterator[Any]):
    """An iterator of the program: each item is asked for when it is wanted, so it may have no end."""

    __slots__ = ()

    def __iter__(self) -> RemoteIterator:
        return self

    def __next__(self) -> Any:
        return self._program.request("next", self)


class RemoteCoroutine(RemoteObject, Coroutine[Any, Any, Any]):
    """What an `async` function of the program answers with. It is run in the program's process."""

    __slots__ = ()
    cr_code = gi_code = None  # asyncio looks for them
    __hash__ = object.__hash__  # type: ignore[assignment]  # asyncio.gather() wants it

    def __await__(self) -> Generator[Any, Any, Any]:
        yield from ()
        return self._program.request("await", self)

    def send(self, value: Any) -> Any:
        raise StopIteration(self._program.request("await", self))

    def throw(self, *error: Any) -> Any:
        raise error[0]

    def close(self) -> None:
        """Do nothing: it has not begun."""


class RemoteAsyncIterator(RemoteObject, AsyncIterator[Any]):
    """What an `async` generator function of the program answers with."""

    __slots__ = ()

    async def __anext__(self) -> Any:
        return self._program.request("anext", self)


def remote_generator(remote: RemoteObject) -> Generator[Any, Any, Any]:
    """Return a generator that is driven by one of the program's."""
    told = None
    while True:
        try:
            item = remote._program.request("send", remote, told)
        except StopIteration as e:
            return e.value
        told = yield item


def awaited(
    error: BaseException, names: list[str], message: str, told: Any, own: dict[str, type], fields: dict[str, Any]
) -> BaseException | None:
    """Return a program's error as one that a test can await: of the first class of `names` that is builtin, or the problem's own.

    `fields` are the attributes of one that is the problem's own.
    Returns None for what no test may catch: Ctrl-C, and the errors by which a program ends or is out of memory.
    """
    if "MemoryError" in names:
        return None
    for name in names[:20]:
        cls = own.get(name) or getattr(builtins, name, None)
        if not (isinstance(cls, type) and issubclass(cls, (Exception, SystemExit))):
            continue
        for args in [told if type(told) is tuple else (message,), (message,)]:
            with contextlib.suppress(Exception):  # such as UnicodeDecodeError, which takes five
                # not the __init__ of the problem's own class: it has run already, in the program
                made = cls(*args) if name not in own else cls.__new__(cls, *args)
                made.__dict__.update(fields if name in own else {}, of_program=error)
                return made
    return None


class Kept:
    """The caller's objects that a generator, a coroutine or another object of the program got, and may change later."""

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self.is_last_kept = False
        """Whether the objects of the last request are kept; the program's side is told so with the next one."""
        self._groups: dict[
            int, list[int]
        ] = {}  # by the number of a program's object; those that may share have one list

    def of(self, handles: list[int]) -> list[int]:
        """Return the numbers of the objects that some of the program's objects may change."""
        return list(dict.fromkeys(number for handle in handles for number in self._groups.get(handle, ())))

    def add(self, given: list[Any], kept: list[int], handles: list[int]) -> None:
        """Note what a request has given to some of the program's objects, beside what they had."""
        self.is_last_kept = bool(handles and given)
        if not handles:
            return
        groups = list({id(group): group for h in handles if (group := self._groups.get(h)) is not None}.values())
        together = groups[0] if groups else []
        together[:] = [*kept, *range(len(self.objects), len(self.objects) + len(given))][-MAX_KEPT:]
        self.objects.extend(given)
        for other in groups[1:]:
            self._groups.update({h: together for h, group in self._groups.items() if group is other})
        self._groups.update(dict.fromkeys(handles, together))


def _said(name: str, remote: RemoteObject) -> Any:
    return remote._program.request("get", remote, name)


for _cls in (
    RemoteObject,
    RemoteFunction,
    RemoteIterator,
    RemoteCoroutine,
    RemoteAsyncIterator,
):  # else the class would answer for its objects
    for _name in ("__doc__", "__module__"):
        setattr(_cls, _name, property(partial(_said, _name)))

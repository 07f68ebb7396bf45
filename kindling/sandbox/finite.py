"""Bounds what an answer may cost the process that judges: what it holds when written out, and how many hashes are the same."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from enum import Enum
from itertools import groupby
from typing import Any

from kindling.sandbox.arguments import HEAP_TYPE, SCALARS, attributes
from kindling.sandbox.remote import RemoteObject

MAX_EXPANDED = 2**21  # values in an answer and its arguments, with every reference written out
MAX_IN_RINGS = 2**14  # the same, where some of them hold themselves: a comparison may take a thousand times as long
MAX_SAME_HASH = 200  # a set of n values with one hash takes n * n comparisons


def _inside(value: Any) -> Iterable[Any]:
    """Return what a value holds."""
    kind = type(value)
    if kind in SCALARS:
        return ()
    if kind is list or kind is tuple:
        return value
    if isinstance(value, dict):
        return [*dict.keys(value), *dict.values(value)]
    if isinstance(value, (list, tuple, set, frozenset, deque, type({}.keys()), type({}.values()))):
        base = next((base for base in (list, set) if isinstance(value, base)), None)
        return value if base is None else base.__iter__(value)
    if isinstance(value, type({}.items())):
        return list(value)
    return ()


def _attributes_inside(value: Any) -> Iterable[Any]:
    """Return the values of an object's attributes, if it is of a class that was written in Python."""
    return () if isinstance(value, (tuple, Enum, type, RemoteObject)) else attributes(value).values()


def require_finite(values: list[Any]) -> None:
    """Raise ValueError if values hold each other so often that writing them out would take the memory, or for ever.

    What has attributes counts by itself, because functions of Python go from one such object to the next, and can be ended.
    """
    sizes: dict[int, int] = {}
    todo, has_ring = [values], False  # all stay in it, so that no other has the id of one

    def size(value: Any) -> int:
        nonlocal has_ring
        found = sizes.get(id(value))
        if found is None:
            sizes[id(value)] = 0  # while it is looked into
            inside = value if type(value) in (list, tuple) else _inside(value)
            found = 1 + sum([1 if type(v) in SCALARS else size(v) for v in inside])
            if found > MAX_EXPANDED:
                raise ValueError("a value that holds too much")
            sizes[id(value)] = found
            if type(value).__flags__ & HEAP_TYPE:
                todo.append([*_attributes_inside(value)])
        elif found == 0:
            has_ring = True
        return found or 1

    for root in todo:  # which grows meanwhile
        size(root)
    if has_ring and max(sizes.values()) > MAX_IN_RINGS:
        raise ValueError("a value that holds itself, and too much")


def hashable(values: list[Any]) -> list[Any]:
    """Return what is hashable anywhere in values."""
    found, todo, seen = [], values, set()
    while todo:
        value = todo.pop()
        if type(value) in SCALARS:
            found.append(value)
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        try:
            hash(value)
            found.append(value)
        except TypeError:
            pass
        todo.extend(_inside(value))
        if type(value).__flags__ & HEAP_TYPE:
            todo.extend(_attributes_inside(value))
    return found


def require_different_hashes(values: list[Any]) -> None:
    """Raise ValueError if many different values have one hash: a set of them would take hours to build."""
    for _, group in groupby(sorted(values, key=hash), key=hash):
        different: list[Any] = []
        for value in group:
            if value not in different:
                different.append(value)
            if len(different) > MAX_SAME_HASH:
                raise ValueError(f"more than {MAX_SAME_HASH} values with one hash")

"""Reads the JSON of a request strictly: known fields have the right type and range, unknown ones are ignored.

    fields = parse(raw)
    fields.integer("max_tokens", 1, 10**9) or 16

A field that is null counts as left out, as for OpenAI's server.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, TypeGuard

from kindling.errors import KindlingError

HUGE = 10**9  # no number of tokens, seconds or ids is above this
SHOWN = 40  # characters of a value in an error, and the most digits of a whole number


class BadRequest(KindlingError):
    """A request that cannot be answered. `param` names the field that is wrong."""

    def __init__(self, message: str, param: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.status = param, status


class Fields:
    """The fields of a JSON object."""

    def __init__(self, content: dict[str, Any], within: str = ""):
        """`within` is the name of the field that holds the object, with a dot, for errors."""
        self._content, self._within = content, within

    def __contains__(self, name: str) -> bool:
        return self._content.get(name) is not None

    def wrong(self, name: str, must: str, mend: str = "correct it or leave it out") -> BadRequest:
        """Return the error about a field."""
        given, param = self._content.get(name), self._within + name
        return BadRequest(f"{param} must be {must}, but is {shown(given)}; {mend}", param)

    def as_json(self) -> str:
        """Return the object as JSON in one line."""
        return json.dumps(self._content)

    def any(self, name: str) -> Any:
        """Return a value of any type, or None."""
        return self._content.get(name)

    def text(self, name: str) -> str | None:
        """Return a text that is valid Unicode."""
        value = self._content.get(name)
        if value is not None and not is_text(value):
            raise self.wrong(name, "a text of valid Unicode")
        return value

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """Return the texts of a list, or the one text that is given in its place."""
        value = self._content.get(name)
        if value is None:
            return ()
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or len(values) > most or not all(map(is_text, values)):
            raise self.wrong(name, f"a text or a list of at most {most} texts of valid Unicode")
        return tuple(values)

    def flag(self, name: str, default: bool = False) -> bool:
        """Return true or false."""
        value = self._content.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        """Return a number from `low` to `high`."""
        value = self._content.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise self.wrong(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def integer(self, name: str, low: int, high: int) -> int | None:
        """Return a whole number from `low` to `high`."""
        value = self._content.get(name)
        if value is None:
            return None
        if not is_integer(value) or not low <= value <= high:
            raise self.wrong(name, f"a whole number from {low} to {high}")
        return int(value)

    def ids(self, name: str, n_tokens: int) -> list[int]:
        """Return a list of token ids below `n_tokens`."""
        value = self._content.get(name)
        if not isinstance(value, list) or not all(is_integer(i) and 0 <= i < n_tokens for i in value):
            raise self.wrong(name, f"a list of token ids from 0 to {n_tokens - 1}")
        return [int(i) for i in value]

    def section(self, name: str) -> Fields:
        """Return an object inside this one; an empty one if it is left out."""
        value = self._content.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(value or {}, f"{self._within}{name}.")

    def sections(self, name: str, most: int) -> list[Fields]:
        """Return the objects of a list."""
        value = self._content.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or len(value) > most or not all(isinstance(item, dict) for item in value):
            raise self.wrong(name, f"a list of at most {most} objects")
        return [Fields(item, f"{self._within}{name}.{i}.") for i, item in enumerate(value)]

    def refuse(self, name: str, allowed: Sequence[Any], why: str) -> None:
        """Raise BadRequest if a field that this server does not support has another value than those `allowed`."""
        value = self._content.get(name)
        if value is not None and value not in allowed:
            raise BadRequest(
                f"{self._within}{name} must be left out, but is {shown(value)}; {why}", self._within + name
            )


def is_text(value: Any) -> TypeGuard[str]:
    """Return whether a value is a text without lone surrogates, which cannot be encoded."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def is_integer(value: Any) -> TypeGuard[int | float]:
    """Return whether a value is a whole number; 3.0 is one, and true is none."""
    return not isinstance(value, bool) and (isinstance(value, int) or (isinstance(value, float) and value.is_integer()))


def shown(value: Any) -> str:
    """Return a value for an error, in one short line of ASCII. Of a long text, only its length: it may be private."""
    if isinstance(value, str) and len(value) > SHOWN:
        return f"a text of {len(value):,} characters"
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value):,}"
    return "missing" if value is None else ascii(value)


def parse(raw: bytes) -> Fields:
    """Return the fields of a JSON object. Raises BadRequest for any other text."""
    try:
        content = json.loads(
            raw.decode("utf-8-sig"),
            parse_constant=_refused,
            parse_float=_finite,
            parse_int=_short,
            object_pairs_hook=_unique,
        )
    except UnicodeDecodeError as e:
        raise BadRequest(f"the body must be UTF-8, but is not at byte {e.start:,}; encode it in UTF-8") from None
    except RecursionError:
        raise BadRequest("the body must not be nested deeply, but is; send fewer brackets") from None
    except ValueError as e:
        why = f"{e.msg} at character {e.pos:,}" if isinstance(e, json.JSONDecodeError) else str(e)
        raise BadRequest(f"the body must be JSON, but is not ({why[:120]}); correct it") from None
    if not isinstance(content, dict):
        raise BadRequest(f"the body must be a JSON object, but is {shown(content)}; send {{...}}")
    return Fields(content)


def _refused(word: str) -> float:
    raise ValueError(f"{word} is no number in JSON")


def _short(word: str) -> int:
    if len(word) > SHOWN:
        raise ValueError("a number is too large")
    return int(word)


def _finite(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key occurs twice in an object")
    return content

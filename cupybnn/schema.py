"""Validation of JSON data: types, ranges and names, reporting the place of the first fault.

A check is a function of a value and its place, such as ``history[3].test_accuracy``; it raises
`SchemaError` if the value breaks its rule. Checks can be combined::

    row = record({"n": integer(1), "seconds": number(0)}, {"note": text()})
    check = record({"rows": list_of(row, least=1)})
    check(parse(content))
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

__all__ = [
    "Check",
    "SchemaError",
    "anything",
    "boolean",
    "integer",
    "list_of",
    "mapping_of",
    "nullable",
    "number",
    "one_of",
    "parse",
    "real",
    "record",
    "text",
]

Check = Callable[[Any, str], None]

#: JSON brackets outside strings; an unterminated string extends to the end.
_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[\]{}]', re.DOTALL)
#: Characters that would control a terminal or cannot be encoded.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
#: Maximum nesting of lists and mappings.
_MOST_NESTED = 32


class SchemaError(ValueError):
    """A value breaks a rule; the message names its place and the rule, but not the file."""


def parse(content: str | bytes, *, constants: bool = False) -> Any:
    """Parse JSON text.

    Parameters
    ----------
    content : str or bytes
        Bytes are UTF-8, with or without a byte order mark.
    constants : bool
        Whether to accept NaN and Infinity, which are not valid JSON.

    Raises
    ------
    SchemaError
        If it is not JSON, or nested too deeply.
    """

    def refuse(name: str) -> None:
        raise SchemaError(f"{name} is not a valid JSON number")

    try:
        if isinstance(content, bytes):
            content = content.decode("utf-8-sig")
        nested = 0
        for token in _TOKENS.finditer(content):
            nested += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
            if nested > _MOST_NESTED:
                raise SchemaError(f"it is nested more than {_MOST_NESTED} levels deep")
        return json.loads(content, parse_constant=None if constants else refuse)
    except SchemaError:
        raise
    except ValueError as error:  # from json, from decoding, or a number with too many digits
        raise SchemaError(f"it must be JSON; {error}") from error


def _error(place: str, rule: str, value: Any) -> SchemaError:
    if isinstance(value, (list, tuple, dict)):
        got = f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    else:
        got = "null" if value is None else ascii(value)
    got = got if len(got) <= 60 else got[:57] + "..."
    return SchemaError(f"{place or 'the whole'} must be {rule}; got {got}")


def anything(value: Any, place: str = "") -> None:
    """Accept any value."""


def boolean(value: Any, place: str = "") -> None:
    """Accept true and false."""
    if not isinstance(value, bool):
        raise _error(place, "true or false", value)


def integer(low: int = 0, high: int = 2**53) -> Check:
    """Return a check for integers from `low` to `high`."""

    def check(value: Any, place: str = "") -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _error(place, f"an integer from {low} to {high}", value)

    return check


def number(low: float = -math.inf, high: float = math.inf, *, above: float | None = None) -> Check:
    """Return a check for finite numbers from `low` to `high`, greater than `above`."""
    rule = "a finite number"
    if above is not None:
        rule += f" greater than {above:g}"
    if low > -math.inf or high < math.inf:
        rule += f" from {low:g} to {high:g}" if high < math.inf else f" of at least {low:g}"

    def check(value: Any, place: str = "") -> None:
        valid = isinstance(value, (int, float)) and not isinstance(value, bool)
        # An integer may be too large for a float, but comparing it is safe.
        valid = valid and abs(value) < 1e300 and low <= value <= high
        if not valid or (above is not None and not value > above):
            raise _error(place, rule, value)

    return check


def real(value: Any, place: str = "") -> None:
    """Accept numbers, including NaN and infinities."""
    large = isinstance(value, int) and abs(value) > 2**1000  # too large for a float
    if isinstance(value, bool) or not isinstance(value, (int, float)) or large:
        raise _error(place, "a number", value)


def text(pattern: str | None = None, most: int = 4000) -> Check:
    """Return a check for printable strings that fully match `pattern`, if given."""
    rule = f"a printable text of at most {most} characters"
    if pattern is not None:
        rule += f" that matches {pattern}"

    def check(value: Any, place: str = "") -> None:
        valid = isinstance(value, str) and len(value) <= most
        valid = valid and not _UNPRINTABLE.search(value)
        if not valid or (pattern is not None and not re.fullmatch(pattern, value)):
            raise _error(place, rule, value)

    return check


def one_of(*values: Any) -> Check:
    """Return a check for the given values, compared by type and value."""

    def check(value: Any, place: str = "") -> None:
        if not any(type(value) is type(v) and value == v for v in values):
            raise _error(place, f"one of {', '.join(map(repr, values))}", value)

    return check


def nullable(check: Check) -> Check:
    """Return a check that also accepts None."""

    def checked(value: Any, place: str = "") -> None:
        if value is not None:
            check(value, place)

    return checked


def list_of(item: Check, *, least: int = 0, most: int = 1_000_000) -> Check:
    """Return a check for lists of `least` to `most` items."""

    def check(value: Any, place: str = "") -> None:
        if not isinstance(value, (list, tuple)) or not least <= len(value) <= most:
            raise _error(place, f"a list of {least} to {most:,} items", value)
        for i, part in enumerate(value):
            item(part, f"{place}[{i}]")

    return check


def mapping_of(item: Check, *, key: Check | None = None, most: int = 100_000) -> Check:
    """Return a check for mappings from arbitrary names to values of one kind."""
    named = key or text()

    def check(value: Any, place: str = "") -> None:
        if not isinstance(value, Mapping) or len(value) > most:
            raise _error(place, f"a mapping of at most {most:,} names", value)
        for name, part in value.items():
            named(name, f"{place}: a name" if place else "a name")
            item(part, f"{place}[{name!r}]")

    return check


def record(
    required: Mapping[str, Check],
    optional: Mapping[str, Check] | None = None,
    *,
    others: bool = False,
    also: Check | None = None,
) -> Check:
    """Return a check for mappings with known names.

    Parameters
    ----------
    required, optional : mapping of str to check
    others : bool
        Whether to accept other names, unchecked.
    also : check, optional
        Applied last, to the whole.
    """
    fields = {**required, **(optional or {})}

    def check(value: Any, place: str = "") -> None:
        if not isinstance(value, Mapping):
            raise _error(place, "a mapping", value)
        if missing := [name for name in required if name not in value]:
            raise SchemaError(f"{place or 'it'} lacks {', '.join(missing)}")
        for name, part in value.items():
            if name in fields:
                fields[name](part, f"{place}.{name}" if place else str(name))
            elif not others:
                known = ", ".join(fields)
                raise SchemaError(
                    f"{place or 'the whole'} must have no other names than {known}; got "
                    f"{ascii(name)[:60]}"
                )
        if also is not None:
            also(value, place)

    return check

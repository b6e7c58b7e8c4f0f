"""Rules for settings: which values are valid, how they are converted and parsed from text."""

from __future__ import annotations

import itertools
import math
import operator
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupybnn.errors import SettingError
from cupybnn.paths import checked_path

__all__ = [
    "Choice",
    "Device",
    "Number",
    "OneOf",
    "PathName",
    "PathNames",
    "Rule",
    "Switch",
    "Whole",
    "Wholes",
    "Widths",
]


class _Wrong(Exception):
    """A value that breaks its rule."""


class Rule:
    """What the value of a setting must be.

    Attributes
    ----------
    must : str
        The rule in words, to follow "must be".
    kind : str
        The type as a docstring names it.
    metavar : str
        Placeholder for a value in a help text.
    """

    must: str
    kind: str
    metavar: str

    @property
    def typed(self) -> str:
        """What `parse` expects, to follow "must be"."""
        return self.must

    def check(self, name: str, value: Any) -> Any:
        """Return `value` as a plain Python object.

        Raises
        ------
        SettingError
            If it breaks the rule; the message states the name, the rule and the value.
        """
        try:
            return self.convert(value.item() if isinstance(value, np.generic) else value)
        except _Wrong:
            raise SettingError(f"The {name!r} must be {self.must}; got {value!r}.") from None

    def convert(self, value: Any) -> Any:
        """Return `value` as a plain Python object, or raise."""
        raise NotImplementedError

    def parse(self, text: str) -> Any:
        """Convert a command-line argument; the result has yet to pass `check`.

        Raises
        ------
        ValueError
            If `text` cannot be converted.
        """
        return text

    def show(self, value: Any) -> str:
        """Return `value` as a help text shows it."""
        return "none" if value is None else str(value)


@dataclass(frozen=True)
class PathName(Rule):
    """A path or None."""

    must = "a path or None"
    kind = "path or None"
    metavar = "DIR"

    def convert(self, value: Any) -> str | None:
        if value is None:
            return None
        try:
            path = os.fspath(value)
            checked_path(path)
        except (TypeError, SettingError):
            raise _Wrong from None
        if not isinstance(path, str):
            raise _Wrong
        return str(path)


@dataclass(frozen=True)
class PathNames(Rule):
    """Paths, or one alone; comma-separated in text."""

    must = "a path or several"
    kind = "tuple of path"
    metavar = "RUN,..."

    def convert(self, value: Any) -> tuple[str, ...]:
        each = value if isinstance(value, (tuple, list)) else () if value is None else (value,)
        paths = tuple(PathName().convert(path) for path in each)
        if None in paths or "" in paths:
            raise _Wrong
        return tuple(str(path) for path in paths)

    def parse(self, text: str) -> tuple[str, ...]:
        return tuple(path for path in text.split(",") if path)

    def show(self, value: Any) -> str:
        return ",".join(value) or "none"


@dataclass(frozen=True)
class Whole(Rule):
    """A whole number, at least `least`."""

    least: int
    metavar: str = "N"
    kind = "int"

    @property
    def must(self) -> str:  # type: ignore[override]
        return f"a whole number, at least {self.least}"

    def convert(self, value: Any) -> int:
        if isinstance(value, bool):
            raise _Wrong
        try:
            number = operator.index(value)
        except TypeError:
            raise _Wrong from None
        if number < self.least:
            raise _Wrong
        return number

    def parse(self, text: str) -> int:
        return int(text)


@dataclass(frozen=True)
class OneOf(Rule):
    """One of a few whole numbers."""

    numbers: tuple[int, ...]
    metavar: str = "N"
    kind = "int"

    @property
    def must(self) -> str:  # type: ignore[override]
        *first, last = map(str, self.numbers)
        return f"{', '.join(first)} or {last}"

    def convert(self, value: Any) -> int:
        number = Whole(min(self.numbers)).convert(value)
        if number not in self.numbers:
            raise _Wrong
        return number

    def parse(self, text: str) -> int:
        return int(text)


@dataclass(frozen=True)
class Wholes(Rule):
    """Increasing whole numbers, the first at least `least`; comma-separated in text."""

    least: int
    metavar = "N,..."
    kind = "tuple of int"

    @property
    def must(self) -> str:  # type: ignore[override]
        return f"increasing whole numbers, at least {self.least}"

    @property
    def typed(self) -> str:
        return "comma-separated whole numbers"

    def convert(self, value: Any) -> tuple[int, ...]:
        if not isinstance(value, (tuple, list, np.ndarray)):
            raise _Wrong
        one = Whole(self.least)
        numbers = tuple(one.convert(each) for each in value)
        if any(b <= a for a, b in itertools.pairwise(numbers)):
            raise _Wrong
        return numbers

    def parse(self, text: str) -> tuple[int, ...]:
        return tuple(int(number) for number in text.split(",") if number.strip())

    def show(self, value: Any) -> str:
        return ",".join(map(str, value)) or "none"


@dataclass(frozen=True)
class Widths(Rule):
    """A whole number from 1 on for all layers, or one for each; with commas between in text."""

    metavar = "H"
    kind = "int or tuple of int"
    must = "a whole number, at least 1, or one for each layer"

    @property
    def typed(self) -> str:
        return "a whole number, or one for each layer with commas between them"

    def convert(self, value: Any) -> int | tuple[int, ...]:
        one = Whole(1)
        if not isinstance(value, (tuple, list, np.ndarray)):
            return one.convert(value)
        if len(value) == 0:
            raise _Wrong
        return tuple(one.convert(each) for each in value)

    def parse(self, text: str) -> int | tuple[int, ...]:
        return tuple(int(number) for number in text.split(",")) if "," in text else int(text)

    def show(self, value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


@dataclass(frozen=True)
class Number(Rule):
    """A finite number for which `holds` is true; `rule` says the same in words."""

    rule: str
    holds: Callable[[float], bool]
    metavar: str
    kind = "float"

    @property
    def must(self) -> str:  # type: ignore[override]
        return f"a finite number, {self.rule}"

    def convert(self, value: Any) -> float:
        if isinstance(value, (bool, str, bytes)):
            raise _Wrong
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise _Wrong from None
        if not math.isfinite(number) or not self.holds(number):
            raise _Wrong
        return number

    def parse(self, text: str) -> float:
        return float(text)

    def show(self, value: Any) -> str:
        return f"{value:g}".replace("e-0", "e-")


@dataclass(frozen=True)
class Switch(Rule):
    """True or False."""

    must = "True or False"
    kind = "bool"
    metavar = ""

    def convert(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise _Wrong
        return value

    def show(self, value: Any) -> str:
        return "on" if value else "off"


@dataclass(frozen=True)
class Choice(Rule):
    """One of the names that `find` returns; `find` is called late to avoid an early import."""

    find: Callable[[], tuple[str, ...]]
    listed: bool = True  # whether a docstring's type lists the names
    metavar = "NAME"

    @classmethod
    def of(cls, *names: str) -> Choice:
        """Return the rule that a value must be one of `names`."""
        return cls(lambda: names)

    @property
    def must(self) -> str:  # type: ignore[override]
        return f"one of {', '.join(self.find())}"

    @property
    def kind(self) -> str:  # type: ignore[override]
        return "{" + ", ".join(f'"{name}"' for name in self.find()) + "}" if self.listed else "str"

    def convert(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.find():
            raise _Wrong
        return str(value)


@dataclass(frozen=True)
class Device(Rule):
    """The name of a device, or an object whose `str` is one."""

    must = "the name of a device"
    kind = "str"
    metavar = "D"

    def convert(self, value: Any) -> str:
        return str(value)

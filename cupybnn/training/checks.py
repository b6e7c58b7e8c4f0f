"""Checks of settings: each names the setting, the rule and what came instead."""

from __future__ import annotations

import itertools
import math
import operator
import os
from collections.abc import Callable
from typing import Any

__all__ = ["choice", "integer", "integers", "number", "path"]


def path(name: str, value: Any) -> str:
    """Return a path as a string; ValueError if it is none."""
    try:
        path = os.fspath(value)
    except TypeError:
        path = None
    if not isinstance(path, str) or not path:
        raise ValueError(f"The {name!r} must be a path or None; got {value!r}.")
    return path


def integer(name: str, value: Any, least: int) -> int:
    """Return a whole number that is at least `least`; ValueError if it is none."""
    wrong = f"The {name!r} must be a whole number, at least {least}; got {value!r}."
    if isinstance(value, bool):
        raise ValueError(wrong)
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(wrong) from None
    if number < least:
        raise ValueError(wrong)
    return number


def number(name: str, value: Any, rule: str, holds: Callable[[float], bool]) -> float:
    """Return a finite float for which `holds`, put in words as `rule`; ValueError if not."""
    wrong = f"The {name!r} must be a finite number, {rule}; got {value!r}."
    if isinstance(value, (bool, str, bytes)):
        raise ValueError(wrong)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(wrong) from None
    if not math.isfinite(number) or not holds(number):
        raise ValueError(wrong)
    return number


def choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"The {name!r} must be one of {', '.join(choices)}; got {value!r}.")


def integers(name: str, value: Any, least: int) -> tuple[int, ...]:
    """Return rising whole numbers, the first at least `least`; ValueError if they are none."""
    wrong = f"The {name!r} must be rising whole numbers, at least {least}; got {value!r}."
    if not isinstance(value, (tuple, list)):
        raise ValueError(wrong)
    try:
        numbers = tuple(integer(name, each, least) for each in value)
    except ValueError:
        raise ValueError(wrong) from None
    if any(b <= a for a, b in itertools.pairwise(numbers)):
        raise ValueError(wrong)
    return numbers

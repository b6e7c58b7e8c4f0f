"""Checks of settings: each names the setting, the rule and what came instead."""

from __future__ import annotations

import itertools
import math
import operator
import os
from collections.abc import Callable
from typing import Any

from cupybnn.errors import SettingError

__all__ = ["choice", "integer", "integers", "number", "path", "possible_path"]


def path(name: str, value: Any) -> str:
    """Return a path as a string; SettingError if it is none."""
    try:
        path = os.fspath(value)
    except TypeError:
        path = None
    if not isinstance(path, str) or not path:
        raise SettingError(f"The {name!r} must be a path or None; got {value!r}.")
    return possible_path(name, path)


def possible_path(name: str, path: str) -> str:
    """Return a path; SettingError if no file of this system can have it."""
    try:
        possible = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise SettingError(f"The {name!r} must be a path that this system can have; got {path!r}.")
    return path


def integer(name: str, value: Any, least: int) -> int:
    """Return a whole number that is at least `least`; SettingError if it is none."""
    wrong = f"The {name!r} must be a whole number, at least {least}; got {value!r}."
    if isinstance(value, bool):
        raise SettingError(wrong)
    try:
        number = operator.index(value)
    except TypeError:
        raise SettingError(wrong) from None
    if number < least:
        raise SettingError(wrong)
    return number


def number(name: str, value: Any, rule: str, holds: Callable[[float], bool]) -> float:
    """Return a finite float for which `holds`, put in words as `rule`; SettingError if not."""
    wrong = f"The {name!r} must be a finite number, {rule}; got {value!r}."
    if isinstance(value, (bool, str, bytes)):
        raise SettingError(wrong)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise SettingError(wrong) from None
    if not math.isfinite(number) or not holds(number):
        raise SettingError(wrong)
    return number


def choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise SettingError unless `value` is one of `choices`."""
    if value not in choices:
        raise SettingError(f"The {name!r} must be one of {', '.join(choices)}; got {value!r}.")


def integers(name: str, value: Any, least: int) -> tuple[int, ...]:
    """Return rising whole numbers, the first at least `least`; SettingError if they are none."""
    wrong = f"The {name!r} must be rising whole numbers, at least {least}; got {value!r}."
    if not isinstance(value, (tuple, list)):
        raise SettingError(wrong)
    try:
        numbers = tuple(integer(name, each, least) for each in value)
    except ValueError:
        raise SettingError(wrong) from None
    if any(b <= a for a, b in itertools.pairwise(numbers)):
        raise SettingError(wrong)
    return numbers

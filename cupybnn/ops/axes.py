"""Validation of axes: Python or NumPy integers, one or several."""

from __future__ import annotations

import operator
from typing import Any

__all__ = ["Axis", "as_axes", "as_axis"]

Axis = int | tuple[int, ...] | None


def as_axis(axis: Any, op: str) -> int:
    """Return one axis as a Python integer."""
    try:
        return operator.index(axis)
    except TypeError:
        raise TypeError(f"The 'axis' of {op} must be an integer; got {axis!r}.") from None


def as_axes(axis: Any, op: str) -> Axis:
    """Return an axis, several, or None for all, as Python integers."""
    if axis is None or type(axis) is int:
        return axis
    try:
        if isinstance(axis, tuple | list):
            return tuple(operator.index(one) for one in axis)
        return operator.index(axis)
    except TypeError:
        raise TypeError(
            f"The 'axis' of {op} must be an integer, a tuple of integers, or None; got {axis!r}."
        ) from None

"""Find the operation that first produces a NaN or an infinity."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from cupybnn.autograd.state import Setting, checking, state
from cupybnn.autograd.storage import module_of
from cupybnn.backends.totals import all_true
from cupybnn.errors import NonFiniteError

__all__ = ["check_finite", "place", "scope"]


def _raise_if_not_finite(op: str, array: Any, phase: str, where: str) -> None:
    if array.dtype.kind in "biu":
        return
    finite = module_of(array).isfinite(array)
    if not all_true(finite):
        bad = array.size - int(finite.sum())
        raise NonFiniteError(op, phase, where, tuple(array.shape), bad)


class check_finite(Setting):
    """Context manager and decorator within which every forward value and every gradient is checked.

    Raises
    ------
    NonFiniteError
        At the first NaN or infinity. It names the operation, the layer, the forward value or
        gradient in which it appeared, and the array's shape.

    Notes
    -----
    Each check waits for the device: use it for debugging, not for training.

    Examples
    --------
    >>> from cupybnn.autograd import Tensor, debug
    >>> with debug.check_finite():
    ...     Tensor([1.0, -1.0]).log()
    Traceback (most recent call last):
        ...
    cupybnn.errors.NonFiniteError: 1 value(s) of the forward value of log, shape (2,), are NaN or \
infinite.
    """

    variable = checking
    value = staticmethod(_raise_if_not_finite)


@contextmanager
def scope(module: Any) -> Iterator[None]:
    """Attribute computations within to `module`; ``module.path_of(inner)`` names its parts."""
    state.scopes.append(module)
    try:
        yield
    finally:
        state.scopes.pop()


def place() -> str:
    """Return the path of the innermost module, as in "hidden.fc2", or "" outside any module."""
    modules = state.scopes
    if len(modules) < 2:
        return type(modules[0]).__name__ if modules else ""
    return ".".join(outer.path_of(inner) for outer, inner in pairwise(modules))

"""Learning-rate schedules for optimizers.

Each function here returns a schedule. Called with a step number, counted from 0, it returns the
learning-rate factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Schedule", "constant", "cosine", "exponential", "step", "warm_up"]

Schedule = Callable[[int], float]


def constant(factor: float = 1.0) -> Schedule:
    """Return a schedule with the constant `factor`.

    Examples
    --------
    >>> from cupybnn.optim import schedules
    >>> schedules.constant(0.5)(100)
    0.5
    """
    return _BoundSchedule(_constant, factor)


def _constant(number: int, factor: float) -> float:
    return factor


def step(boundaries: Sequence[int], factor: float = 0.1) -> Schedule:
    """Return a schedule that starts at 1 and is multiplied by `factor` at each of `boundaries`.

    Examples
    --------
    >>> from cupybnn.optim import schedules
    >>> rate = schedules.step([10, 20], 0.5)
    >>> [rate(0), rate(10), rate(25)]
    [1.0, 0.5, 0.25]
    """
    return _BoundSchedule(_step, tuple(boundaries), factor)


def _step(number: int, boundaries: tuple[int, ...], factor: float) -> float:
    return factor ** sum(number >= boundary for boundary in boundaries)


def exponential(steps: int, final: float) -> Schedule:
    """Return a schedule that decays exponentially from 1 to `final` at `steps`.

    Examples
    --------
    >>> from cupybnn.optim import schedules
    >>> rate = schedules.exponential(100, 0.01)
    >>> [rate(0), round(rate(50), 4), rate(100)]
    [1.0, 0.1, 0.01]
    """
    if steps < 1 or not final > 0:
        raise ValueError(
            f"An exponential schedule needs steps >= 1 and final > 0; got {steps!r} and {final!r}."
        )
    return _BoundSchedule(_exponential, steps, final)


def _exponential(number: int, steps: int, final: float) -> float:
    return final ** min(number / steps, 1.0)


def cosine(steps: int, final: float = 0.0) -> Schedule:
    """Return a schedule that falls from 1 to `final` at `steps` along half a cosine.

    Notes
    -----
    Loshchilov, Hutter: SGDR, ICLR 2017, without restarts.

    Examples
    --------
    >>> from cupybnn.optim import schedules
    >>> rate = schedules.cosine(100)
    >>> [rate(0), round(rate(50), 4), rate(100)]
    [1.0, 0.5, 0.0]
    """
    if steps < 1:
        raise ValueError(f"A cosine schedule needs steps >= 1; got {steps!r}.")
    return _BoundSchedule(_cosine, steps, final)


def _cosine(number: int, steps: int, final: float) -> float:
    return final + (1 - final) * (1 + math.cos(math.pi * min(number / steps, 1.0))) / 2


def warm_up(steps: int, then: Schedule | None = None) -> Schedule:
    """Return a schedule that rises linearly over `steps` and then follows `then` from its start.

    The first step has the factor ``1 / (steps + 1)`` times that of ``then(0)``.

    Examples
    --------
    >>> from cupybnn.optim import schedules
    >>> rate = schedules.warm_up(3, schedules.cosine(100))
    >>> [rate(0), rate(1), rate(2), rate(3)]
    [0.25, 0.5, 0.75, 1.0]
    """
    return _BoundSchedule(_warm_up, steps, constant() if then is None else then)


def _warm_up(number: int, steps: int, then: Schedule) -> float:
    if number < steps:
        return then(0) * ((number + 1) / (steps + 1))  # exact for integers of any size
    return then(number - steps)


class _BoundSchedule:
    """A function bound to its arguments, which can be pickled and printed."""

    def __init__(self, function: Callable[..., float], *arguments: Any) -> None:
        self._function, self._arguments = function, arguments

    def __call__(self, number: int) -> float:
        return self._function(number, *self._arguments)

    def __repr__(self) -> str:
        return f"{self._function.__name__[1:]}({', '.join(map(repr, self._arguments))})"

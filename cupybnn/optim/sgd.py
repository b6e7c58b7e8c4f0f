"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cupybnn.autograd.storage import module_of
from cupybnn.optim.optimizer import Optimizer

__all__ = ["SGD"]


class SGD(Optimizer):
    """Gradient descent with momentum: ``v = momentum * v + grad; weight -= lr * v``.

    Parameters
    ----------
    parameters, **common
        As in `Optimizer`.
    lr : float
        Learning rate.
    momentum : float
        In [0, 1).
    """

    slots = ("velocity",)

    def __init__(
        self, parameters: Iterable[Any], lr: float, momentum: float = 0.0, **common: Any
    ) -> None:
        super().__init__(parameters, lr, momentum=momentum, **common)

    def update(
        self,
        group: dict[str, Any],
        lr: float,
        weight: Any,
        grad: Any,
        slots: list[Any],
        work: Any,
    ) -> None:
        (velocity,), (change, _) = slots, work
        velocity *= group["momentum"]
        velocity += grad
        module_of(weight).multiply(velocity, lr, out=change)
        weight -= change

"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from cupybnn.optim.optimizer import Block, Optimizer, Rules

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

    Examples
    --------
    >>> from cupybnn import nn, optim
    >>> weight = nn.Parameter([1.0, -2.0])
    >>> optimizer = optim.SGD([weight], lr=0.5)
    >>> (weight * weight).sum().backward()
    >>> optimizer.step()
    >>> weight.data.tolist()
    [0.0, 0.0]
    """

    slots = ("velocity",)
    rules: ClassVar[Rules] = {
        **Optimizer.rules,
        "momentum": ("a number in [0, 1)", lambda momentum: 0 <= momentum < 1),
    }

    def __init__(
        self, parameters: Iterable[Any], lr: float, momentum: float = 0.0, **common: Any
    ) -> None:
        super().__init__(parameters, lr, momentum=momentum, **common)

    def update(self, block: Block) -> None:
        (velocity,), (change, _) = block.slots, block.work
        velocity *= block.options["momentum"]
        velocity += block.grad
        block.xp.multiply(velocity, block.lr, out=change)
        block.weight -= change

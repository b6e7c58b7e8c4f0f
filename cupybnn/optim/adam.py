"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cupybnn.autograd.storage import module_of
from cupybnn.optim.optimizer import Optimizer

__all__ = ["Adam", "AdamW"]


class Adam(Optimizer):
    """Adam: steps scaled by running means of the gradient and of its square.

    Parameters
    ----------
    parameters, **common
        As in `Optimizer`.
    lr : float
        Learning rate.
    betas : (float, float)
        Decay of the two means.
    eps : float
        Added to the root of the mean square.

    Notes
    -----
    Kingma, Ba: Adam: a method for stochastic optimization, ICLR 2015, algorithm 1::

        mean   = b1 * mean   + (1 - b1) * grad
        square = b2 * square + (1 - b2) * grad**2
        weight = weight - lr * (mean / (1 - b1**t)) / (sqrt(square / (1 - b2**t)) + eps)
    """

    slots = ("mean", "square")

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **common: Any,
    ) -> None:
        super().__init__(parameters, lr, betas=betas, eps=eps, **common)

    def update(
        self,
        group: dict[str, Any],
        lr: float,
        weight: Any,
        grad: Any,
        slots: list[Any],
        work: Any,
    ) -> None:
        xp = module_of(weight)
        mean, square = slots
        (b1, b2), (a, b) = group["betas"], work
        xp.subtract(grad, mean, out=a)
        a *= 1 - b1
        mean += a
        xp.multiply(grad, grad, out=a)
        a -= square
        a *= 1 - b2
        square += a
        # The corrections of both means, taken together: two passes over the memory less.
        root = (1 - b2**self.steps) ** 0.5
        xp.sqrt(square, out=a)
        a += group["eps"] * root
        xp.divide(mean, a, out=b)
        b *= lr * root / (1 - b1**self.steps)
        weight -= b


class AdamW(Adam):
    """Adam with decoupled weight decay.

    Parameters
    ----------
    parameters, lr, **common
        As in `Adam`.
    weight_decay : float
        Before each update, ``weight *= 1 - lr * weight_decay``.

    Notes
    -----
    Loshchilov, Hutter: Decoupled weight decay regularization, ICLR 2019.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        **common: Any,
    ) -> None:
        super().__init__(parameters, lr, weight_decay=weight_decay, **common)

    def update(
        self,
        group: dict[str, Any],
        lr: float,
        weight: Any,
        grad: Any,
        slots: list[Any],
        work: Any,
    ) -> None:
        weight *= 1 - lr * group["weight_decay"]
        super().update(group, lr, weight, grad, slots, work)

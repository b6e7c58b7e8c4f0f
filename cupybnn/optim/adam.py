"""Adam and AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

from cupybnn import backends
from cupybnn.optim.optimizer import Block, Optimizer, Rules

__all__ = ["Adam", "AdamW"]


class Adam(Optimizer):
    """Adam: steps scaled by running means of the gradient and its square.

    Parameters
    ----------
    parameters, **common
        As in `Optimizer`.
    lr : float
        Learning rate.
    betas : (float, float)
        Decay of the two means, each in [0, 1).
    eps : float
        Added to the root mean square; at least 0.

    Notes
    -----
    Kingma, Ba: Adam: a method for stochastic optimization, ICLR 2015, algorithm 1::

        mean   = b1 * mean   + (1 - b1) * grad
        square = b2 * square + (1 - b2) * grad**2
        weight = weight - lr * (mean / (1 - b1**t)) / (sqrt(square / (1 - b2**t)) + eps)

    Examples
    --------
    >>> from cupybnn import nn, optim
    >>> weight = nn.Parameter([1.0, -2.0])
    >>> optimizer = optim.Adam([weight], lr=0.1)
    >>> for _ in range(100):
    ...     optimizer.zero_grad()
    ...     (weight * weight).sum().backward()
    ...     optimizer.step()
    >>> bool(abs(weight.data).max() < 0.2)
    True
    """

    slots = ("mean", "square")
    nonnegative = ("square",)
    rules: ClassVar[Rules] = {
        **Optimizer.rules,
        "betas": (
            "two numbers in [0, 1)",
            lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
        ),
        "eps": ("a finite number >= 0", lambda eps: 0 <= eps < math.inf),
    }

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **common: Any,
    ) -> None:
        super().__init__(parameters, lr, betas=betas, eps=eps, **common)

    def _decay(self, group: dict[str, Any], lr: float) -> float:
        """Return the factor of a weight before its update."""
        return 1.0

    def _numbers(self, group: dict[str, Any], lr: float) -> dict[str, Any]:
        """Return the numbers of an update."""
        b1, b2 = group["betas"]
        # Both bias corrections combined, which saves two passes over memory.
        root = (1 - b2**self.steps) ** 0.5
        return {
            "decay": self._decay(group, lr),
            "rates": (1 - b1, 1 - b2),
            "eps": group["eps"] * root,
            "factor": lr * root / (1 - b1**self.steps),
        }

    def _pass_over(
        self, group: dict[str, Any], lr: float, limit: float | None, weight: Any, grad: Any,
        slots: list[Any],
    ) -> bool:  # fmt: skip
        passes = backends.get(weight).passes(weight, grad, *slots)
        if passes is None or type(self).update is not Adam.update:
            return False
        passes.adam(weight, grad, *slots, limit=limit, **self._numbers(group, lr))
        return True

    def update(self, block: Block) -> None:
        xp, grad, (mean, square), (a, b) = block.xp, block.grad, block.slots, block.work
        decay, (rate_1, rate_2), eps, factor = self._numbers(block.options, block.lr).values()
        if decay != 1:
            block.weight *= decay
        xp.subtract(grad, mean, out=a)
        a *= rate_1
        mean += a
        xp.multiply(grad, grad, out=a)
        a -= square
        a *= rate_2
        square += a
        xp.sqrt(square, out=a)
        a += eps
        xp.divide(mean, a, out=b)
        b *= factor
        block.weight -= b


class AdamW(Adam):
    """Adam with decoupled weight decay.

    Parameters
    ----------
    parameters, lr, **common
        As in `Adam`.
    weight_decay : float
        Before each update, ``weight *= 1 - lr * weight_decay``; at least 0.

    Notes
    -----
    Loshchilov, Hutter: Decoupled weight decay regularization, ICLR 2019.

    Examples
    --------
    >>> from cupybnn import nn, optim
    >>> weight = nn.Parameter([1.0])
    >>> optimizer = optim.AdamW([weight], lr=0.1, weight_decay=0.1)
    >>> (weight * 0).sum().backward()
    >>> optimizer.step()
    >>> round(weight.item(), 6)
    0.99
    """

    rules: ClassVar[Rules] = {
        **Adam.rules,
        "weight_decay": ("a finite number >= 0", lambda decay: 0 <= decay < math.inf),
    }

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        **common: Any,
    ) -> None:
        super().__init__(parameters, lr, weight_decay=weight_decay, **common)

    def _decay(self, group: dict[str, Any], lr: float) -> float:
        return float(1 - lr * group["weight_decay"])

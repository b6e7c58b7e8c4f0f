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

    def update(self, block: Block) -> None:
        self._update(block, 1.0)

    def _update(self, block: Block, decay: float) -> None:
        """Update a block whose weights are multiplied by `decay` before."""
        xp, grad, (mean, square), (a, b) = block.xp, block.grad, block.slots, block.work
        b1, b2 = block.options["betas"]
        # Both bias corrections combined, which saves two passes over memory.
        root = (1 - b2**self.steps) ** 0.5
        eps, factor = block.options["eps"] * root, block.lr * root / (1 - b1**self.steps)
        passes = backends.get(grad).passes(block.weight, grad, mean, square)
        if passes is not None:
            # A subclass may change the weight once more before it is clipped.
            block.clipped = type(self) in (Adam, AdamW)
            passes.adam(
                block.weight, grad, mean, square, decay=decay, rates=(1 - b1, 1 - b2), eps=eps,
                factor=factor, limit=block.limit if block.clipped else None,
            )  # fmt: skip
            return
        if decay != 1:
            block.weight *= decay
        xp.subtract(grad, mean, out=a)
        a *= 1 - b1
        mean += a
        xp.multiply(grad, grad, out=a)
        a -= square
        a *= 1 - b2
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

    def update(self, block: Block) -> None:
        self._update(block, 1 - block.lr * block.options["weight_decay"])

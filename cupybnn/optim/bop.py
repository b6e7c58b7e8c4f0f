"""Bop, the binary optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

from cupybnn.backends.devices import device_of
from cupybnn.optim.optimizer import Block, Optimizer, Rules
from cupybnn.packed import sign

__all__ = ["Bop"]


class Bop(Optimizer):
    """Flip binary weights directly, without latent weights.

    The weights are set to their signs at the start and stay +1 and -1. A weight flips when the
    running mean of its gradient has the same sign (so that a flip lowers the loss) and is large
    enough. Use another optimizer for full-precision parameters, such as those of batch norm.

    Parameters
    ----------
    parameters, **common
        As in `Optimizer`.
    lr : float
        The adaptivity rate, gamma in the paper: the share of the newest gradient in the mean, in
        [0, 1]. Lower it with a schedule.
    threshold : float
        Minimum magnitude of the mean; at least 0.

    Notes
    -----
    Helwegen et al.: Latent weights do not exist, NeurIPS 2019, algorithm 1::

        mean   = (1 - lr) * mean + lr * grad
        weight = -weight where mean * weight > threshold

    Examples
    --------
    >>> from cupybnn import Tensor, nn, optim
    >>> weight = nn.Parameter([1.0, 1.0])
    >>> optimizer = optim.Bop([weight], lr=0.5, threshold=0.1)
    >>> (weight * Tensor([1.0, -1.0])).sum().backward()
    >>> optimizer.step()
    >>> weight.data.tolist()
    [-1.0, 1.0]
    """

    slots = ("mean",)
    rules: ClassVar[Rules] = {
        **Optimizer.rules,
        "lr": ("a number in [0, 1]", lambda lr: 0 <= lr <= 1),
        "threshold": ("a finite number >= 0", lambda threshold: 0 <= threshold < math.inf),
    }

    def __init__(
        self, parameters: Iterable[Any], lr: float = 1e-4, threshold: float = 1e-8, **common: Any
    ) -> None:
        super().__init__(parameters, lr, threshold=threshold, **common)
        for group in self.groups:
            for parameter in group["params"]:
                weight = parameter.write()
                with device_of(weight).scope():
                    weight[...] = sign(weight)

    def update(self, block: Block) -> None:
        xp, (mean,), (a, b) = block.xp, block.slots, block.work
        xp.subtract(block.grad, mean, out=a)
        a *= block.lr
        mean += a
        xp.multiply(mean, block.weight, out=a)
        xp.greater(a, block.options["threshold"], out=b)
        b *= -2
        b += 1
        block.weight *= b

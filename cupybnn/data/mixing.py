"""Mixing the images of a batch in pairs, and their labels alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cupybnn.autograd.storage import module_of
from cupybnn.backends.random import uniform

__all__ = ["Mixing"]


@dataclass(frozen=True)
class Mixing:
    """Add to each image a share of the next one in the batch: ``(1 - s) * image + s * next``.

    The share s is uniform in [0, 1/2): greater ones would give the same pairs the other way round.
    The image after the last is the first.

    Attributes
    ----------
    kind : {"none", "some", "uniform"}
        Which images are mixed: none; each with probability 1/2; all.

    Notes
    -----
    Zhang, Cisse, Dauphin, Lopez-Paz: mixup: beyond empirical risk minimization, ICLR 2018. The
    order of a batch is random, and so is which image comes next.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn.data import Mixing
    >>> shares = Mixing("uniform").shares(1000, seed=1, number=0, xp=np)
    >>> bool((shares >= 0).all() and (shares < 0.5).all())
    True
    """

    kind: str = "none"

    def __bool__(self) -> bool:
        return self.kind != "none"

    def shares(self, batch: int, seed: int, number: int, xp: Any) -> Any:
        """Return the share of the next image in each: float32, shape (batch, 1).

        Parameters
        ----------
        batch : int
        seed : int
            From 0 to 2**64 - 1.
        number : int
            Number of the batch: the same `seed` and `number` always give the same shares.
        xp : module
            numpy or cupy.
        """
        # Two numbers per image; each has a fixed use.
        draw = uniform((batch, 2), seed, number, xp)
        shares = draw[:, :1] * np.float32(0.5)
        if self.kind == "some":
            shares = xp.where(draw[:, 1:] < np.float32(0.5), shares, np.float32(0))
        return shares

    @staticmethod
    def mix(x: Any, shares: Any, following: Any = None) -> Any:
        """Return rows of `x`, shape (batch, n), mixed by `shares`; of the dtype of `x`.

        With `following`, shape (1, n), `x` is a part of a batch and that is the row after its last.
        """
        xp, shares = module_of(x), shares.astype(x.dtype)
        following = x[:1] if following is None else following
        return x + shares * (xp.concatenate([x[1:], following]) - x)

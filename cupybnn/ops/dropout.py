"""Dropout of numbers and of signs."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupybnn.autograd import Context, Function, Tensor
from cupybnn.backends.random import bernoulli, random_words

__all__ = ["dropout", "sign_dropout"]


class Dropout(Function):
    """x times a random mask of 0 and 1/keep_prob."""

    @staticmethod
    def forward(ctx: Context, x: Any, keep_prob: float, seed: int, counter: Any) -> Any:
        words = random_words(x.shape, seed, counter, ctx.xp)
        factors = bernoulli(words, keep_prob).astype(x.dtype)
        factors *= 1 / keep_prob
        ctx.save(factors)
        return x * factors

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        (factors,) = ctx.saved
        return grad * factors


class SignDropout(Function):
    """Replace random signs by coin tosses; the kept ones pass the gradient."""

    @staticmethod
    def forward(ctx: Context, x: Any, keep_prob: float, seed: int, counter: Any) -> Any:
        words = random_words(x.shape, seed, counter, ctx.xp)
        kept = bernoulli(words, keep_prob)
        ctx.save(kept)
        coins = (words & np.uint32(1)).astype(x.dtype)
        coins += coins
        coins -= 1
        return coins + kept * (x - coins)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        (kept,) = ctx.saved
        return grad * kept


def _checked(keep_prob: float, op: str) -> None:
    if not 0 < keep_prob <= 1:
        raise ValueError(f"The 'keep_prob' of {op} must be in (0, 1]; got {keep_prob!r}.")


def dropout(x: Tensor, keep_prob: float, *, seed: int, counter: Any) -> Tensor:
    """Set random elements to 0 and divide the others by `keep_prob`.

    The result is no longer two-valued. Before a sign, a 0 becomes +1; to drop signs, see
    `sign_dropout`.

    Parameters
    ----------
    x : Tensor
        Any shape.
    keep_prob : float
        Probability of keeping an element, in (0, 1].
    seed, counter : int
        Select the elements: the same pair drops the same ones, on NumPy and CuPy.

    Notes
    -----
    Srivastava et al.: Dropout, JMLR 2014, in the form that needs no scaling at test time.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import ops
    >>> from cupybnn.autograd import Tensor
    >>> x = Tensor(np.ones(1000))
    >>> y = ops.dropout(x, 0.8, seed=0, counter=0).numpy()
    >>> sorted(set(y.tolist()))
    [0.0, 1.25]
    """
    _checked(keep_prob, "dropout")
    return Dropout.apply(x, keep_prob=keep_prob, seed=seed, counter=counter)


def sign_dropout(x: Tensor, keep_prob: float, *, seed: int, counter: Any) -> Tensor:
    """Replace random signs by coin tosses: dropout that keeps the values +1 and -1.

    Like a dropped element, a replaced sign carries no information and gets no gradient; but sums
    over it remain sums of signs, which they would not with a 0. The mean of the result is
    ``keep_prob`` times the sign: a batch norm after the next product absorbs that factor.

    Parameters
    ----------
    x : Tensor
        Signs.
    keep_prob : float
        Probability of keeping a sign, in (0, 1].
    seed, counter : int
        Select the signs: the same pair gives the same result, on NumPy and CuPy.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import ops
    >>> from cupybnn.autograd import Tensor
    >>> x = ops.sign(Tensor(np.ones(1000)))
    >>> y = ops.sign_dropout(x, 0.8, seed=0, counter=0).numpy()
    >>> sorted(set(y.tolist()))
    [-1.0, 1.0]
    """
    _checked(keep_prob, "sign_dropout")
    if not x.two_valued:
        raise ValueError(
            f"The 'x' of sign_dropout must be known to hold only +1 and -1; got a tensor of shape "
            f"{x.shape} that may hold other values. Take its sign first, or use dropout."
        )
    result = SignDropout.apply(x, keep_prob=keep_prob, seed=seed, counter=counter)
    result.two_valued = True
    return result

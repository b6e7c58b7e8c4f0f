"""Folding of a batch norm and a sign into a threshold per column."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupybnn.backends.devices import array_module

__all__ = ["fold_batch_norm"]

# float32 holds every integer up to this limit, so the formula below gets the exact product.
LIMIT = 1 << 24


def fold_batch_norm(
    mean: Any, var: Any, gamma: Any, beta: Any, eps: float = 1e-4
) -> tuple[Any, Any]:
    """Fold a batch norm followed by a sign into a threshold and a flip for each column.

    For every integer s from -2**24 to 2**24, ``(s >= threshold) != flip`` is exactly
    ``y >= 0`` of ``y = s * scale + (beta - mean * scale)`` with
    ``scale = gamma * (1 / sqrt(var + eps))``, computed in float32, each step rounded, as
    `cupybnn.ops.batch_norm` does in evaluation. Each step is monotone even when rounded, so y
    changes sign at one integer at most, which is found by bisection on the formula itself. For
    gamma > 0 a column is +1 from its threshold on; for gamma < 0 it is +1 below it, and flip is
    set; for gamma = 0 it is the sign of beta everywhere. (Idea: Umuroglu et al., FINN, 2017,
    https://arxiv.org/abs/1612.07119, section 4.2.2.)

    Parameters
    ----------
    mean, var, gamma, beta : array, shape (N,)
        Running mean and variance, scale and shift; used as float32. NumPy or CuPy.
    eps : float
        Added to the variance.

    Returns
    -------
    threshold : ndarray of int32, shape (N,)
    flip : ndarray of bool, shape (N,)
        On the device of the arguments, ready for `cupybnn.xnor_gemm_packed`.

    Raises
    ------
    ValueError
        If the arguments are not vectors of one length.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybnn
    >>> mean, variance = np.array([0.5, -3.0]), np.array([1.0, 4.0])
    >>> gamma, beta = np.array([1.0, -1.0]), np.array([0.0, 0.0])
    >>> threshold, flip = cupybnn.fold_batch_norm(mean, variance, gamma, beta, 0.0)
    >>> print(threshold, flip)
    [ 1 -2] [False  True]
    """
    xp = array_module(mean, var, gamma, beta)
    # Overflow gives infinity, a variance of 0 without eps divides by 0, and NaN is -1. As on a GPU,
    # none of these warns or raises.
    with np.errstate(all="ignore"):
        arrays = [xp.asarray(x, np.float32) for x in (mean, var, gamma, beta)]
        return _fold(xp, arrays, np.float32(eps))


def _fold(xp: Any, arrays: list[Any], eps: np.float32) -> tuple[Any, Any]:
    mean, var, gamma, beta = arrays
    shapes = [x.shape for x in arrays]
    if mean.ndim != 1 or len(set(shapes)) != 1:
        raise ValueError(
            "The 'mean', 'var', 'gamma' and 'beta' of fold_batch_norm must be vectors of one "
            f"length; got shapes {', '.join(map(str, shapes))}."
        )
    scale = gamma * (1 / xp.sqrt(var + eps))
    shift = beta - mean * scale

    def is_plus(s: Any) -> Any:
        return s.astype(np.float32) * scale + shift >= 0

    low = xp.full(mean.shape, -LIMIT, np.int32)
    high = xp.full(mean.shape, LIMIT, np.int32)
    first, last = is_plus(low), is_plus(high)
    # If the sign changes, it does so in (low, high]; bisect until one integer is left.
    for _ in range((2 * LIMIT).bit_length()):
        middle = (low + high) >> 1
        as_first = is_plus(middle) == first
        low = xp.where(as_first, middle, low)
        high = xp.where(as_first, high, middle)
    never_changes = first == last
    threshold = xp.where(never_changes, np.iinfo(np.int32).min, high).astype(np.int32)
    return threshold, ~last

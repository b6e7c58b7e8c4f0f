"""Quantized gradients: levels of a few bits, for products by bit planes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupybnn import backends
from cupybnn.autograd import Context
from cupybnn.backends.devices import device_of
from cupybnn.backends.interop import type_name
from cupybnn.backends.levels import MOST_BITS, levels_of
from cupybnn.backends.random import Stream, first_row, from_row
from cupybnn.gemm import xnor_gemm
from cupybnn.operands import is_floating
from cupybnn.packed import PackedMatrix

__all__ = [
    "GradientLevels",
    "GradientQuantizer",
    "greatest_of_batch",
    "quantize_gradient",
    "quantized_gradients",
]

#: Within `greatest_of_batch`: the function that compares all parts of a batch.
_greatest: ContextVar[Callable[[Any], Any] | None] = ContextVar("greatest", default=None)


@contextlib.contextmanager
def greatest_of_batch(greatest: Callable[[Any], Any]) -> Iterator[None]:
    """Context in which a column's scale is that of a batch of which the gradient is a part.

    Parameters
    ----------
    greatest : callable
        Returns the greatest of an array's elements over all parts of the batch, at each place: each
        part's process calls it in turn. Of real numbers or, on a GPU, their bits as int32.
    """
    token = _greatest.set(greatest)
    try:
        yield
    finally:
        _greatest.reset(token)


@dataclass(frozen=True)
class GradientLevels:
    """A quantized gradient, for both products of a backward pass; see `quantize_gradient`.

    Attributes
    ----------
    rows : PackedMatrix, shape (M, N), packed along axis -1
        ``rows.unpack() * row_scale`` are the gradient, rounded by the scale of each row.
    row_scale : array of float32, shape (M, 1)
    columns : PackedMatrix, shape (M, N), packed along axis -2
        ``columns.unpack() * column_scale`` likewise, by the scale of each column.
    column_scale : array of float32, shape (N,)

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import ops
    >>> grad = np.array([[2.0, -2.0], [4.0, 4.0]])
    >>> levels = ops.quantize_gradient(grad, bits=1, seed=0, counter=0)
    >>> (levels.rows.unpack() * levels.row_scale).tolist()
    [[2.0, -2.0], [4.0, 4.0]]
    >>> levels.column_scale.tolist()
    [4.0, 4.0]
    """

    rows: PackedMatrix
    row_scale: Any
    columns: PackedMatrix
    column_scale: Any


def quantize_gradient(grad: Any, bits: int, seed: int, counter: int) -> GradientLevels:
    """Round a gradient at random to levels of a few bits, with a scale for each row or column.

    Parameters
    ----------
    grad : array, shape (M, N)
        Real floating, NumPy or CuPy. Used as float32.
    bits : int
        Bits of a level, from 1 to 8.
    seed, counter : int
        Of the random numbers; see `GradientQuantizer`, which counts.

    Returns
    -------
    GradientLevels

    Raises
    ------
    TypeError
        If `grad` is not real floating.
    ValueError
        If it is not a matrix, or `bits` is out of range.

    Notes
    -----
    With ``n = 2**bits - 1`` and m the greatest magnitude of an element's row (or column), the level
    of an element g is ``q = 2 u - n``, where

    ``u = floor(g * ((n / 2) / m) + (n / 2 + r))``, at least 0 and at most n,

    with r random, a multiple of ``2**-16`` in [0, 1), and its value is ``q * (m / n)``. So its
    expectation is g, up to ``2**-16`` of a level. Each operation is rounded to float32, except
    ``n / 2 + r``, which is exact, and denormal numbers count as 0. Where ``(n / 2) / m`` is not
    finite, 0 replaces it. A NaN makes the scale of its row and of its column NaN.

    This is the quantizer of gradients of DoReFa-Net (Zhou et al., arXiv 1606.06160), with a scale
    for each row or column instead of each example. With one bit q is +1 with probability
    ``(1 + g / m) / 2``, else -1: errors are then vectors of signs, as in binary error propagation
    (Colombo et al., arXiv 2512.04189), which takes the sign itself, without a scale or chance.

    An element has the same r in `rows` and in `columns`.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import ops
    >>> grad = np.array([[0.5, -1.0], [3.0, 1.0]], np.float32)
    >>> levels = ops.quantize_gradient(grad, bits=2, seed=0, counter=0)
    >>> levels.row_scale.tolist()
    [[0.3333333432674408], [1.0]]
    >>> levels.rows.unpack().tolist()
    [[3, -3], [3, 1]]
    """
    device = device_of(grad) if hasattr(grad, "dtype") else None
    if device is None or not is_floating(grad.dtype):
        shown = type_name(grad) if device is None else f"dtype {grad.dtype}"
        raise TypeError(
            f"The 'grad' of quantize_gradient must be an array of real floating numbers; "
            f"got {shown}."
        )
    if grad.ndim != 2:
        raise ValueError(
            f"The 'grad' of quantize_gradient must be a matrix; got shape {grad.shape}."
        )
    levels = levels_of(_checked_bits(bits, "quantize_gradient"), True)
    with device.scope():
        by_row, by_col = backends.get(device).quantize_gradient(
            grad, levels, seed, counter, first_row(), _greatest.get()
        )
    rows, columns = (
        PackedMatrix._of(words, sums, grad.shape, axis, device, levels)
        for (words, sums, _), axis in ((by_row, -1), (by_col, -2))
    )
    return GradientLevels(rows, by_row[2][:, None], columns, by_col[2])


def _checked_bits(bits: Any, function: str) -> int:
    if isinstance(bits, (bool, np.bool_)) or not isinstance(bits, (int, np.integer)):
        raise TypeError(f"The 'bits' of {function} must be an integer; got {bits!r}.")
    if not 1 <= bits <= MOST_BITS:
        raise ValueError(f"The 'bits' of {function} must be from 1 to {MOST_BITS}; got {bits}.")
    return int(bits)


class GradientQuantizer:
    """`quantize_gradient` with the next random numbers of a stream at each call.

    Parameters
    ----------
    bits : int
        From 1 to 8.
    seed : int
        Of the stream, from 0 to ``2**64 - 1``.

    Attributes
    ----------
    random : Stream
        Seed and counter.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import ops
    >>> quantizer = ops.GradientQuantizer(4, seed=1)
    >>> quantizer(np.ones((2, 3), np.float32)).rows.unpack().tolist()
    [[15, 15, 15], [15, 15, 15]]
    >>> int(quantizer.random.state[1])
    1
    """

    def __init__(self, bits: int, seed: int = 0) -> None:
        self.bits = _checked_bits(bits, "GradientQuantizer")
        self.random = Stream(seed)

    def __call__(self, grad: Any) -> GradientLevels:
        seed, counter = self.random.next()
        return quantize_gradient(grad, self.bits, seed, counter)

    def __repr__(self) -> str:
        return f"GradientQuantizer(bits={self.bits})"


def quantized_gradients(
    ctx: Context, quantizer: GradientQuantizer, grad: Any, a: Any, b: Any
) -> tuple[Any, Any]:
    """Return the gradients of the factors of ``a @ b``, both of signs, from a quantized `grad`.

    Parameters
    ----------
    ctx : Context
        Its `needs` are those of a and b.
    quantizer : GradientQuantizer
    grad : array, shape (..., M, N)
    a : array, shape (..., M, K)
    b : array, shape (K, N)
    """
    rows, inputs = grad.reshape(-1, grad.shape[-1]), a.reshape(-1, a.shape[-1])
    # An image may have several rows.
    with from_row(first_row() * math.prod(grad.shape[1:-1])):
        levels = quantizer(rows)
    grad_a = grad_b = None
    if ctx.needs[0]:
        scale = (levels.row_scale, None)
        grad_a = xnor_gemm(levels.rows, b.T, scale=scale, dtype=grad.dtype).reshape(a.shape)
    if ctx.needs[1]:
        grad_b = xnor_gemm(inputs.T, levels.columns, scale=levels.column_scale, dtype=grad.dtype)
    return grad_a, grad_b

"""Sums, means, maxima and minima over axes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cupybnn.autograd import Context, Function, Tensor
from cupybnn.autograd.precision import narrowed, sum_dtype, wide_sum, widened
from cupybnn.ops.axes import Axis, as_axes

__all__ = ["max", "mean", "min", "sum"]


def _keepdims_shape(shape: tuple[int, ...], axis: Axis) -> tuple[int, ...]:
    """Return `shape` with the reduced axes at length 1."""
    axes = range(len(shape)) if axis is None else (axis,) if isinstance(axis, int) else axis
    reduced = {a % len(shape) for a in axes} if shape else set()
    return tuple(1 if i in reduced else n for i, n in enumerate(shape))


class Sum(Function):
    """Sum over axes."""

    @staticmethod
    def forward(ctx: Context, x: Any, axis: Axis, keepdims: bool) -> Any:
        ctx.kept = _keepdims_shape(x.shape, axis)
        return narrowed(wide_sum(x, axis, keepdims), x)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        return ctx.xp.broadcast_to(grad.reshape(ctx.kept), ctx.edges[0].shape)


class Mean(Function):
    """Mean over axes."""

    @staticmethod
    def forward(ctx: Context, x: Any, axis: Axis, keepdims: bool) -> Any:
        ctx.kept = _keepdims_shape(x.shape, axis)
        if x.size == 0:  # NaN, as from `numpy.mean`, but without its warning
            ctx.count = 0
            return x.sum(axis=axis, keepdims=keepdims) * np.nan
        ctx.count = x.size // math.prod(ctx.kept)
        return narrowed(x.mean(axis=axis, keepdims=keepdims, dtype=sum_dtype(x)), x)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        shares = narrowed(widened(grad) / ctx.count, grad).reshape(ctx.kept)
        return ctx.xp.broadcast_to(shares, ctx.edges[0].shape)


def _save_extreme(ctx: Context, x: Any, out: Any, axis: Axis) -> Any:
    """Save operand and result for the backward pass, and return the result."""
    ctx.axis, ctx.kept = axis, _keepdims_shape(x.shape, axis)
    ctx.save(x, out)
    return out


def _extreme_gradient(ctx: Context, grad: Any) -> Any:
    """Split `grad` evenly among the elements that equal the extreme."""
    x, out = ctx.saved
    chosen = x == out.reshape(ctx.kept)
    shares = chosen / chosen.sum(axis=ctx.axis, keepdims=True)
    return (shares * grad.reshape(ctx.kept)).astype(grad.dtype, copy=False)


class Max(Function):
    """Largest element over axes; ties share the gradient."""

    @staticmethod
    def forward(ctx: Context, x: Any, axis: Axis, keepdims: bool) -> Any:
        return _save_extreme(ctx, x, x.max(axis=axis, keepdims=keepdims), axis)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        return _extreme_gradient(ctx, grad)


class Min(Function):
    """Smallest element over axes; ties share the gradient."""

    @staticmethod
    def forward(ctx: Context, x: Any, axis: Axis, keepdims: bool) -> Any:
        return _save_extreme(ctx, x, x.min(axis=axis, keepdims=keepdims), axis)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        return _extreme_gradient(ctx, grad)


def sum(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Return the sum over `axis` (all axes by default), in the dtype of `x`.

    Examples
    --------
    >>> from cupybnn import Tensor, ops
    >>> ops.sum(Tensor([[1.0, 2.0], [3.0, 4.0]]), axis=0).data.tolist()
    [4.0, 6.0]
    """
    return Sum.apply(x, axis=as_axes(axis, "sum"), keepdims=keepdims)


def mean(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Return the mean over `axis` (all axes by default).

    Examples
    --------
    >>> from cupybnn import Tensor, ops
    >>> ops.mean(Tensor([[1.0, 2.0], [3.0, 4.0]]), axis=1).data.tolist()
    [1.5, 3.5]
    """
    return Mean.apply(x, axis=as_axes(axis, "mean"), keepdims=keepdims)


def max(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Return the largest element over `axis`; ties share the gradient equally.

    Examples
    --------
    >>> from cupybnn import Tensor, ops
    >>> ops.max(Tensor([[1.0, 2.0], [3.0, 0.0]]), axis=1).data.tolist()
    [2.0, 3.0]
    """
    return Max.apply(x, axis=as_axes(axis, "max"), keepdims=keepdims)


def min(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Return the smallest element over `axis`; ties share the gradient equally.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import ops
    >>> from cupybnn.autograd import Tensor
    >>> x = Tensor(np.array([[1.0, 2.0], [3.0, 6.0]]))
    >>> ops.min(x, axis=0).numpy()
    array([1., 2.])
    """
    return Min.apply(x, axis=as_axes(axis, "min"), keepdims=keepdims)

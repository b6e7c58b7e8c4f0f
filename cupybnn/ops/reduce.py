"""Sums, means and extremes over axes."""

from __future__ import annotations

import math
from typing import Any

from cupybnn.autograd import Context, Function, Tensor

__all__ = ["max", "mean", "min", "sum"]

Axis = int | tuple[int, ...] | None


def _kept(shape: tuple[int, ...], axis: Axis) -> tuple[int, ...]:
    """Return `shape` with the reduced axes at length 1."""
    axes = range(len(shape)) if axis is None else (axis,) if isinstance(axis, int) else axis
    reduced = {a % len(shape) for a in axes} if shape else set()
    return tuple(1 if i in reduced else n for i, n in enumerate(shape))


class Sum(Function):
    """Sum over axes."""

    @staticmethod
    def forward(ctx: Context, x: Any, axis: Axis, keepdims: bool) -> Any:
        ctx.kept = _kept(x.shape, axis)
        return x.sum(axis=axis, keepdims=keepdims)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        return ctx.xp.broadcast_to(grad.reshape(ctx.kept), ctx.edges[0].shape)


class Mean(Function):
    """Mean over axes."""

    @staticmethod
    def forward(ctx: Context, x: Any, axis: Axis, keepdims: bool) -> Any:
        ctx.kept = _kept(x.shape, axis)
        ctx.count = math.prod(x.shape) // math.prod(ctx.kept) if x.size else 0
        return x.mean(axis=axis, keepdims=keepdims)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        shares = (grad / ctx.count).reshape(ctx.kept)
        return ctx.xp.broadcast_to(shares, ctx.edges[0].shape)


def _keep_extreme(ctx: Context, x: Any, out: Any, axis: Axis) -> Any:
    """Keep for the backward pass what an extreme is of, and return the extreme."""
    ctx.axis, ctx.kept = axis, _kept(x.shape, axis)
    ctx.save(x, out)
    return out


def _extreme_gradient(ctx: Context, grad: Any) -> Any:
    """Share `grad` among the elements that equal the extreme."""
    x, out = ctx.saved
    chosen = x == out.reshape(ctx.kept)
    shares = chosen / chosen.sum(axis=ctx.axis, keepdims=True)
    return shares.astype(grad.dtype) * grad.reshape(ctx.kept)


class Max(Function):
    """Greatest element over axes; equal ones share the gradient."""

    @staticmethod
    def forward(ctx: Context, x: Any, axis: Axis, keepdims: bool) -> Any:
        return _keep_extreme(ctx, x, x.max(axis=axis, keepdims=keepdims), axis)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        return _extreme_gradient(ctx, grad)


class Min(Function):
    """Least element over axes; equal ones share the gradient."""

    @staticmethod
    def forward(ctx: Context, x: Any, axis: Axis, keepdims: bool) -> Any:
        return _keep_extreme(ctx, x, x.min(axis=axis, keepdims=keepdims), axis)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        return _extreme_gradient(ctx, grad)


def sum(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Return the sum over `axis` (all axes by default), in the dtype of `x`."""
    return Sum.apply(x, axis=axis, keepdims=keepdims)


def mean(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Return the mean over `axis` (all axes by default)."""
    return Mean.apply(x, axis=axis, keepdims=keepdims)


def max(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Return the greatest element over `axis`; equal ones share the gradient equally."""
    return Max.apply(x, axis=axis, keepdims=keepdims)


def min(x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """Return the least element over `axis`; equal ones share the gradient equally."""
    return Min.apply(x, axis=axis, keepdims=keepdims)

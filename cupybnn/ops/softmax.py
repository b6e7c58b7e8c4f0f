"""Softmax, log-softmax and sigmoid."""

from __future__ import annotations

from typing import Any

from cupybnn.autograd import Context, Function, Tensor
from cupybnn.autograd.precision import narrowed, wide_sum, widened
from cupybnn.ops.axes import as_axis

__all__ = ["log_softmax", "sigmoid", "softmax"]


class Softmax(Function):
    """exp(x) / sum(exp(x)) along an axis."""

    @staticmethod
    def forward(ctx: Context, x: Any, axis: int) -> Any:
        wide = widened(x)
        out = ctx.xp.exp(wide - wide.max(axis=axis, keepdims=True))
        out /= out.sum(axis=axis, keepdims=True)
        ctx.axis = axis
        ctx.save(out)
        return narrowed(out, x)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        (out,) = ctx.saved
        weighted = widened(grad) * out
        weighted -= out * weighted.sum(axis=ctx.axis, keepdims=True)
        return narrowed(weighted, grad)


class LogSoftmax(Function):
    """x - log(sum(exp(x))) along an axis."""

    @staticmethod
    def forward(ctx: Context, x: Any, axis: int) -> Any:
        xp, wide = ctx.xp, widened(x)
        shifted = wide - wide.max(axis=axis, keepdims=True)
        out = shifted - xp.log(xp.exp(shifted).sum(axis=axis, keepdims=True))
        ctx.axis = axis
        ctx.save(out)
        return narrowed(out, x)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        (out,) = ctx.saved
        shares = ctx.xp.exp(out) * wide_sum(grad, ctx.axis, keepdims=True)
        return narrowed(grad - shares, grad)


class Sigmoid(Function):
    """1 / (1 + exp(-x))."""

    @staticmethod
    def forward(ctx: Context, x: Any) -> Any:
        # exp(-|x|) cannot overflow; `upper` is the sigmoid of |x|.
        small = ctx.xp.exp(-abs(x))
        upper = 1 / (1 + small)
        ctx.save(small, upper)
        return ctx.xp.where(x >= 0, upper, small * upper)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        small, upper = ctx.saved
        return grad * (small * upper * upper)


def softmax(x: Tensor, axis: int = -1) -> Tensor:
    """Return ``exp(x) / sum(exp(x))`` along `axis`.

    Parameters
    ----------
    x : Tensor, at least one axis
        Floating. An element of -inf gets probability 0; if all along `axis` are -inf, the
        result is NaN.
    axis : int
        Axis of the classes.

    Returns
    -------
    Tensor
        Of the shape and dtype of `x`.

    Examples
    --------
    >>> from cupybnn import Tensor, ops
    >>> ops.softmax(Tensor([[0.0, 0.0, float("-inf")]])).data
    array([[0.5, 0.5, 0. ]], dtype=float32)
    """
    return Softmax.apply(x, axis=as_axis(axis, "softmax"))


def log_softmax(x: Tensor, axis: int = -1) -> Tensor:
    """Return ``x - log(sum(exp(x)))`` along `axis`, exact where `softmax` would round to 0.

    Parameters
    ----------
    x : Tensor, at least one axis
        Floating.
    axis : int
        Axis of the classes.

    Returns
    -------
    Tensor
        Of the shape and dtype of `x`.

    Examples
    --------
    >>> from cupybnn import Tensor, ops
    >>> ops.log_softmax(Tensor([0.0, 1000.0])).data
    array([-1000.,     0.], dtype=float32)
    """
    return LogSoftmax.apply(x, axis=as_axis(axis, "log_softmax"))


def sigmoid(x: Tensor) -> Tensor:
    """Return ``1 / (1 + exp(-x))``, without overflow for any x.

    Parameters
    ----------
    x : Tensor, any shape
        Floating.

    Examples
    --------
    >>> from cupybnn import Tensor, ops
    >>> ops.sigmoid(Tensor([-1000.0, 0.0, 1000.0])).data
    array([0. , 0.5, 1. ], dtype=float32)
    """
    return Sigmoid.apply(x)

"""Penalties on weights, each with a hand-derived gradient."""

from __future__ import annotations

from typing import Any

from cupybnn.autograd import Context, Function, Tensor
from cupybnn.autograd.precision import narrowed, wide_sum, widened

__all__ = ["bipolar_penalty", "l1", "l2"]


class L1(Function):
    """sum(|x|)."""

    @staticmethod
    def forward(ctx: Context, x: Any) -> Any:
        ctx.save(x)
        return narrowed(wide_sum(abs(x)), x)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        (x,) = ctx.saved
        out = ctx.xp.sign(x)
        out *= grad
        return out


class L2(Function):
    """sum(x**2) / 2."""

    @staticmethod
    def forward(ctx: Context, x: Any) -> Any:
        ctx.save(x)
        wide = widened(x)
        return narrowed((wide * wide).sum() / 2, x)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        (x,) = ctx.saved
        return x * grad


class BipolarPenalty(Function):
    """sum(1 - x**2)."""

    @staticmethod
    def forward(ctx: Context, x: Any) -> Any:
        ctx.save(x)
        wide = widened(x)
        return narrowed(x.size - (wide * wide).sum(), x)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        (x,) = ctx.saved
        return x * (-2 * grad)


def l1(x: Tensor) -> Tensor:
    """Return ``sum(|x|)``, shape (). The gradient at 0 is 0.

    Examples
    --------
    >>> from cupybnn import Tensor, ops
    >>> ops.l1(Tensor([-1.0, 2.0])).item()
    3.0
    """
    return L1.apply(x)


def l2(x: Tensor) -> Tensor:
    """Return ``sum(x**2) / 2``, shape (); its gradient is x.

    Examples
    --------
    >>> from cupybnn import Tensor, ops
    >>> ops.l2(Tensor([-1.0, 2.0])).item()
    2.5
    """
    return L2.apply(x)


def bipolar_penalty(x: Tensor) -> Tensor:
    """Return ``sum(1 - x**2)``, shape (), which pulls latent weights in [-1, 1] to -1 and +1.

    Outside that interval it decreases without bound: clip the latent weights to it.

    Notes
    -----
    Tang, Hua, Wang: How to train a compact binary neural network with high accuracy? AAAI 2017.

    Examples
    --------
    >>> from cupybnn import Tensor, ops
    >>> ops.bipolar_penalty(Tensor([1.0, 0.5])).item()
    0.75
    """
    return BipolarPenalty.apply(x)

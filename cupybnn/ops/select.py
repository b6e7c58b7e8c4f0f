"""Elementwise choice between two operands, with broadcasting."""

from __future__ import annotations

from typing import Any

from cupybnn.autograd import Context, Function, Tensor, tensor_or_number
from cupybnn.backends.devices import CPU, Device

__all__ = ["maximum", "minimum", "where"]


class Where(Function):
    """a where a condition holds, else b."""

    @staticmethod
    def forward(ctx: Context, condition: Any, a: Any, b: Any) -> Any:
        ctx.save(condition)
        return ctx.xp.where(condition, a, b)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        (condition,) = ctx.saved
        # Not a product with the condition: 0 times NaN or inf would be NaN.
        zero = grad.dtype.type(0)
        return (
            None,
            ctx.fit(ctx.xp.where(condition, grad, zero), 1) if ctx.needs[1] else None,
            ctx.fit(ctx.xp.where(condition, zero, grad), 2) if ctx.needs[2] else None,
        )


def _save_extreme(ctx: Context, a: Any, b: Any, out: Any) -> Any:
    """Save operands and result for the backward pass, and return the result."""
    ctx.save(a, b, out)
    return out


def _extreme_gradient(ctx: Context, grad: Any) -> tuple[Any, Any]:
    """Pass `grad` to the operand that equals the result, half to each in a tie."""
    a, b, out = ctx.saved
    zero, half = grad.dtype.type(0), grad.dtype.type(0.5)
    shared = ctx.xp.where(a == b, grad * half, grad)
    return (
        ctx.fit(ctx.xp.where(a == out, shared, zero), 0) if ctx.needs[0] else None,
        ctx.fit(ctx.xp.where(b == out, shared, zero), 1) if ctx.needs[1] else None,
    )


class Maximum(Function):
    """The larger of a and b; a tie splits the gradient."""

    @staticmethod
    def forward(ctx: Context, a: Any, b: Any) -> Any:
        return _save_extreme(ctx, a, b, ctx.xp.maximum(a, b))

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        return _extreme_gradient(ctx, grad)


class Minimum(Function):
    """The smaller of a and b; a tie splits the gradient."""

    @staticmethod
    def forward(ctx: Context, a: Any, b: Any) -> Any:
        return _save_extreme(ctx, a, b, ctx.xp.minimum(a, b))

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        return _extreme_gradient(ctx, grad)


def _as_operands(a: Any, b: Any, op: str, device: Device = CPU) -> tuple[Any, Any]:
    """Convert two operands; if both are numbers, make the first a tensor on `device`."""
    a, b = tensor_or_number(a, op), tensor_or_number(b, op)
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a, b
    return Tensor(a).to(device), b


def where(condition: Any, a: Any, b: Any) -> Tensor:
    """Return `a` where `condition` holds and `b` elsewhere, with broadcasting.

    Parameters
    ----------
    condition : Tensor or array of bool
        On the device of `a` and `b`, e.g. a comparison of tensors. It has no gradient.
    a, b : Tensor, array or number
        The gradient reaches each only where it was chosen.

    Returns
    -------
    Tensor

    Raises
    ------
    TypeError
        If the condition is not bool.

    Examples
    --------
    >>> from cupybnn import Tensor, ops
    >>> x = Tensor([-2.0, 3.0], requires_grad=True)
    >>> leaky = ops.where(x > 0, x, 0.5 * x)
    >>> leaky.data
    array([-1.,  3.], dtype=float32)
    >>> leaky.sum().backward()
    >>> x.grad
    array([0.5, 1. ], dtype=float32)
    """
    chosen = condition if isinstance(condition, Tensor) else Tensor(condition)
    if chosen.dtype != bool:
        raise TypeError(
            f"The 'condition' of where must be bool; got dtype {chosen.dtype}. Compare first: "
            f"where(x != 0, a, b)."
        )
    return Where.apply(chosen, *_as_operands(a, b, "where", chosen.device))


def maximum(a: Any, b: Any) -> Tensor:
    """Return the elementwise maximum of `a` and `b`; NaN if one is NaN.

    Parameters
    ----------
    a, b : Tensor, array or number
        Of shapes that broadcast.

    Returns
    -------
    Tensor

    Notes
    -----
    The gradient goes to the larger operand, and half of it to each in a tie, as in `max`. (`relu`
    differs from ``maximum(x, 0)`` there: its gradient at 0 is 0.) Where one is NaN, neither gets a
    gradient.

    Examples
    --------
    >>> from cupybnn import Tensor, ops
    >>> ops.maximum(Tensor([1.0, 5.0]), 2.0).data
    array([2., 5.], dtype=float32)
    """
    return Maximum.apply(*_as_operands(a, b, "maximum"))


def minimum(a: Any, b: Any) -> Tensor:
    """Return the elementwise minimum of `a` and `b`; NaN if one is NaN.

    Parameters
    ----------
    a, b : Tensor, array or number
        Of shapes that broadcast.

    Returns
    -------
    Tensor

    Notes
    -----
    The gradient goes to the smaller operand, and half of it to each in a tie, as in `min`. Where
    one is NaN, neither gets a gradient.

    Examples
    --------
    >>> from cupybnn import Tensor, ops
    >>> ops.minimum(Tensor([1.0, 5.0]), 2.0).data
    array([1., 2.], dtype=float32)
    """
    return Minimum.apply(*_as_operands(a, b, "minimum"))

"""Join tensors along an existing or a new axis."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cupybnn.autograd import Context, Function, Tensor, tensor_or_number
from cupybnn.ops.axes import as_axis

__all__ = ["concatenate", "stack"]


class Concatenate(Function):
    """Join arrays along an existing axis."""

    @staticmethod
    def forward(ctx: Context, *arrays: Any, axis: int) -> Any:
        ctx.axis = axis
        ctx.lengths = [array.shape[axis] if array.ndim else 0 for array in arrays]
        return ctx.xp.concatenate(arrays, axis=axis)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        parts, start = [], 0
        for operand, length in enumerate(ctx.lengths):
            part = [slice(None)] * grad.ndim
            part[ctx.axis] = slice(start, start + length)
            parts.append(ctx.fit(grad[tuple(part)], operand) if ctx.needs[operand] else None)
            start += length
        return tuple(parts)


class Stack(Function):
    """Join arrays of one shape along a new axis."""

    @staticmethod
    def forward(ctx: Context, *arrays: Any, axis: int) -> Any:
        ctx.axis = axis
        return ctx.xp.stack(arrays, axis=axis)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        parts = ctx.xp.moveaxis(grad, ctx.axis, 0)
        return tuple(
            ctx.fit(part, operand) if needed else None
            for operand, (part, needed) in enumerate(zip(parts, ctx.needs, strict=True))
        )


def _join(function: type[Function], tensors: Iterable[Any], axis: Any) -> Tensor:
    operands = [tensor_or_number(tensor, function.name) for tensor in tensors]
    if not operands or not all(isinstance(operand, Tensor) for operand in operands):
        raise ValueError(
            f"The 'tensors' of {function.name} must be one or more tensors or arrays; got "
            f"{[type(operand).__name__ for operand in operands]}."
        )
    result = function.apply(*operands, axis=as_axis(axis, function.name))
    result.two_valued = all(operand.two_valued for operand in operands)
    return result


def concatenate(tensors: Iterable[Any], axis: int = 0) -> Tensor:
    """Join tensors along one of their axes.

    Parameters
    ----------
    tensors : iterable of Tensor or array
        At least one, each with at least one axis; their shapes may differ only along `axis`.
    axis : int
        The axis to join along.

    Returns
    -------
    Tensor
        Marked as two-valued if all of `tensors` are. Each gets its part of the gradient.

    Examples
    --------
    >>> from cupybnn import Tensor, ops
    >>> ops.concatenate([Tensor([1.0, 2.0]), Tensor([3.0])]).data
    array([1., 2., 3.], dtype=float32)
    """
    return _join(Concatenate, tensors, axis)


def stack(tensors: Iterable[Any], axis: int = 0) -> Tensor:
    """Join tensors of one shape along a new axis.

    Parameters
    ----------
    tensors : iterable of Tensor or array
        At least one, all of the same shape.
    axis : int
        Position of the new axis in the result.

    Returns
    -------
    Tensor
        Marked as two-valued if all of `tensors` are. Each gets its part of the gradient.

    Examples
    --------
    >>> from cupybnn import Tensor, ops
    >>> ops.stack([Tensor(1.0), Tensor(2.0)]).data
    array([1., 2.], dtype=float32)
    """
    return _join(Stack, tensors, axis)

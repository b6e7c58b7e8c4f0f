"""Operations that only rearrange or move elements; they return views where NumPy does."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupybnn.autograd import Context, Function, Tensor
from cupybnn.autograd.convert import index_key
from cupybnn.autograd.precision import narrowed, widened
from cupybnn.backends.devices import Device, device_of, resolve, to_device
from cupybnn.ops.axes import as_axes

__all__ = ["index", "reshape", "to", "transpose"]


class Reshape(Function):
    """Change the shape."""

    @staticmethod
    def forward(ctx: Context, x: Any, shape: tuple[int, ...]) -> Any:
        return x.reshape(shape)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        return grad.reshape(ctx.edges[0].shape)


class Transpose(Function):
    """Permute the axes."""

    @staticmethod
    def forward(ctx: Context, x: Any, axes: tuple[int, ...] | None) -> Any:
        ctx.inverse = None if axes is None else tuple(np.argsort([a % x.ndim for a in axes]))
        return x.transpose(axes)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        return grad.transpose(ctx.inverse)


class Index(Function):
    """``x[key]`` for any key of NumPy's basic or advanced indexing."""

    @staticmethod
    def forward(ctx: Context, x: Any, key: Any) -> Any:
        if ctx.needs[0]:
            ctx.key = _copied(key, ctx.xp)  # the caller may edit its array before backward
        return x[key]

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        out = ctx.xp.zeros(ctx.edges[0].shape, grad.dtype)
        if _is_basic(ctx.key):
            out[ctx.key] = grad
        else:
            out = widened(out)
            # An element may have been taken more than once, and float16 counts only to 2048.
            ctx.xp.add.at(out, ctx.key, widened(grad))
        return narrowed(out, grad)


class Move(Function):
    """Copy to another device; the gradient is copied back."""

    @staticmethod
    def forward(ctx: Context, x: Any, device: Device) -> Any:
        ctx.origin = device_of(x)
        return to_device(x, device)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        return to_device(grad, ctx.origin)


def _is_basic(key: Any) -> bool:
    parts = key if isinstance(key, tuple) else (key,)
    return all(
        part is None
        or part is Ellipsis
        or isinstance(part, slice)
        or (isinstance(part, int | np.integer) and not isinstance(part, bool))
        for part in parts
    )


def _copied(key: Any, xp: Any) -> Any:
    """Return `key` with its arrays copied."""
    if isinstance(key, tuple):
        return tuple(_copied(part, xp) for part in key)
    return key.copy() if isinstance(key, xp.ndarray) else key


def reshape(x: Tensor, *shape: int | tuple[int, ...]) -> Tensor:
    """Return the elements of `x` in another shape; one length may be -1.

    Examples
    --------
    >>> from cupybnn import Tensor, ops
    >>> ops.reshape(Tensor([[1.0, 2.0], [3.0, 4.0]]), (4,)).data.tolist()
    [1.0, 2.0, 3.0, 4.0]
    """
    lengths = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
    return _still_signs(Reshape.apply(x, shape=lengths), x)


def transpose(x: Tensor, axes: tuple[int, ...] | None = None) -> Tensor:
    """Return `x` with its axes in the order `axes`, reversed by default.

    Examples
    --------
    >>> from cupybnn import Tensor, ops
    >>> ops.transpose(Tensor([[1.0, 2.0], [3.0, 4.0]])).data.tolist()
    [[1.0, 3.0], [2.0, 4.0]]
    """
    order = as_axes(axes, "transpose")
    order = (order,) if isinstance(order, int) else order
    return _still_signs(Transpose.apply(x, axes=order), x)


def index(x: Tensor, key: Any) -> Tensor:
    """Return ``x[key]``: slices, integers, None, ..., index arrays, masks.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import ops
    >>> from cupybnn.autograd import Tensor
    >>> x = Tensor(np.arange(5.0))
    >>> ops.index(x, slice(1, 3)).numpy()
    array([1., 2.])
    >>> x[1:3].numpy()
    array([1., 2.])
    """
    return _still_signs(Index.apply(x, key=index_key(key, x.device.xp)), x)


def to(x: Tensor, device: str | Device) -> Tensor:
    """Return `x` on `device` ("cpu", "cuda", "cuda:1"); `x` itself if already there.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import ops
    >>> from cupybnn.autograd import Tensor
    >>> ops.to(Tensor(np.ones(2)), "cpu").device
    Device(kind='cpu', index=0)
    """
    target = resolve(device)
    return x if target == x.device else _still_signs(Move.apply(x, device=target), x)


def _still_signs(result: Tensor, x: Tensor) -> Tensor:
    """Mark `result` as two-valued if `x`, whose elements it holds, is."""
    result.two_valued = x.two_valued
    return result

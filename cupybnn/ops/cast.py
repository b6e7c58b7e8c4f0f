"""Casts to another dtype; the gradient is cast back."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupybnn.autograd import Context, Function, Tensor, no_grad

__all__ = ["astype"]


class Astype(Function):
    """Cast to another dtype."""

    @staticmethod
    def forward(ctx: Context, x: Any, dtype: np.dtype) -> Any:
        return x.astype(dtype)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        return grad.astype(ctx.edges[0].dtype)


def astype(x: Tensor, dtype: Any) -> Tensor:
    """Return `x` in another dtype; `x` itself if it already has it.

    Parameters
    ----------
    x : Tensor
        Any shape.
    dtype : dtype
        Floating, integer or bool. An integer or bool tensor has no gradient and belongs to no
        graph.

    Returns
    -------
    Tensor
        Its gradient is cast back to the dtype of `x`.

    Raises
    ------
    TypeError
        If `dtype` is not a real dtype.

    Examples
    --------
    >>> from cupybnn import Tensor, ops
    >>> x = Tensor([1.5, -2.5], requires_grad=True)
    >>> y = ops.astype(x, "float64")
    >>> y.sum().backward()
    >>> y.dtype, x.grad.dtype
    (dtype('float64'), dtype('float32'))
    """
    target = np.dtype(dtype).newbyteorder("=")
    if target.kind not in "biuf":
        raise TypeError(f"The 'dtype' of astype must be a real dtype; got {target}.")
    if target == x.dtype:
        return x
    if target.kind == "f":
        result = Astype.apply(x, dtype=target)
    else:
        with no_grad():
            result = Astype.apply(x, dtype=target)
    result.two_valued = target.kind in "fi" and x.two_valued
    return result

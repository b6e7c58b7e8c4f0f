"""The sign of a tensor, with a straight-through gradient."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupybnn.autograd import Context, Function, Tensor, tensor_or_number
from cupybnn.ops.quantizer import Quantizer, get_quantizer

__all__ = ["quantize", "sign"]


class Sign(Function):
    """A quantizer's signs; its pseudo-gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Context, x: Any, quantizer: Quantizer, training: bool) -> Any:
        ctx.save(x)
        ctx.quantizer = quantizer
        return quantizer.forward(x, training)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        (x,) = ctx.saved
        return ctx.quantizer.pseudo_gradient(x, grad)


def sign(x: Tensor, ste: str | Quantizer = "ste_sign", training: bool = True) -> Tensor:
    """Return +1 where x >= 0 and -1 elsewhere, with a pseudo-gradient.

    Parameters
    ----------
    x : Tensor
        Any shape. A tensor that is already two-valued is returned unchanged.
    ste : str or Quantizer
        The pseudo-gradient, used instead of the derivative, which is 0: a quantizer, or a name
        from `cupybnn.ops.quantizer_names`. "ste_sign" (or "hard_tanh"), the gradient where
        ``|x| <= 1``; "clipped_grad"; "identity"; ...
    training : bool
        Whether a stochastic quantizer draws random signs.

    Returns
    -------
    Tensor
        Of the shape and dtype of `x`, marked as two-valued.

    Examples
    --------
    >>> from cupybnn import Tensor, ops
    >>> x = Tensor([-2.0, 0.5], requires_grad=True)
    >>> y = ops.sign(x)
    >>> y.data.tolist()
    [-1.0, 1.0]
    >>> y.sum().backward()
    >>> x.grad.tolist()
    [0.0, 1.0]
    """
    x = tensor_or_number(x, "sign")
    if x.two_valued:
        return x
    result = Sign.apply(x, quantizer=get_quantizer(ste), training=training)
    result.two_valued = True
    return result


def quantize(x: Tensor, quantizer: str | Quantizer = "ste_sign", training: bool = True) -> Tensor:
    """Return the signs of `x`, times the quantizer's scale if it has one; see `sign`.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import ops
    >>> from cupybnn.autograd import Tensor
    >>> x = Tensor(np.array([-2.0, -0.5, 0.3]), requires_grad=True)
    >>> y = ops.quantize(x, "approx_sign")
    >>> y.numpy()
    array([-1., -1.,  1.])
    >>> y.sum().backward()
    >>> x.grad
    array([0. , 1. , 1.4])
    """
    x = tensor_or_number(x, "quantize")
    quantizer = get_quantizer(quantizer)
    signs = sign(x, quantizer, training)
    with np.errstate(all="ignore"):  # as inside an operation
        scale = quantizer.scale(x._data)
    return signs if scale is None else signs * scale

"""Matrix products: of real numbers and of signs."""

from __future__ import annotations

from typing import Any

from cupybnn.autograd import Context, Function, Tensor, tensor_or_number
from cupybnn.gemm import xnor_gemm
from cupybnn.ops.gradient_levels import GradientQuantizer, quantized_gradients

__all__ = ["binary_matmul", "matmul"]


def _gradients(ctx: Context, grad: Any) -> tuple[Any, Any]:
    """Return the gradients of both factors: dense products, whatever the forward pass used."""
    a, b = ctx.saved
    # A 1-D factor is a matrix of one row or one column.
    if b.ndim == 1:
        grad, b = grad[..., None], b[:, None]
    if a.ndim == 1:
        grad, a = grad[..., None, :], a[None, :]
    grad_a = grad_b = None
    if ctx.needs[0]:
        grad_a = ctx.fit(ctx.xp.matmul(grad, b.swapaxes(-1, -2)), 0)
    if ctx.needs[1]:
        grad_b = ctx.xp.matmul(a.swapaxes(-1, -2), grad)
        grad_b = ctx.fit(grad_b[..., 0] if len(ctx.edges[1].shape) == 1 else grad_b, 1)
    return grad_a, grad_b


class Matmul(Function):
    """a @ b, as `numpy.matmul`."""

    @staticmethod
    def forward(ctx: Context, a: Any, b: Any) -> Any:
        ctx.save(a, b)
        return ctx.xp.matmul(a, b)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        return _gradients(ctx, grad)


class BinaryMatmul(Function):
    """a @ b of two arrays of +1 and -1."""

    @staticmethod
    def forward(
        ctx: Context, a: Any, b: Any, xnor: bool, quantizer: GradientQuantizer | None
    ) -> Any:
        ctx.save(a, b)
        ctx.quantizer = quantizer
        if not xnor:
            return ctx.xp.matmul(a, b)
        # Without `dtype`, xnor_gemm returns at least float32.
        return xnor_gemm(a, b, dtype=a.dtype if a.dtype.itemsize < 4 else None)

    @staticmethod
    def backward(ctx: Context, grad: Any) -> Any:
        if ctx.quantizer is None:
            return _gradients(ctx, grad)
        return quantized_gradients(ctx, ctx.quantizer, grad, *ctx.saved)


def matmul(a: Any, b: Any) -> Tensor:
    """Return the matrix product a @ b, following `numpy.matmul`.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import Tensor, ops
    >>> ops.matmul(Tensor(np.ones((2, 3))), Tensor(np.ones((3, 4)))).shape
    (2, 4)
    """
    return Matmul.apply(a, b)


def binary_matmul(
    a: Tensor, b: Tensor, xnor: bool = True, grad_quantizer: GradientQuantizer | None = None
) -> Tensor:
    """Return the matrix product of two tensors of signs.

    Parameters
    ----------
    a : Tensor, shape (..., M, K)
        +1 and -1, marked as such (``two_valued``): a result of `sign`.
    b : Tensor, shape (..., K, N)
        Likewise.
    xnor : bool
        Use `cupybnn.xnor_gemm`; otherwise a dense product. Both are exact, and so equal, while
        the dtype holds every integer up to K (float32: 2**24).
    grad_quantizer : GradientQuantizer, optional
        Rounds the result's gradient to levels of a few bits: see `quantize_gradient`. `b` is then a
        matrix, and `a` has at least two axes.

    Returns
    -------
    Tensor, shape (..., M, N)
        Its gradients are dense products with the other factor; with `grad_quantizer`, products of
        the levels' bit planes with it, by `cupybnn.xnor_gemm`.

    Raises
    ------
    ValueError
        If a factor may hold values other than +1 and -1, or the shapes are not those that
        `grad_quantizer` needs.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import Tensor, ops
    >>> x = ops.sign(Tensor(np.array([[1.0, -2.0, 3.0]], np.float32)))
    >>> w = ops.sign(Tensor(np.array([[1.0], [1.0], [-1.0]], np.float32)))
    >>> ops.binary_matmul(x, w).data
    array([[-1.]], dtype=float32)
    """
    a, b = tensor_or_number(a, "binary_matmul"), tensor_or_number(b, "binary_matmul")
    for name, factor in (("a", a), ("b", b)):
        if not factor.two_valued:
            raise ValueError(
                f"The {name!r} of binary_matmul must be known to hold only +1 and -1; got a tensor "
                f"of shape {factor.shape} that may hold other values. Take its sign first: "
                f"cupybnn.ops.sign(x)."
            )
    if grad_quantizer is not None and (a.ndim < 2 or b.ndim != 2):
        raise ValueError(
            f"With 'grad_quantizer', the 'b' of binary_matmul must be a matrix and 'a' have two "
            f"axes or more; got shapes {a.shape} and {b.shape}."
        )
    return BinaryMatmul.apply(a, b, xnor=xnor, quantizer=grad_quantizer)

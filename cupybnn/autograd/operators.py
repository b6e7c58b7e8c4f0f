"""Operators and methods of tensors, each an operation of `cupybnn.ops`.

The operations build on this package, and ``x + y`` needs them: this is the package's only upward
import. It happens on first use, so that either package can be imported without the other and each
operation stays in one place.
"""

from __future__ import annotations

import numbers
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from cupybnn.autograd.tensor import Tensor
    from cupybnn.backends.devices import Device

__all__ = ["Operators"]


def _comparable(other: Any) -> bool:
    """Whether == compares values with `other`; None, strings and the like never equal a tensor.

    Lists count as comparable so that `cupybnn.ops.equal` refuses them, as all operations do.
    """
    return isinstance(other, list | tuple | numbers.Real | np.generic) or hasattr(other, "shape")


def _ops() -> Any:
    """Return `cupybnn.ops`, imported on first use."""
    ops = sys.modules.get("cupybnn.ops")
    if ops is None:
        import cupybnn.ops as ops
    return ops


class Operators:
    """The arithmetic that `Tensor` inherits."""

    __slots__ = ()
    # A NumPy array on the left defers to the tensor on the right.
    __array_ufunc__ = None

    def __add__(self, other: Any) -> Tensor:
        return _ops().add(self, other)

    def __radd__(self, other: Any) -> Tensor:
        return _ops().add(other, self)

    def __sub__(self, other: Any) -> Tensor:
        return _ops().subtract(self, other)

    def __rsub__(self, other: Any) -> Tensor:
        return _ops().subtract(other, self)

    def __mul__(self, other: Any) -> Tensor:
        return _ops().multiply(self, other)

    def __rmul__(self, other: Any) -> Tensor:
        return _ops().multiply(other, self)

    def __truediv__(self, other: Any) -> Tensor:
        return _ops().divide(self, other)

    def __rtruediv__(self, other: Any) -> Tensor:
        return _ops().divide(other, self)

    def __pow__(self, exponent: float) -> Tensor:
        return _ops().power(self, exponent)

    def __matmul__(self, other: Any) -> Tensor:
        return _ops().matmul(self, other)

    def __rmatmul__(self, other: Any) -> Tensor:
        return _ops().matmul(other, self)

    def __neg__(self) -> Tensor:
        return _ops().negative(self)

    def __abs__(self) -> Tensor:
        return _ops().absolute(self)

    # A class that defines __eq__ loses its inherited hash: hash by identity.
    __hash__ = object.__hash__

    def __eq__(self, other: Any) -> Any:
        return _ops().equal(self, other) if _comparable(other) else NotImplemented

    def __ne__(self, other: Any) -> Any:
        return _ops().not_equal(self, other) if _comparable(other) else NotImplemented

    def __lt__(self, other: Any) -> Any:
        return _ops().less(self, other)

    def __le__(self, other: Any) -> Any:
        return _ops().less_equal(self, other)

    def __gt__(self, other: Any) -> Any:
        return _ops().greater(self, other)

    def __ge__(self, other: Any) -> Any:
        return _ops().greater_equal(self, other)

    def __getitem__(self, key: Any) -> Tensor:
        return _ops().index(self, key)

    def abs(self) -> Tensor:
        """Return the absolute values."""
        return _ops().absolute(self)

    def exp(self) -> Tensor:
        """Return e to the power of each element."""
        return _ops().exp(self)

    def log(self) -> Tensor:
        """Return the natural logarithms."""
        return _ops().log(self)

    def sqrt(self) -> Tensor:
        """Return the square roots."""
        return _ops().sqrt(self)

    def tanh(self) -> Tensor:
        """Return the hyperbolic tangents."""
        return _ops().tanh(self)

    def relu(self) -> Tensor:
        """Return the elements, with negative ones replaced by 0."""
        return _ops().relu(self)

    def clip(self, low: float, high: float) -> Tensor:
        """Return the elements limited to [low, high]."""
        return _ops().clip(self, low, high)

    def sigmoid(self) -> Tensor:
        """Return ``1 / (1 + exp(-x))`` of each element."""
        return _ops().sigmoid(self)

    def softmax(self, axis: int = -1) -> Tensor:
        """Return the softmax along `axis`."""
        return _ops().softmax(self, axis)

    def log_softmax(self, axis: int = -1) -> Tensor:
        """Return the logarithm of the softmax along `axis`."""
        return _ops().log_softmax(self, axis)

    def argmax(self, axis: int | None = None) -> Any:
        """Return the index of the largest element along `axis`, as a plain array."""
        return _ops().argmax(self, axis)

    def argmin(self, axis: int | None = None) -> Any:
        """Return the index of the smallest element along `axis`, as a plain array."""
        return _ops().argmin(self, axis)

    def astype(self, dtype: Any) -> Tensor:
        """Return the tensor in another dtype; itself if it already has it."""
        return _ops().astype(self, dtype)

    def sum(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        """Return the sum over `axis` (all axes by default)."""
        return _ops().sum(self, axis, keepdims)

    def mean(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        """Return the mean over `axis` (all axes by default)."""
        return _ops().mean(self, axis, keepdims)

    def max(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        """Return the largest element along `axis` (all axes by default)."""
        return _ops().max(self, axis, keepdims)

    def min(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        """Return the smallest element along `axis` (all axes by default)."""
        return _ops().min(self, axis, keepdims)

    def reshape(self, *shape: int | tuple[int, ...]) -> Tensor:
        """Return the elements in another shape: ``t.reshape(2, -1)`` or ``t.reshape((2, -1))``."""
        return _ops().reshape(self, *shape)

    def transpose(self, *axes: Any) -> Tensor:
        """Return the tensor with its axes in the given order, reversed by default.

        ``t.transpose(1, 0)``, ``t.transpose((1, 0))``, or ``t.transpose()``.
        """
        return _ops().transpose(self, axes[0] if len(axes) == 1 else axes or None)

    def to(self, device: str | Device) -> Tensor:
        """Return the tensor on `device` ("cpu", "cuda", "cuda:1"); itself if already there."""
        return _ops().to(self, device)

    @property
    def T(self) -> Tensor:
        """The tensor with its axes reversed."""
        return _ops().transpose(self)

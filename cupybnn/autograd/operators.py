"""Operators and methods of tensors, each an operation of `cupybnn.ops`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cupybnn.autograd.tensor import Tensor
    from cupybnn.backends.devices import Device

__all__ = ["Operators"]


def _ops() -> Any:
    """Return `cupybnn.ops`; it builds on this package, so it is imported at the first use."""
    ops = sys.modules.get("cupybnn.ops")
    if ops is None:
        import cupybnn.ops as ops
    return ops


class Operators:
    """The arithmetic that `Tensor` inherits."""

    __slots__ = ()
    # An array on the left leaves the operation to the tensor on the right.
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
        """Return the elements, negative ones replaced by 0."""
        return _ops().relu(self)

    def clip(self, low: float, high: float) -> Tensor:
        """Return the elements limited to [low, high]."""
        return _ops().clip(self, low, high)

    def sum(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        """Return the sum over `axis` (all axes by default)."""
        return _ops().sum(self, axis, keepdims)

    def mean(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        """Return the mean over `axis` (all axes by default)."""
        return _ops().mean(self, axis, keepdims)

    def max(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        """Return the greatest element along `axis` (all axes by default)."""
        return _ops().max(self, axis, keepdims)

    def min(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        """Return the least element along `axis` (all axes by default)."""
        return _ops().min(self, axis, keepdims)

    def reshape(self, *shape: int | tuple[int, ...]) -> Tensor:
        """Return the elements in another shape: ``t.reshape(2, -1)`` or ``t.reshape((2, -1))``."""
        return _ops().reshape(self, *shape)

    def transpose(self, *axes: int) -> Tensor:
        """Return the tensor with its axes in the given order, reversed by default."""
        return _ops().transpose(self, axes or None)

    def to(self, device: str | Device) -> Tensor:
        """Return the tensor on `device` ("cpu", "cuda", "cuda:1"); itself if it is there."""
        return _ops().to(self, device)

    @property
    def T(self) -> Tensor:
        """The tensor with its axes reversed."""
        return _ops().transpose(self)

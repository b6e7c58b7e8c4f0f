"""Number, sequence and array protocols of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from cupybnn.backends.devices import is_cupy

if TYPE_CHECKING:
    from cupybnn.autograd.tensor import Tensor
    from cupybnn.backends.devices import Device

__all__ = ["Protocols"]


class Protocols:
    """Conversions that `Tensor` inherits; each behaves as a NumPy array's, or is refused."""

    __slots__ = ()

    if TYPE_CHECKING:
        _data: Any
        data: Any

        @property
        def device(self) -> Device: ...
        @property
        def dtype(self) -> np.dtype: ...
        @property
        def ndim(self) -> int: ...
        @property
        def shape(self) -> tuple[int, ...]: ...
        @property
        def size(self) -> int: ...
        def __getitem__(self, key: Any) -> Tensor: ...

    def item(self) -> float | int | bool:
        """Return the value of a tensor of one element as a Python number."""
        if self.size != 1:
            raise ValueError(f"item() needs a tensor of one element; this one is {self.shape}.")
        value = self._data.item()
        return float(value) if isinstance(value, np.generic) else value  # a longdouble's item()

    def numpy(self) -> np.ndarray:
        """Return the values as a NumPy array: `data` itself on the CPU, otherwise a copy."""
        return self._data.get() if is_cupy(self._data) else self.data

    def __len__(self) -> int:
        if self.ndim == 0:
            raise TypeError("A tensor of shape () has no length: it is one number.")
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        if self.ndim == 0:
            raise TypeError(
                "A tensor of shape () cannot be iterated over: it is one number, t.item()."
            )
        return (self[i] for i in range(self.shape[0]))

    def __contains__(self, value: Any) -> bool:
        from cupybnn import ops

        return bool(ops.equal(self, value).any())

    def __bool__(self) -> bool:
        if self.size != 1:
            raise ValueError(
                f"The truth value of a tensor of shape {self.shape} is ambiguous. Reduce the data: "
                f"t.data.any(), t.data.all(), len(t) > 0."
            )
        return bool(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __index__(self) -> int:
        if self.ndim or self.dtype.kind not in "iu":
            raise TypeError(
                f"Only an integer tensor of shape () is an index; got shape {self.shape} and dtype "
                f"{self.dtype}."
            )
        return int(self.item())

    def __round__(self, digits: int | None = None) -> float | int:
        return round(self.item(), digits)

    def __format__(self, spec: str) -> str:
        if not spec:
            return str(self)
        if self.size != 1:
            raise TypeError(
                f"The format {spec!r} needs a tensor of one element; this one has shape "
                f"{self.shape}. Format its elements, or leave out {spec!r}."
            )
        return format(self.item(), spec)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        # For numpy.asarray and the like. Arithmetic with an array stays the tensor's: see
        # `Operators.__array_ufunc__`.
        if is_cupy(self._data):
            raise TypeError(
                f"A tensor on {self.device} is not converted to a NumPy array implicitly: use "
                f".numpy() for a copy on the host, or .data for the CuPy array."
            )
        return np.array(self.data, dtype=dtype, copy=copy)

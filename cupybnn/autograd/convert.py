"""Conversion of arrays, numbers and lists to arrays that the engine owns."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np

from cupybnn.backends.devices import is_cupy
from cupybnn.backends.interop import type_name

__all__ = ["as_number", "index_key", "new_array"]


def new_array(data: Any) -> Any:
    """Return a new, contiguous NumPy or CuPy array of `data`, in native byte order.

    Python floats become float32. So do extension types that fit in float32, such as bfloat16.
    """
    if isinstance(data, np.ma.MaskedArray):
        raise TypeError("The 'data' of a tensor must not be a masked array: fill it first.")
    if is_cupy(data):
        with data.device:
            array = data.copy(order="C")
            if _is_extension(array.dtype):
                array = array.astype(np.float32)
    else:
        array = np.array(data, order="C")
        if not hasattr(data, "dtype") and array.dtype == np.float64:
            with np.errstate(under="ignore"):
                array = array.astype(np.float32)
        elif not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        elif _is_extension(array.dtype):
            array = array.astype(np.float32)
    if array.dtype.kind not in "biuf":
        raise TypeError(
            f"The 'data' of a tensor must be real numbers; got {type_name(data)} with dtype "
            f"{array.dtype}."
        )
    return array


def _is_extension(dtype: np.dtype) -> bool:
    """Whether `dtype` is a real extension type, not NumPy's own, that float32 can hold."""
    foreign = dtype.kind == "V" or dtype.type.__module__.partition(".")[0] == "ml_dtypes"
    return foreign and dtype.names is None and np.can_cast(dtype, np.float32)


def as_number(value: Any) -> float | int | None:
    """Return `value` as a Python number, or None if it is not a real number.

    A NumPy scalar would impose its dtype on a result; a Python number takes the tensor's.
    """
    if isinstance(value, int | float) and not isinstance(value, np.generic):
        return value
    if isinstance(value, np.generic):
        if value.dtype.kind in "biu":
            return value.item()
        real = value.dtype.kind == "f" or _is_extension(value.dtype)
        return float(value) if real else None
    return float(value) if isinstance(value, numbers.Real) else None  # e.g. a Fraction


def index_key(key: Any, xp: Any) -> Any:
    """Return an index in which tensors, lists and arrays are arrays of `xp`."""
    if isinstance(key, tuple):
        return tuple(index_key(part, xp) for part in key)
    if hasattr(key, "_data"):  # a tensor
        return key._data
    return xp.asarray(key) if isinstance(key, list | np.ndarray) else key

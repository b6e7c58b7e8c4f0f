"""Checks of what a caller wants done with a product: scale and bias, or threshold and flip."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupybnn.backends.devices import Device, device_of
from cupybnn.backends.epilogue import Epilogue
from cupybnn.backends.interop import as_native, type_name
from cupybnn.operands import INT32, is_floating

__all__ = ["checked_epilogue", "checked_flip", "checked_threshold"]


def checked_epilogue(
    device: Device, shape: tuple[int, ...], scale: Any, bias: Any, function: str
) -> Epilogue | None:
    """Return scale and bias for products of a shape on a device; None if there is neither.

    Parameters
    ----------
    device : Device
    shape : tuple of int
        (..., M, N), of the product.
    scale, bias
        As for `cupybnn.xnor_gemm`.
    function : str
        The caller, for errors.

    Raises
    ------
    TypeError
        If a factor is not of real numbers, or is on another device.
    ValueError
        If it does not broadcast to the product's rows or columns.
    """
    if scale is None and bias is None:
        return None
    row = column = None
    if isinstance(scale, tuple):
        if len(scale) != 2:
            raise ValueError(
                f"The 'scale' of {function} must be an array or a pair (row, column); got a tuple "
                f"of length {len(scale)}."
            )
        row, column = (_factor(device, x, f"'scale' of {function}") for x in scale)
        if row is not None and row.ndim == 1:
            row = row[:, None]
    elif scale is not None:
        column = _factor(device, scale, f"'scale' of {function}")
        if column.ndim > 1 and column.shape[-1] == 1:
            row, column = column, None
    bias = _factor(device, bias, f"'bias' of {function}")
    *batch, m, n = shape
    rows, columns = (*batch, m, 1), (*batch, 1, n)
    for x, target, what in (
        (row, rows, "a row 'scale'"),
        (column, columns, "a column 'scale'"),
        (bias, columns, "the 'bias'"),
    ):
        if x is not None and not _broadcasts(x.shape, target):
            raise ValueError(
                f"In {function}, {what} must broadcast to shape {target} for a product of shape "
                f"{shape}; got shape {x.shape}."
            )
    return Epilogue(row, column, bias)


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, target) == target
    except ValueError:
        return False


def _factor(device: Device, x: Any, what: str) -> Any:
    """Return a scale or a bias as float32 on the device; None stays None."""
    if x is None:
        return None
    x = _on_device(device, x, what)
    if x.dtype.kind not in "iu" and not is_floating(x.dtype):
        raise TypeError(f"The {what} must be real numbers; got dtype {x.dtype}.")
    with np.errstate(all="ignore"):  # overflow gives infinity, as on a GPU
        return x.astype(np.float32, copy=False)


def _on_device(device: Device, x: Any, what: str) -> Any:
    """Return `x` as an array on the device; only numbers and lists are copied there."""
    if isinstance(x, (bool, int, float, list, tuple, np.generic)):
        try:
            return device.xp.asarray(x)
        except (TypeError, ValueError) as error:  # e.g. nested lists of different lengths
            raise TypeError(
                f"The {what} must be a number, an array, or a list of numbers; got "
                f"{type_name(x)} ({error})."
            ) from error
    array = as_native(x, what)
    if device_of(array) != device:
        raise TypeError(
            f"The {what} must be on the operands' device, {device}; got {type_name(x)} on "
            f"{device_of(array)}. Move it there first."
        )
    return array


def checked_threshold(device: Device, columns: int, x: Any, function: str) -> Any:
    """Return thresholds as int32 of shape (N,) on a device; None stays None."""
    return _per_column(device, columns, x, "iu", "integers", f"'threshold' of {function}", INT32)


def checked_flip(device: Device, columns: int, x: Any, function: str) -> Any:
    """Return flips as bool of shape (N,) on a device; None stays None."""
    return _per_column(device, columns, x, "b", "bools", f"'flip' of {function}", np.dtype(bool))


def _per_column(
    device: Device, columns: int, x: Any, kinds: str, numbers: str, what: str, dtype: np.dtype
) -> Any:
    """Return a threshold or a flip as an array of shape (N,); None stays None."""
    if x is None:
        return None
    # All products fit int32, so thresholds can be clamped to its limits.
    limits = np.iinfo(np.int32)
    if type(x) is int:  # may be too large for any integer type
        x = max(limits.min, min(x, limits.max))
    x = _on_device(device, x, what)
    if x.dtype.kind not in kinds:
        raise TypeError(f"The {what} must be {numbers}; got dtype {x.dtype}.")
    if x.shape not in ((), (columns,)):
        raise ValueError(
            f"The {what} must have one value per column, shape ({columns},); got shape {x.shape}."
        )
    xp = device.xp
    if dtype.kind == "i" and x.dtype != dtype:
        x = xp.clip(
            x, max(limits.min, np.iinfo(x.dtype).min), min(limits.max, np.iinfo(x.dtype).max)
        )
    return xp.ascontiguousarray(xp.broadcast_to(x.astype(dtype, copy=False), (columns,)))

"""Signs of arrays, and packing them to bits and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupybnn import backends
from cupybnn.backends.devices import CPU, cuda_device, current_cuda_device, device_of, is_cupy
from cupybnn.operands import (
    as_dtype,
    as_operand,
    check_cuda_dtype,
    dtype_has_sign,
    warn_of_zero_one,
)
from cupybnn.packed.matrix import PackedMatrix, as_matrix

__all__ = ["pack", "packed_axis", "sign", "unpack"]


def sign(x: Any) -> Any:
    """Return +1 where x >= 0 and -1 elsewhere.

    Both zeros give +1 and NaN gives -1, so that a sign is never 0. Every product and layer here
    uses this definition, which differs from `numpy.sign`.

    Parameters
    ----------
    x : array_like, any shape
        Real floating, signed integer or bool (True is +1, False is -1).

    Returns
    -------
    ndarray, shape of `x`
        A NumPy or CuPy array of the dtype of `x`; int8 for bool.

    Raises
    ------
    TypeError
        If the elements of `x` have no sign (unsigned integers, complex numbers, objects).

    Examples
    --------
    >>> import numpy as np
    >>> import cupybnn
    >>> cupybnn.sign(np.array([-2.0, -0.0, 3.0]))
    array([-1.,  1.,  1.])
    """
    x = as_operand(x, "'x' of sign")
    dtype = np.dtype(np.int8) if x.dtype.kind == "b" else x.dtype
    with device_of(x).scope():
        return backends.get(x).sign(x, dtype)


def pack(x: Any, axis: int = -1) -> PackedMatrix:
    """Store the signs of a matrix with one bit per element.

    Pack a left operand (..., M, K) of `cupybnn.xnor_gemm` along its last axis, a right operand
    (..., K, N) along the last but one: ``pack(a)`` and ``pack(b, axis=-2)``.

    Parameters
    ----------
    x : array_like, shape (K,), (M, K) or (..., M, K)
        Real floating, signed integer or bool; any strides. The sign is that of `cupybnn.sign`.
    axis : int
        The axis along which the bits are packed: one of the last two.

    Returns
    -------
    PackedMatrix
        On the device of `x`.

    Raises
    ------
    TypeError
        If the elements of `x` have no sign.
    ValueError
        If `x` is a scalar, or `axis` is not one of its last two.

    Warns
    -----
    UserWarning
        If `x` is a NumPy array that holds only 0 and 1, whose signs are all +1. CuPy arrays are not
        checked, because that would wait for the GPU.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import pack
    >>> a, b = np.array([[1.5, -2.0, 3.0]]), np.array([[1.0], [2.0], [-3.0]])
    >>> pack(a) @ pack(b, axis=-2)
    array([[-1]], dtype=int32)
    """
    if type(axis) is int and axis in (-1, -2) and is_cupy(x) and x.ndim == 2:
        # The usual case on a GPU, where Python's time counts.
        index = x.data.device_id
        if dtype_has_sign(x.dtype) and index == current_cuda_device():
            words, popcounts = backends.get(x).pack(x, axis)
            return PackedMatrix._of(words, popcounts, x.shape, axis, cuda_device(index))
    x = as_operand(x, "'x' of pack")
    axis = packed_axis(x, axis, "x", "pack")
    device = device_of(x)
    if device == CPU:
        warn_of_zero_one(x, "'x' of pack")
    with device.scope():
        matrix = x if x.ndim > 1 else x[None, :]
        words, popcounts = backends.get(device).pack(matrix, axis)
    return PackedMatrix._of(words, popcounts, x.shape, axis, device)


def unpack(p: PackedMatrix, dtype: Any = None) -> Any:
    """Return the +1 and -1 of a `PackedMatrix` as an array.

    Parameters
    ----------
    p : PackedMatrix
    dtype : dtype, optional
        Real floating, signed integer, or bool (True for +1); int8 by default.

    Returns
    -------
    ndarray, shape ``p.shape``
        A NumPy or CuPy array on the device of `p`.

    Raises
    ------
    TypeError
        If `p` is not a PackedMatrix, or `dtype` cannot hold both +1 and -1.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybnn
    >>> cupybnn.unpack(cupybnn.pack(np.array([2.0, -3.0, 0.0])), "int8")
    array([ 1, -1,  1], dtype=int8)
    """
    if not isinstance(p, PackedMatrix):
        raise TypeError(f"The 'p' of unpack must be a PackedMatrix; got {type(p).__name__}.")
    target = as_dtype(np.int8 if dtype is None else dtype, "'dtype' of unpack")
    if not dtype_has_sign(target):
        raise TypeError(
            f"The 'dtype' of unpack must be real floating, signed integer or bool; got {target}."
        )
    if p.device != CPU:
        check_cuda_dtype(target, "'dtype' of unpack")
    with p.device.scope():
        matrix = backends.get(p.device).unpack(p.words, as_matrix(p.shape), p.axis, target)
    return matrix if p.ndim > 1 else matrix[0]


def packed_axis(x: Any, axis: Any, name: str, function: str) -> int:
    """Return `axis` as -1 or -2; ValueError if the array `x` cannot be packed along it."""
    ndim = x.ndim
    if ndim == 0:
        raise ValueError(f"The {name!r} of {function} must have at least one axis; got a scalar.")
    if not isinstance(axis, (int, np.integer)) or not -ndim <= axis < ndim:
        raise ValueError(
            f"The 'axis' of {function} must be an axis of {name!r}, which has shape {x.shape}; "
            f"got {axis!r}."
        )
    axis = int(axis) - ndim if axis >= 0 else int(axis)
    if axis < -2:
        raise ValueError(
            f"The 'axis' of {function} must be one of the last two axes of {name!r}, -1 or -2; got "
            f"{axis} for shape {x.shape}. Move it first: numpy.moveaxis({name}, {axis}, -1)."
        )
    return axis

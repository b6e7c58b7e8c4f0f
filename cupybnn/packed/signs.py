"""Signs of arrays, and packing them, or a few levels, to bits and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupybnn import backends
from cupybnn.backends.devices import CPU, cuda_device, current_cuda_device, device_of, is_cupy
from cupybnn.backends.interop import as_native
from cupybnn.backends.levels import MOST_BITS, SIGNS, Levels, levels_of
from cupybnn.operands import (
    as_dtype,
    as_operand,
    check_cuda_dtype,
    dtype_has_sign,
    is_floating,
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


def pack(x: Any, axis: int = -1, bits: int = 1, signed: bool = True) -> PackedMatrix:
    """Store the signs of a matrix with one bit per element, or its nearest levels with a few.

    Pack a left operand (..., M, K) of `cupybnn.xnor_gemm` along its last axis, a right operand
    (..., K, N) along the last but one: ``pack(a)`` and ``pack(b, axis=-2)``.

    Parameters
    ----------
    x : array_like, shape (K,), (M, K) or (..., M, K)
        Real floating, signed integer or bool; any strides. The sign is that of `cupybnn.sign`. With
        ``signed=False``, unsigned integers too.
    axis : int
        The axis along which the bits are packed: one of the last two.
    bits : int
        Bits per element, from 1 to 8. Each element becomes the nearest of ``2**bits`` levels, the
        greater of two as near; NaN becomes the least.
    signed : bool
        Levels are the odd integers from ``-(2**bits - 1)`` to ``2**bits - 1``: for one bit, +1 and
        -1. If not, they are 0 to ``2**bits - 1``.

    Returns
    -------
    PackedMatrix
        On the device of `x`.

    Raises
    ------
    TypeError
        If the elements of `x` have no sign, or `bits` or `signed` is of another type.
    ValueError
        If `x` is a scalar, `axis` is not one of its last two, `bits` is out of range, or K is so
        long that a sum of levels might not fit an int32.

    Warns
    -----
    UserWarning
        If `x` is a NumPy array that holds only 0 and 1, whose signs are all +1. CuPy arrays are not
        checked, because that would wait for the GPU.

    Notes
    -----
    Signed levels are the values ``sum(2**j * s[j])`` of `bits` signs s: so a matrix of them is as
    many matrices of signs, its bit planes, and a product with signs is that many products of signs,
    added up. Unlike two's complement, they are symmetric and have no 0. They are the uniform
    quantizer of DoReFa-Net (Zhou et al., arXiv 1606.06160): ``(2**bits - 1) * x`` packs numbers x
    from -1 to 1.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import pack
    >>> a, b = np.array([[1.5, -2.0, 3.0]]), np.array([[1.0], [2.0], [-3.0]])
    >>> pack(a) @ pack(b, axis=-2)
    array([[-1]], dtype=int32)
    >>> pack(a, bits=2).unpack()
    array([[ 1, -1,  3]], dtype=int8)
    >>> pack(np.array([[0, 3, 5]]), bits=2, signed=False) @ pack(b, axis=-2)
    array([[0]], dtype=int32)
    """
    if type(axis) is int and axis in (-1, -2) and is_cupy(x) and x.ndim == 2 and bits == 1:
        # The usual case on a GPU, where Python's time counts.
        index = x.data.device_id
        if (
            type(bits) is int
            and signed is True
            and dtype_has_sign(x.dtype)
            and index == current_cuda_device()
        ):
            words, popcounts = backends.get(x).pack(x, axis)
            return PackedMatrix._of(words, popcounts, x.shape, axis, cuda_device(index))
    levels = _levels(bits, signed)
    x = _operand(x, levels)
    axis = packed_axis(x, axis, "x", "pack")
    device = device_of(x)
    if device == CPU and levels is SIGNS:
        warn_of_zero_one(x, "'x' of pack")
    if levels is not SIGNS and x.shape[axis] * levels.top > _MOST_SUM:
        raise ValueError(
            f"The 'x' of pack must have at most {_MOST_SUM // levels.top} elements along its "
            f"packed axis with bits={bits}, so that a sum of levels fits an int32; got shape "
            f"{x.shape}."
        )
    with device.scope():
        matrix = x if x.ndim > 1 else x[None, :]
        backend = backends.get(device)
        if levels is SIGNS:
            words, popcounts = backend.pack(matrix, axis)
        else:
            words, popcounts = backend.pack_levels(matrix, axis, levels)
    return PackedMatrix._of(words, popcounts, x.shape, axis, device, levels)


_MOST_SUM = 2**31 - 1


def _levels(bits: Any, signed: Any) -> Levels:
    if isinstance(bits, (bool, np.bool_)) or not isinstance(bits, (int, np.integer)):
        raise TypeError(f"The 'bits' of pack must be an integer; got {bits!r}.")
    if not 1 <= bits <= MOST_BITS:
        raise ValueError(f"The 'bits' of pack must be from 1 to {MOST_BITS}; got {bits}.")
    if not isinstance(signed, (bool, np.bool_)):
        raise TypeError(f"The 'signed' of pack must be a bool; got {signed!r}.")
    return levels_of(int(bits), bool(signed))


def _operand(x: Any, levels: Levels) -> Any:
    """Return `x` as an array whose elements have a nearest level."""
    what = "'x' of pack"
    if not levels.signed:
        array = as_native(x, what)
        if array.dtype.kind in "biu" or is_floating(array.dtype):
            return array
        return as_operand(array, what)  # names the fault
    if levels is SIGNS:
        return as_operand(x, what)
    array = as_native(x, what)
    if array.dtype.kind == "u":
        raise TypeError(
            f"The {what} must be real floating, signed integer or bool for signed levels; got "
            f"dtype {array.dtype}. Pass signed=False for the levels 0 to {levels.top}."
        )
    return as_operand(array, what)


def unpack(p: PackedMatrix, dtype: Any = None) -> Any:
    """Return the +1 and -1 of a `PackedMatrix`, or its levels, as an array.

    Parameters
    ----------
    p : PackedMatrix
    dtype : dtype, optional
        Real floating, signed integer, or bool (True for +1) for one bit; for unsigned levels also
        unsigned integer. By default ``p.dtype``, int8 for signs.

    Returns
    -------
    ndarray, shape ``p.shape``
        A NumPy or CuPy array on the device of `p`.

    Raises
    ------
    TypeError
        If `p` is not a PackedMatrix, or `dtype` cannot hold all its levels.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybnn
    >>> cupybnn.unpack(cupybnn.pack(np.array([2.0, -3.0, 0.0])), "int8")
    array([ 1, -1,  1], dtype=int8)
    >>> cupybnn.unpack(cupybnn.pack(np.array([2.0, -3.0, 0.0]), bits=2))
    array([ 3, -3,  1], dtype=int8)
    """
    if not isinstance(p, PackedMatrix):
        raise TypeError(f"The 'p' of unpack must be a PackedMatrix; got {type(p).__name__}.")
    target = as_dtype(p.dtype if dtype is None else dtype, "'dtype' of unpack")
    _check_target(target, p.levels)
    if p.device != CPU:
        check_cuda_dtype(target, "'dtype' of unpack")
    with p.device.scope():
        backend, shape = backends.get(p.device), as_matrix(p.shape)
        if p.levels is SIGNS:
            matrix = backend.unpack(p.words, shape, p.axis, target)
        else:
            matrix = backend.unpack_levels(p.words, shape, p.axis, p.levels, target)
    return matrix if p.ndim > 1 else matrix[0]


def _check_target(dtype: np.dtype, levels: Levels) -> None:
    """Raise TypeError unless `dtype` holds all levels."""
    unsigned = dtype.kind == "u" and not levels.signed
    if not dtype_has_sign(dtype) and not unsigned:
        more = "" if levels.signed else ", unsigned integer"
        raise TypeError(
            f"The 'dtype' of unpack must be real floating, signed integer{more} or bool; got "
            f"{dtype}."
        )
    if dtype.kind == "b" and levels.bits > 1:
        raise TypeError(f"The 'dtype' of unpack must hold {levels} per element; got bool.")
    if dtype.kind in "iu" and np.iinfo(dtype).max < levels.top:
        raise TypeError(
            f"The 'dtype' of unpack must hold levels up to {levels.top}; got {dtype}. Use "
            f"{levels.dtype}."
        )


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

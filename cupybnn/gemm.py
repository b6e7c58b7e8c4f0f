"""The exact product of the signs of two matrices: the public functions on top of the backends.

The common case of two 2-D operands takes a fast path, because on a GPU the time that Python spends
on a call counts. Everything else (vectors, batches, scales, ``out=``, foreign tensors, and all
errors) is handled in `cupybnn.problem`.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np

from cupybnn import problem, settings
from cupybnn.backends import numpy_backend
from cupybnn.backends.devices import CPU, cuda_device, current_cuda_device, is_cupy
from cupybnn.backends.levels import SIGNS
from cupybnn.operands import (
    INT32,
    check_result_dtype,
    default_dtype,
    dtype_has_sign,
    may_be_zero_one,
    warn_of_zero_one,
)
from cupybnn.packed import PackedMatrix

__all__ = ["xnor_gemm", "xnor_gemm_packed"]

MAX_K = np.iinfo(np.int32).max  # limit of the default result dtype and of thresholds
HOST = -1  # location of an operand: the host, or the index of its CUDA device


def xnor_gemm(
    a: Any, b: Any, *, scale: Any = None, bias: Any = None, out: Any = None, dtype: Any = None
) -> Any:
    """Multiply the signs of two matrices exactly.

    The result equals the integer product ``sign(a) @ sign(b)`` for every shape, where
    `cupybnn.sign` is +1 for x >= 0 and -1 otherwise. Shapes follow `numpy.matmul`.

    Parameters
    ----------
    a : array_like or PackedMatrix, shape (..., M, K) or (K,)
        Real floating, signed integer or bool (True is +1, False is -1), any strides; or packed
        along its last axis: ``pack(a)``.
    b : array_like or PackedMatrix, shape (..., K, N) or (K,)
        Likewise; packed along its last axis but one: ``pack(b, axis=-2)``. Leading axes broadcast.
        One of the two may be packed with several bits per element: then the product is that of its
        levels with the other's signs.
    scale : array or pair of arrays, optional
        Multiplies the columns of the product if of shape (N,) or (..., 1, N), its rows if of shape
        (M, 1) or (..., M, 1); a tuple (row, column) does both. Used as float32.
    bias : array, shape (N,) or (..., 1, N), optional
        Added after the scale. Used as float32.
    out : ndarray, shape (..., M, N), optional
        Output array with the shape and device of the result; its dtype becomes the result dtype.
        It may overlap any other argument.
    dtype : dtype, optional
        Real floating or signed integer. By default the operands' common floating type, but at
        least float32, if either is floating; otherwise int32 (float32 with a scale or a bias).

    Returns
    -------
    ndarray, shape (..., M, N)
        NumPy for NumPy, CuPy for CuPy, on the current device and stream, without synchronisation.

    Raises
    ------
    TypeError
        If an operand's elements have no sign (unsigned integers, complex numbers, objects, masked
        arrays), NumPy and CuPy are mixed, or `out` or `dtype` is of the wrong kind.
    ValueError
        If the two K differ, the leading axes do not broadcast, `out` has the wrong shape, an
        integer `dtype` cannot hold K (times the greatest level), or both operands have levels other
        than signs.

    Warns
    -----
    UserWarning
        If a NumPy array holds only 0 and 1, whose signs are all +1. CuPy arrays are not checked,
        because that would wait for the GPU.

    Notes
    -----
    A result is rounded to nearest even if its dtype cannot hold the integer: in bfloat16 from
    K = 257, in float16 from K = 2049 (and infinite from K = 65520), in float32 from K = 2**24 + 1.

    A product with levels of several bits is the sum of the products with their bit planes, in one
    kernel on a GPU. The integer must fit an int32, which `pack` ensures.

    With a scale or a bias the value is ``(float32(product) * row) * column + bias``, each step
    rounded to float32; for a float64 result the same in float64.

    GPU tensors of other libraries are accepted without a copy, and the result can be converted
    back:

    >>> y = torch.from_dlpack(cupybnn.xnor_gemm(torch_x, torch_w))  # doctest: +SKIP

    NaN and overflow cause no floating-point warnings or errors, whatever `numpy.errstate` says.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import xnor_gemm
    >>> xnor_gemm(np.array([[0.5, -2.0, 0.0]]), np.array([[1.0], [1.0], [-1.0]]))
    array([[-1.]])
    """
    if out is None and scale is None and bias is None:
        left = _host_memory(a, -1)
        right = None if left is None else _host_memory(b, -2)
        key = None
        if right is not None:
            # Unsigned words are no operands: their dtype alone tells that a matrix is packed.
            key = a.shape, left.strides, left.dtype, b.shape, right.strides, right.dtype, dtype
            multiply = _known_product(key)
            if multiply is not None:
                _warn_of_zero_one(a, b, "xnor_gemm")
                return multiply(left, right)
        home = _fast_path_home(a, b)
        if home is not None:
            if dtype is None:
                result_dtype = _fast_path_dtype(a, b)
            else:
                result_dtype = check_result_dtype(
                    dtype, a.shape[1], False, "xnor_gemm", on_cuda=home != HOST
                )
            if home == HOST:
                _warn_of_zero_one(a, b, "xnor_gemm")
                result = np.empty((a.shape[0], b.shape[1]), result_dtype)
                numpy_backend.gemm(a, b, result, None)
                if key is not None:
                    numpy_backend.prepare(key, a, b, result_dtype)
            else:
                result = _cuda().matmul(a, b, result_dtype, home)
            return result
    return problem.general_product(a, b, scale, bias, out, dtype)


def xnor_gemm_packed(a: Any, b: Any, *, threshold: Any = None, flip: Any = None) -> PackedMatrix:
    """Multiply the signs of two matrices and return the signs of the result, packed.

    Element (m, n) of the result is +1 where ``(product[m, n] >= threshold[n]) != flip[n]``. With
    `cupybnn.fold_batch_norm` this is a product, a batch norm and a sign in one call; the result can
    be the left operand of the next product.

    Parameters
    ----------
    a : array_like or PackedMatrix, shape (..., M, K) or (K,)
        As for `xnor_gemm`.
    b : array_like or PackedMatrix, shape (..., K, N)
        As for `xnor_gemm`.
    threshold : array of integers, shape (N,), or int, optional
        0 by default: the sign of the product itself.
    flip : array of bool, shape (N,), or bool, optional
        Whether to flip a column's sign; False by default.

    Returns
    -------
    PackedMatrix, shape (..., M, N)
        Packed along its last axis, on the operands' device.

    Raises
    ------
    TypeError, ValueError
        As `xnor_gemm`; and if `threshold` is not integer, `flip` is not bool, or the shape of
        either is not (N,).

    Examples
    --------
    >>> import numpy as np
    >>> import cupybnn
    >>> a = cupybnn.pack(np.array([[1, 1, -1], [-1, -1, -1]]))
    >>> b = cupybnn.pack(np.array([[1, -1], [1, 1], [1, -1]]), axis=-2)
    >>> cupybnn.xnor_gemm(a, b)
    array([[ 1,  1],
           [-3,  1]], dtype=int32)
    >>> signs = cupybnn.xnor_gemm_packed(a, b, threshold=np.array([0, 2], np.int32))
    >>> signs.unpack("int8")
    array([[ 1, -1],
           [-1, -1]], dtype=int8)
    """
    home = _fast_path_home(a, b)
    if home is None or threshold is not None or flip is not None:
        return problem.general_packed_product(a, b, threshold, flip)
    if home == HOST:
        _warn_of_zero_one(a, b, "xnor_gemm_packed")
    backend = numpy_backend if home == HOST else _cuda()
    words, popcounts = backend.gemm_packed(a, b, None, None)
    device = CPU if home == HOST else cuda_device(home)
    return PackedMatrix._of(words, popcounts, (a.shape[0], b.shape[1]), -1, device)


def _host_memory(x: Any, packed_axis: int) -> Any:
    """Return the elements of an operand in host memory, or its packed signs; else None."""
    kind = type(x)
    if kind is np.ndarray:
        return x
    if kind is PackedMatrix and x.axis == packed_axis and x.levels is SIGNS and x.device is CPU:
        return x.words
    return None


def _known_product(key: Any) -> Any:
    """Return what computes a product that has been computed before; see `numpy_backend.prepare`."""
    try:
        return numpy_backend.prepared.get(key) if settings.cpu_kernels() else None
    except TypeError:  # a dtype given as something that is no key
        return None


def _fast_path_home(a: Any, b: Any) -> int | None:
    """Return the location of two operands for the fast path; None for the general path.

    The fast path takes two matching matrices, each a NumPy or CuPy array or packed along K, on the
    current device.
    """
    home = _home(a, -1)
    if home is None or _home(b, -2) != home:
        return None
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or a.shape[1] > MAX_K:
        return None
    if home != HOST and current_cuda_device() != home:
        return None
    return home


def _home(x: Any, packed_axis: int) -> int | None:
    kind = type(x)
    if kind is PackedMatrix:
        if x.axis != packed_axis or x.levels is not SIGNS:
            return None
        return HOST if x.device.kind == "cpu" else x.device.index
    if kind is np.ndarray:
        return HOST if dtype_has_sign(x.dtype) else None
    if is_cupy(x) and dtype_has_sign(x.dtype):
        return x.data.device_id
    return None


def _warn_of_zero_one(a: Any, b: Any, function: str) -> None:
    if type(a) is np.ndarray and may_be_zero_one(a):
        warn_of_zero_one(a, f"'a' of {function}")
    if type(b) is np.ndarray and may_be_zero_one(b):
        warn_of_zero_one(b, f"'b' of {function}")


def _fast_path_dtype(a: Any, b: Any) -> np.dtype:
    return default_dtype(
        INT32 if type(a) is PackedMatrix else a.dtype, INT32 if type(b) is PackedMatrix else b.dtype
    )


@lru_cache(maxsize=1)
def _cuda() -> ModuleType:
    """Return the CUDA backend, imported on the first GPU product."""
    from cupybnn.backends import cuda

    return cuda

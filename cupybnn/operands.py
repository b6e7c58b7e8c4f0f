"""Rules for operands and result dtypes.

They apply to every function that takes signs: `cupybnn.sign`, `cupybnn.pack` and
`cupybnn.xnor_gemm`.
"""

from __future__ import annotations

import sys
import warnings
from functools import lru_cache
from typing import Any

import numpy as np

from cupybnn.backends.interop import as_native, type_name

__all__ = [
    "as_dtype",
    "as_operand",
    "check_cuda_dtype",
    "check_result_dtype",
    "default_dtype",
    "dtype_has_sign",
    "is_floating",
    "may_be_zero_one",
    "warn_of_zero_one",
]

INT32 = np.dtype(np.int32)
FLOAT32 = np.dtype(np.float32)


def is_floating(dtype: np.dtype) -> bool:
    """Whether `dtype` is a real floating type: one of NumPy's, or bfloat16."""
    return dtype.kind == "f" or dtype.name == "bfloat16"


@lru_cache(maxsize=256)
def dtype_has_sign(dtype: np.dtype) -> bool:
    """Whether elements of `dtype` have a sign: real floating, signed integer, bool."""
    return dtype.kind in "ib" or is_floating(dtype)


def as_operand(x: Any, what: str) -> Any:
    """Return `x` as a NumPy or CuPy array whose elements have signs.

    Parameters
    ----------
    x : array_like
    what : str
        Name of `x` in error messages, such as "'a' of xnor_gemm".

    Raises
    ------
    TypeError
        If the elements of `x` have no sign, or `x` is not an array.
    """
    array = as_native(x, what)
    if dtype_has_sign(array.dtype):
        return array
    kind = array.dtype.kind
    message = (
        f"The {what} must be an array of real floating, signed integer or bool numbers; "
        f"got dtype {array.dtype}"
    )
    if kind == "u":
        hint = (
            "Unsigned integers have no sign. If the data is 0 and 1, pass x.astype(bool) (True is "
            "+1, False is -1). "
        )
        if array.dtype == np.uint8:
            hint += (
                "If it comes from numpy.packbits, eight elements per byte, pass "
                "PackedMatrix.from_packbits(x, k, axis). "
            )
        hint += "If a threshold separates +1 from -1, pass x.astype('float32') - threshold."
    elif kind == "c":
        hint = "A complex number has no sign: pass x.real, x.imag or abs(x) - threshold."
    elif kind == "O" and type_name(x) != "numpy.ndarray":
        message += f" from {type_name(x)}"
        if isinstance(x, (list, tuple)):
            hint = "Its elements must all be numbers."
        elif hasattr(x, "toarray"):  # a sparse matrix of SciPy
            hint = "Convert it to an array: x.toarray()."
        else:
            hint = "Pass a numeric array."
    elif kind == "O":
        hint = "Convert it to numbers first: x.astype('float32')."
    else:
        hint = "Convert it first: x.astype('float32')."
    raise TypeError(f"{message}. {hint}")


def warn_of_zero_one(x: np.ndarray, what: str) -> None:
    """Warn if `x`, called `what` in the warning, holds only 0 and 1, and not only 1.

    The first elements rule out nearly every other array, which keeps small products fast.
    """
    if not may_be_zero_one(x):
        return
    head = x[(0,) * (x.ndim - 1)][:16].tolist()
    if not all(v == 0 or v == 1 for v in head) or not _is_zero_one(x):
        return
    warnings.warn(
        f"The {what} holds only 0 and 1, and the sign of both is +1. If they stand for -1 and +1, "
        f"pass x.astype(bool) or 2 * x - 1.",
        UserWarning,
        stacklevel=_levels_to_caller(),
    )


def may_be_zero_one(x: np.ndarray) -> bool:
    """Whether the first element of `x` is 0 or 1 and not a bool."""
    if x.size < 2:
        return False
    first = x.item(0)
    return (first == 0 or first == 1) and x.dtype.kind != "b"


def _is_zero_one(x: np.ndarray) -> bool:
    zeros = 0
    with np.errstate(invalid="ignore"):
        # In chunks, for any strides: allocates little, and most arrays stop early.
        chunks: Any = np.nditer(x, ["external_loop", "buffered"], buffersize=1 << 14)
        for chunk in chunks:
            zero = chunk == 0
            if not (zero | (chunk == 1)).all():
                return False
            zeros += int(np.count_nonzero(zero))
    return 0 < zeros < x.size


def _levels_to_caller() -> int:
    """Return the `stacklevel` of the first frame outside this package."""
    level, frame = 1, sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("cupybnn."):
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    return level


@lru_cache(maxsize=256)
def default_dtype(a: np.dtype, b: np.dtype) -> np.dtype:
    """Return the dtype of a product of arrays of dtypes `a` and `b`.

    It is the common floating type, at least float32, if either is floating, otherwise int32. An
    integer operand does not widen a float: only its sign counts.
    """
    floating = [d for d in (a, b) if is_floating(d)]
    if not floating:
        return INT32
    # Both half types are promoted to float32; NumPy cannot promote all pairs with bfloat16.
    wide = [d for d in floating if d.itemsize >= 4]
    result = FLOAT32
    for d in wide:
        result = np.promote_types(result, d)
    return result


def as_dtype(dtype: Any, what: str) -> np.dtype:
    """Return `dtype`, called `what` in errors, as a NumPy dtype; TypeError if it is not one."""
    try:
        return np.dtype(dtype)
    except (TypeError, ValueError, SyntaxError) as error:
        raise TypeError(f"The {what} must be a NumPy dtype; got {dtype!r}.") from error


def check_cuda_dtype(dtype: np.dtype, what: str) -> np.dtype:
    """Return `dtype`, called `what` in errors; TypeError if GPUs do not support it."""
    # CuPy allows arrays in the other byte order, but kernels write native order.
    if not dtype.isnative:
        raise TypeError(
            f"The {what} must have native byte order on a GPU; got {dtype}. "
            f"Use {dtype.newbyteorder('=')}."
        )
    if dtype.itemsize > 8:
        raise TypeError(f"The {what} must have at most 64 bits on a GPU; got {dtype}. Use float64.")
    return dtype


def check_result_dtype(
    dtype: Any,
    k: int,
    scaled: bool,
    function: str,
    what: str = "'dtype'",
    on_cuda: bool = False,
    top: int = 1,
) -> np.dtype:
    """Return `dtype`, called `what` in errors, after checking it for a product over K = `k`.

    `top` is the greatest level of the operands, 1 for signs.

    Raises
    ------
    TypeError
        If it is neither a real floating nor a signed integer type, an integer type for a product
        with scale or bias, or a type that GPUs do not support if `on_cuda`.
    ValueError
        If it is an integer type too small for -K ... K, times `top`.
    """
    try:
        hash(dtype)
    except TypeError:  # a list or dict may name a dtype but cannot be a cache key
        dtype = as_dtype(dtype, f"{what} of {function}")
    return _checked_result_dtype(dtype, k, scaled, function, what, on_cuda, top)


@lru_cache(maxsize=256)
def _checked_result_dtype(
    dtype: Any, k: int, scaled: bool, function: str, what: str, on_cuda: bool, top: int
) -> np.dtype:
    checked = as_dtype(dtype, f"{what} of {function}")
    if on_cuda and (checked.kind == "i" or is_floating(checked)):
        check_cuda_dtype(checked, f"{what} of {function}")
    if is_floating(checked):
        return checked
    if checked.kind != "i":
        reason = ", because the product has negative values" if checked.kind in "ub" else ""
        raise TypeError(
            f"The {what} of {function} must be a real floating or signed integer type{reason}; "
            f"got {checked}."
        )
    if scaled:
        raise TypeError(
            f"The {what} of {function} must be a floating type with a scale or a bias; "
            f"got {checked}."
        )
    if k * top > np.iinfo(checked).max:
        most = "K" if top == 1 else f"{top}·K"
        raise ValueError(
            f"The {what} of {function} must hold every integer from -{most} to {most}; got "
            f"{checked} (at most {np.iinfo(checked).max}) for K = {k}. Use a wider integer type or "
            f"a floating one."
        )
    return checked

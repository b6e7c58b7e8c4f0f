"""Argument handling of a product: the general path of `xnor_gemm` and `xnor_gemm_packed`.

Vectors become matrices, leading axes are broadcast, the dtype is chosen, ``out`` is checked, and
errors refer to the caller's arguments. Then a backend computes the product. What is done with it,
by scale, bias, threshold and flip, is checked in `cupybnn.epilogues`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cupybnn import backends
from cupybnn.backends.devices import CPU, Device, current_cuda_device, device_of, is_cupy
from cupybnn.backends.epilogue import Epilogue
from cupybnn.backends.interop import type_name
from cupybnn.backends.levels import SIGNS
from cupybnn.epilogues import checked_epilogue, checked_flip, checked_threshold
from cupybnn.operands import (
    INT32,
    as_operand,
    check_result_dtype,
    default_dtype,
    is_floating,
    warn_of_zero_one,
)
from cupybnn.packed import PackedMatrix, pack

__all__ = ["general_packed_product", "general_product"]


@dataclass(frozen=True)
class _Problem:
    """Two matching operands: matrices or batches of matrices, on one device."""

    a: Any
    b: Any
    batch: tuple[int, ...]
    m: int
    n: int
    k: int
    device: Device
    a_is_vector: bool
    b_is_vector: bool
    dtypes: tuple[np.dtype, np.dtype]  # of the operands, int32 for packed ones
    top: int = 1  # the greatest level of an operand

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        return (*self.batch, self.m, self.n)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result as in matmul: a vector adds no axis."""
        rows = () if self.a_is_vector else (self.m,)
        cols = () if self.b_is_vector else (self.n,)
        return self.batch + rows + cols

    def as_matrix(self, out: Any) -> Any:
        """Return a view of an array of `shape` with `matrix_shape`."""
        if self.b_is_vector:
            out = out[..., None]
        if self.a_is_vector:
            out = out[..., None, :]
        return out


def general_product(a: Any, b: Any, scale: Any, bias: Any, out: Any, dtype: Any) -> Any:
    """Check all arguments of `cupybnn.xnor_gemm` and compute the product."""
    function = "xnor_gemm"
    problem = _arrange(a, b, function)
    with problem.device.scope():
        shape = problem.matrix_shape
        epilogue = checked_epilogue(problem.device, shape, scale, bias, function)
        result_dtype = _result_dtype(problem, dtype, out, epilogue is not None, function)
        if out is None:
            result = problem.device.xp.empty(problem.shape, result_dtype)
        else:
            _check_out(problem, out, result_dtype, function)
            result, epilogue = _avoid_overlap(problem, out, epilogue)
        backend = backends.get(problem.device)
        backend.gemm(problem.a, problem.b, problem.as_matrix(result), epilogue)
        if out is not None:
            if result is not out:
                out[...] = result
            return out
    # As in matmul, two vectors give a number: a scalar in NumPy, a 0-d array in CuPy.
    return result[()] if problem.device.kind == "cpu" else result


def general_packed_product(a: Any, b: Any, threshold: Any, flip: Any) -> PackedMatrix:
    """Check all arguments of `cupybnn.xnor_gemm_packed` and compute the product."""
    function = "xnor_gemm_packed"
    problem = _arrange(a, b, function)
    if problem.b_is_vector:
        raise ValueError(
            f"The 'b' of {function} must have at least two axes, because the result is packed "
            f"along its columns; got shape {problem.b.shape[:1]}."
        )
    if problem.a_is_vector and problem.batch:
        raise ValueError(
            f"The 'a' of {function} must be a matrix if 'b' has leading axes; got a vector. "
            f"Make it a matrix of one row: a[None, :]."
        )
    check_result_dtype(INT32, problem.k, False, function, top=problem.top)
    with problem.device.scope():
        words, popcounts = backends.get(problem.device).gemm_packed(
            problem.a,
            problem.b,
            checked_threshold(problem.device, problem.n, threshold, function),
            checked_flip(problem.device, problem.n, flip, function),
        )
    return PackedMatrix._of(words, popcounts, problem.shape, -1, problem.device)


def _arrange(a: Any, b: Any, function: str) -> _Problem:
    """Convert two operands to matching matrices; raise an error if they do not match."""
    given = {"a": a, "b": b}
    x = {
        name: value
        if isinstance(value, PackedMatrix)
        else as_operand(value, f"{name!r} of {function}")
        for name, value in given.items()
    }
    device = _common_device(x["a"], x["b"], function)
    for name, value in x.items():
        if device == CPU and not isinstance(value, PackedMatrix):
            warn_of_zero_one(value, f"{name!r} of {function}")
        if value.ndim == 0:
            raise ValueError(
                f"The {name!r} of {function} must have at least one axis; got a scalar "
                f"({type_name(given[name])}). Multiply by it instead, or use scale=."
            )
    shapes = f"'a' has shape {x['a'].shape} and 'b' has shape {x['b'].shape}"
    matrix_a, matrix_b = _matrix(x["a"], -1), _matrix(x["b"], -2)
    k = matrix_a.shape[-1]
    if matrix_b.shape[-2] != k:
        raise ValueError(
            f"The 'b' of {function} must have as many rows as 'a' has columns (K); {shapes}: "
            f"K is {k} in 'a' and {matrix_b.shape[-2]} in 'b'."
        )
    for name, value, axis in (("a", matrix_a, -1), ("b", matrix_b, -2)):
        if isinstance(value, PackedMatrix) and value.axis != axis:
            raise ValueError(
                f"The {name!r} of {function} must be packed along its K axis, axis {axis}; got a "
                f"matrix packed along axis {value.axis}. Make it with pack(x, axis={axis}), or "
                f"pass its transpose .T if that is what you mean."
            )
    try:
        batch = np.broadcast_shapes(matrix_a.shape[:-2], matrix_b.shape[:-2])
    except ValueError:
        raise ValueError(
            f"The leading axes of 'a' and 'b' of {function} must broadcast together; {shapes}."
        ) from None
    left, right = (INT32 if isinstance(x, PackedMatrix) else x.dtype for x in (matrix_a, matrix_b))
    top = 1
    if any(isinstance(x, PackedMatrix) and x.levels is not SIGNS for x in (matrix_a, matrix_b)):
        matrix_a, matrix_b, top = _one_of_levels(matrix_a, matrix_b, function)
    return _Problem(
        a=matrix_a,
        b=matrix_b,
        batch=batch,
        m=matrix_a.shape[-2],
        n=matrix_b.shape[-1],
        k=k,
        device=device,
        a_is_vector=x["a"].ndim == 1,
        b_is_vector=x["b"].ndim == 1,
        dtypes=(left, right),
        top=top,
    )


def _one_of_levels(a: Any, b: Any, function: str) -> tuple[PackedMatrix, PackedMatrix, int]:
    """Return two operands, of which one has levels other than signs, packed, and the greatest."""
    packed = [
        x if isinstance(x, PackedMatrix) else pack(x, axis=axis) for x, axis in ((a, -1), (b, -2))
    ]
    first, second = (x.levels for x in packed)
    if first is not SIGNS and second is not SIGNS:
        raise ValueError(
            f"One operand of {function} must be one of signs; 'a' has {first} per element and 'b' "
            f"{second}. Pack one of them with bits=1, or multiply the unpacked arrays: a.unpack()."
        )
    return packed[0], packed[1], (second if first is SIGNS else first).top


def _matrix(x: Any, k_axis: int) -> Any:
    """Turn a vector into a matrix of one row (`k_axis` -1) or one column (-2)."""
    if x.ndim > 1:
        return x
    if not isinstance(x, PackedMatrix):
        return x[None, :] if k_axis == -1 else x[:, None]
    shape = (1, x.k) if k_axis == -1 else (x.k, 1)
    return PackedMatrix._of(x.words, x.popcounts, shape, k_axis, x.device, x.levels)


def _device_of(x: Any) -> Device:
    return x.device if isinstance(x, PackedMatrix) else device_of(x)


def _describe(x: Any) -> str:
    return f"a PackedMatrix on {x.device}" if isinstance(x, PackedMatrix) else type_name(x)


def _common_device(a: Any, b: Any, function: str) -> Device:
    where_a, where_b = _device_of(a), _device_of(b)
    if where_a.kind != where_b.kind:
        raise TypeError(
            f"The operands of {function} must both be NumPy or both be CuPy; 'a' is {_describe(a)} "
            f"and 'b' is {_describe(b)}. Move one: cupy.asarray(x), cupy.asnumpy(x), or to_cupy() "
            f"and to_numpy() of a PackedMatrix."
        )
    if where_a != where_b:
        raise ValueError(
            f"The operands of {function} must be on one device; 'a' is on {where_a} and 'b' is on "
            f"{where_b}."
        )
    _check_current(where_a, f"operands of {function}")
    return where_a


def _check_current(device: Device, what: str) -> None:
    if device != CPU and device.index != (current := current_cuda_device()):
        raise ValueError(
            f"The {what} must be on the current device, cuda:{current}; got {device}. Make it "
            f"current: with cupy.cuda.Device({device.index})."
        )


def _result_dtype(problem: _Problem, dtype: Any, out: Any, scaled: bool, function: str) -> np.dtype:
    on_cuda = problem.device != CPU
    if dtype is not None:
        return check_result_dtype(
            dtype, problem.k, scaled, function, on_cuda=on_cuda, top=problem.top
        )
    if out is not None:
        if not isinstance(out, np.ndarray) and not is_cupy(out):
            raise TypeError(
                f"The 'out' of {function} must be a NumPy or CuPy array; got {type_name(out)}."
            )
        what = "dtype of 'out'"
        return check_result_dtype(
            out.dtype, problem.k, scaled, function, what, on_cuda=on_cuda, top=problem.top
        )
    default = default_dtype(*problem.dtypes)
    if scaled and not is_floating(default):
        default = np.dtype(np.float32)
    return check_result_dtype(default, problem.k, scaled, function, top=problem.top)


def _check_out(problem: _Problem, out: Any, dtype: np.dtype, function: str) -> None:
    what = f"'out' of {function}"
    xp = problem.device.xp
    if not isinstance(out, xp.ndarray) or isinstance(out, np.ma.MaskedArray):
        raise TypeError(
            f"The {what} must be a {xp.__name__}.ndarray, like the operands; got {type_name(out)}."
        )
    if device_of(out) != problem.device:
        raise ValueError(
            f"The {what} must be on the operands' device, {problem.device}; got {device_of(out)}."
        )
    if out.shape != problem.shape:
        raise ValueError(
            f"The {what} must have the result's shape, {problem.shape}; got {out.shape}."
        )
    if out.dtype != dtype:
        raise TypeError(
            f"The {what} must have the dtype given as 'dtype', {dtype}; got {out.dtype}. "
            f"Pass only one of the two."
        )
    if problem.device == CPU and not out.flags.writeable:
        raise ValueError(f"The {what} must be writable; got a read-only array.")
    if any(n > 1 and stride == 0 for n, stride in zip(out.shape, out.strides, strict=True)):
        raise ValueError(
            f"The {what} must have separate memory for each element; got one of shape "
            f"{out.shape} and strides {out.strides}, which repeats elements. Pass a copy: x.copy()."
        )


def _avoid_overlap(
    problem: _Problem, out: Any, epilogue: Epilogue | None
) -> tuple[Any, Epilogue | None]:
    """Return an output array and an epilogue such that no input overlaps the output.

    A backend still reads operands, scales and bias while it writes. If operands overlap `out`, the
    product goes to new memory; scales and bias, which are smaller, are copied. Only address ranges
    are compared: deciding whether views within a range share an element may take longer than a
    copy.
    """
    xp = problem.device.xp
    read = [
        part
        for x in (problem.a, problem.b)
        for part in ((x.words, x.popcounts) if isinstance(x, PackedMatrix) else (x,))
    ]
    if any(xp.may_share_memory(out, x) for x in read):
        return xp.empty(problem.shape, out.dtype), epilogue
    if epilogue is None:
        return out, None
    row, column, bias = (
        x.copy() if x is not None and xp.may_share_memory(out, x) else x
        for x in (epilogue.row_scale, epilogue.col_scale, epilogue.bias)
    )
    return out, Epilogue(row, column, bias)

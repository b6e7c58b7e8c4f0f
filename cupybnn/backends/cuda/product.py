"""Products: operands that are not packed are packed, then one kernel runs for any result."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from cupybnn.backends.cuda import dispatch, launching
from cupybnn.backends.cuda.packing import words_shape
from cupybnn.backends.cuda.product_launch import NO_COLUMNS, OUTPUTS, PACKED, ProductLaunch
from cupybnn.backends.devices import is_cupy
from cupybnn.backends.epilogue import Epilogue
from cupybnn.backends.levels import SIGNS, Levels

__all__ = [
    "forget_launches",
    "gemm",
    "gemm_packed",
    "matmul",
    "prepare",
    "prepare_packed",
    "prepare_scaled",
]

_launches = launching.Plans()
_tables = 0  # counts tuned tables: launches of an earlier one are not used


def forget_launches() -> None:
    """Prepare all launches anew, because the tuned table has changed."""
    global _tables
    _tables += 1


def _kind(x: Any) -> Any:
    """Return the properties of an operand that a launch depends on."""
    if isinstance(x, sys.modules["cupy"].ndarray):
        return x.shape, x.strides, x.dtype, x.data.ptr & 15
    return x.shape if x.levels is SIGNS else (x.shape, x.levels)


def _launch_for(
    a: Any, b: Any, batch_shape: tuple[int, ...], strides: tuple[int, int, int],
    output: int, scaled: bool, device: int,
) -> ProductLaunch:  # fmt: skip
    key = (
        _kind(a), _kind(b), batch_shape, strides, output, scaled, device, dispatch.forced(), _tables
    )  # fmt: skip
    launch = _launches.get(key)
    if launch is None:
        launch = ProductLaunch(
            a, b, batch_shape=batch_shape, strides=strides, output=output, scaled=scaled,
            device=device,
        )  # fmt: skip
        _launches.keep(key, launch)
    found: ProductLaunch = launch
    return found


def matmul(a: Any, b: Any, dtype: np.dtype, device: int) -> Any:
    """Return the product of the signs of two matrices in a new array.

    The same as `gemm` into a new array, with less of the host's time.

    Parameters
    ----------
    a, b : cupy.ndarray or PackedMatrix
        (M, K) and (K, N), on the current device; a PackedMatrix is packed along K.
    dtype : dtype
        Any valid result dtype.
    device : int
        The current device.

    Returns
    -------
    cupy.ndarray, shape (M, N)
    """
    key = (_kind(a), _kind(b), dtype, device, dispatch.forced(), _tables)
    found = _launches.get(key)
    if found is None:
        n = b.shape[1]
        shape = (a.shape[0], n)
        output = OUTPUTS.get(dtype.char)
        if output is None or 0 in shape:
            out = launching.empty(shape, dtype)
            gemm(a, b, out, None)
            return out
        launch = _launch_for(a, b, (), (n, 1, 0), output, False, device)
        found = _launches.keep(key, (launch, shape))
    launch, shape = found
    out = launching.empty(shape, dtype)
    launch(a, b, out=(out.data.ptr, 0))
    return out


def gemm(a: Any, b: Any, out: Any, epilogue: Epilogue | None) -> None:
    """Fill `out` with the product of the signs of `a` and `b`.

    Parameters
    ----------
    a, b : cupy.ndarray or PackedMatrix
        (*batch_a, M, K) and (*batch_b, K, N), on the current device; a PackedMatrix is packed along
        K. The batch shapes broadcast to that of `out`.
    out : cupy.ndarray, shape (*batch, M, N)
        With any strides and any valid result dtype.
    epilogue : Epilogue or None
        Scale and bias, or None for the integers.
    """
    if out.size == 0:
        return
    shape = out.shape
    output = OUTPUTS.get(out.dtype.char)
    if output is None or (len(shape) > 3 and not out.flags.c_contiguous):
        _gemm_through_copy(a, b, out, epilogue)
        return
    strides, itemsize = out.strides, out.itemsize
    batch_shape = shape[:-2]
    batch_stride = strides[-3] // itemsize if batch_shape else 0
    if batch_shape:
        a, b = _batched(a, -1, batch_shape), _batched(b, -2, batch_shape)
        batch_shape = (math.prod(batch_shape),)
    steps = (strides[-2] // itemsize, strides[-1] // itemsize, batch_stride)
    launch = _launch_for(a, b, batch_shape, steps, output, epilogue is not None, out.data.device_id)
    if epilogue is None:
        launch(a, b, out=(out.data.ptr, 0))
    else:
        # Keep references until the launch.
        rows = _scale(epilogue.row_scale, shape[:-2], shape[-2])
        cols = _scale(epilogue.col_scale, shape[:-2], shape[-1])
        bias = _scale(epilogue.bias, shape[:-2], shape[-1])
        if launch.swap:
            rows, cols = cols, rows
        columns = (rows[1], cols[1], bias[1], 0, 0)
        strides = (rows[2], cols[2], bias[2])
        launch(a, b, out=(out.data.ptr, 0), columns=columns, strides=strides)


class _Batch:
    """A packed operand with its batch axes merged."""

    __slots__ = ("levels", "popcounts", "shape", "words")

    def __init__(self, words: Any, popcounts: Any, shape: tuple[int, ...], levels: Levels) -> None:
        self.words, self.popcounts, self.shape, self.levels = words, popcounts, shape, levels


def _batched(x: Any, axis: int, batch_shape: tuple[int, ...]) -> Any:
    """Return an operand with one batch axis, or none if one matrix serves the whole batch.

    An operand that is broadcast along only some of several batch axes is copied out.
    """
    own = x.shape[:-2]
    matrix = x.shape[-2:]
    count = math.prod(batch_shape)
    if math.prod(own) == 1 and count > 1:
        if is_cupy(x):
            return x.reshape(matrix)
        return _Batch(x.words, x.popcounts, matrix, x.levels)
    if is_cupy(x):
        if own != batch_shape:
            import cupy

            x = cupy.broadcast_to(x, (*batch_shape, *matrix))
        return x if x.ndim == 3 else x.reshape(count, *matrix)
    words, popcounts = x.words, x.popcounts
    if own != batch_shape:
        import cupy

        lines = matrix[0] if axis == -1 else matrix[1]
        words = words.reshape(*own, -1)
        words = cupy.ascontiguousarray(cupy.broadcast_to(words, (*batch_shape, words.shape[-1])))
        popcounts = cupy.ascontiguousarray(
            cupy.broadcast_to(popcounts.reshape(*own, lines), (*batch_shape, lines))
        )
    return _Batch(words, popcounts, (count, *matrix), x.levels)


def _scale(x: Any, batch_shape: tuple[int, ...], length: int) -> tuple[Any, int, int]:
    """Return a scale or bias as `length` float32 per product, with its address and batch stride."""
    if x is None:
        return None, 0, 0
    import cupy

    varies = math.prod(x.shape[:-2]) > 1
    if varies:  # (*batch, M, 1) or (*batch, 1, N)
        x = cupy.broadcast_to(x.reshape(*x.shape[:-2], -1), (*batch_shape, length))
    else:
        x = cupy.broadcast_to(x.reshape(-1), (length,))
    x = cupy.ascontiguousarray(x, dtype=np.float32)
    return x, x.data.ptr, length if varies else 0


def _gemm_through_copy(a: Any, b: Any, out: Any, epilogue: Epilogue | None) -> None:
    """Multiply into an array that the kernels can write, then convert."""
    import cupy

    native = out.dtype.char in OUTPUTS
    result = cupy.empty(out.shape, out.dtype if native else np.int32)
    gemm(a, b, result, epilogue if native else None)
    if epilogue is not None and not native:
        # Wider than float32: the same steps in that precision.
        result = result.astype(np.result_type(out.dtype, np.float32))
        for scale in (epilogue.row_scale, epilogue.col_scale):
            if scale is not None:
                result *= scale
        if epilogue.bias is not None:
            result += epilogue.bias
    out[...] = result


def gemm_packed(a: Any, b: Any, threshold: Any, flip: Any) -> tuple[Any, Any]:
    """Multiply, compare with a threshold per column, and return the packed signs.

    Parameters
    ----------
    a, b : cupy.ndarray or PackedMatrix
        As for `gemm`.
    threshold : cupy.ndarray of int32, shape (N,), contiguous, or None
        A result's bit is 1 where it is at least this (None: 0), unless flipped.
    flip : cupy.ndarray of bool, shape (N,), contiguous, or None

    Returns
    -------
    words, popcounts : cupy.ndarray
        Of the (*batch, M, N) result, packed along its last axis.

    Raises
    ------
    ValueError
        If K is 2**30 or more.
    """
    (m, k), n = a.shape[-2:], b.shape[-1]
    batch_shape: tuple[int, ...] = ()
    if len(a.shape) > 2 or len(b.shape) > 2:
        batch_shape = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    top = max(getattr(x, "levels", SIGNS).top for x in (a, b))
    if k * top >= 2**30:
        most = "K" if top == 1 else f"{top}·K"
        raise ValueError(
            f"A product with a packed result must have {most} below 2**30, because its distance "
            f"from the threshold must fit an int32; got K = {k}. Use xnor_gemm and pack its signs."
        )
    batch = math.prod(batch_shape)
    shape = words_shape(batch, m, n)
    if batch * m * n == 0:
        import cupy

        return cupy.zeros(shape, np.uint32), cupy.zeros((*batch_shape, m), np.int32)
    words = launching.empty(shape, np.uint32)
    device, stream = words.data.device_id, launching.current_stream()
    # The kernels add up to these.
    popcounts = launching.empty(
        (*batch_shape, m), np.int32, launching.zeros(4 * batch * m, device, stream)
    )
    if batch_shape:
        a, b = _batched(a, -1, batch_shape), _batched(b, -2, batch_shape)
        batch_shape = (batch,)
    launch = _launch_for(a, b, batch_shape, (0, 0, 0), PACKED, False, device)
    columns = NO_COLUMNS
    if threshold is not None or flip is not None:
        columns = (0, 0, 0, *(0 if x is None else x.data.ptr for x in (threshold, flip)))
    launch(a, b, out=(words.data.ptr, popcounts.data.ptr), columns=columns, stream=stream)
    return words, popcounts


def prepare_packed(
    a: Any, b: Any, threshold: Any, flip: Any, words: Any, popcounts: Any
) -> Callable[[int], None]:
    """Return the launch of a `gemm_packed` of two packed matrices, for results in given memory.

    Parameters
    ----------
    a, b : PackedMatrix
        (M, K) and (K, N), none of them 0.
    threshold, flip : cupy.ndarray
    words, popcounts : cupy.ndarray
        What it returns; zeros before the launch. The caller keeps all arrays.
    """
    launch = _launch_for(a, b, (), (0, 0, 0), PACKED, False, words.data.device_id)
    columns = (0, 0, 0, threshold.data.ptr, flip.data.ptr)
    return launch.prepared(a, b, (words.data.ptr, popcounts.data.ptr), columns)


def prepare(a: Any, b: Any, out: Any) -> Callable[[int], None]:
    """Return the launch of a `gemm` of two packed matrices without an epilogue.

    Parameters
    ----------
    a, b : PackedMatrix
        (M, K) and (K, N), none of them 0.
    out : cupy.ndarray, shape (M, N), C-contiguous
        The caller keeps all arrays.
    """
    steps = out.strides[0] // out.itemsize, 1, 0
    launch = _launch_for(a, b, (), steps, OUTPUTS[out.dtype.char], False, out.data.device_id)
    return launch.prepared(a, b, (out.data.ptr, 0))


def prepare_scaled(
    a: Any, b: Any, out: Any, *, rows: Any = None, columns: Any = None
) -> Callable[[int], None]:
    """Return the launch of a `gemm` of two packed matrices with scales.

    Parameters
    ----------
    a, b : PackedMatrix
        (M, K) and (K, N), none of them 0.
    out : cupy.ndarray, shape (M, N), C-contiguous
        float32, or uint16 for bfloat16. The caller keeps all arrays.
    rows, columns : cupy.ndarray of float32, shapes (M,) and (N,), optional
        The scales of the product's rows and columns.
    """
    steps = out.strides[0] // out.itemsize, 1, 0
    output = OUTPUTS["E" if out.dtype.char == "H" else out.dtype.char]
    launch = _launch_for(a, b, (), steps, output, True, out.data.device_id)
    scales = [0 if x is None else x.data.ptr for x in (rows, columns)]
    if launch.swap:
        scales.reverse()
    return launch.prepared(a, b, (out.data.ptr, 0), (*scales, 0, 0, 0))

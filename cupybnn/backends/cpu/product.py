"""Packing and products by compiled kernels: their arguments, and parts for the threads."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

import numpy as np

from cupybnn import settings
from cupybnn.backends import epilogue as epilogues
from cupybnn.backends.cpu import kernels
from cupybnn.backends.cpu.cache import features, folder
from cupybnn.backends.cpu.intrinsics import KINDS, SIZES
from cupybnn.backends.cpu.threads import run
from cupybnn.backends.epilogue import Epilogue

__all__ = ["can_pack", "describe", "gemm", "gemm_packed", "pack", "takes"]

MAX_K = np.iinfo(np.int32).max
EXACT_FLOAT32 = 1 << 24

# With at most so many lines in one operand, lines are compared one by one.
FEW_LANES = 8
# Fewer rows than this are lanes, so that few columns of a tile are left empty.
FEW_ROWS = 64
# What is worth a second thread: multiplications, and elements to pack (100 and 40 microseconds).
PRODUCTS_A_THREAD, ELEMENTS_A_THREAD = 1 << 25, 1 << 17
# Parts for each thread, so that none waits long for another.
PARTS_A_THREAD = 8
# Elements of int32 sums at a time, for results that NumPy converts.
SUMS_AT_A_TIME = 1 << 20

WORD = np.dtype("<u8")


def _aligned(size: int) -> np.ndarray:
    """Return `size` bytes that start at a cache line."""
    memory = np.empty(size + 64, np.uint8)
    first = -memory.ctypes.data % 64
    return memory[first : first + size]


def _address(x: np.ndarray | None) -> int:
    return 0 if x is None else x.__array_interface__["data"][0]


_table = _aligned(1 << 13)
_table[:] = kernels.table().reshape(-1)
_TABLE = _address(_table)


class _Scratch(threading.local):
    """The memory of each thread."""

    def __init__(self) -> None:
        self.memory = _aligned(kernels.SCRATCH_BYTES)
        self.address = _address(self.memory)


_scratch = _Scratch()
_cpu, _features = features()
#: How a product of more than a few lines is computed on this processor.
METHOD = (
    kernels.LOOKUP if "avx2" in _features and "avx512vpopcntdq" not in _features else kernels.COUNT
)


def describe() -> dict[str, Any]:
    """Return what ``cupybnn info`` shows: processor, instructions, threads, folder of the cache."""
    shown = ("avx512vpopcntdq", "avx512bw", "avx2", "popcnt", "neon", "sve")
    return {
        "cpu": _cpu,
        "features": [name for name in shown if name in _features],
        "method": "table lookups" if METHOD == kernels.LOOKUP else "popcounts",
        "threads": settings.kernel_threads(),
        "cache": folder(kernels.product),
    }


# Packing ---------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _kind(dtype: np.dtype) -> int | None:
    return KINDS.get(dtype.name) if dtype.isnative else None


def can_pack(dtype: np.dtype) -> bool:
    """Whether arrays of `dtype` can be packed here: in native byte order, at most 64 bits."""
    return _kind(dtype) is not None


def pack(x: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack the signs of `x`, of a dtype that `can_pack`, as `numpy_backend.pack`."""
    batch, k, lines = x.shape[:-2], x.shape[axis], x.shape[-3 - axis]
    words = np.empty((*batch, lines, -(-k // 64)), WORD)
    ones = np.empty((*batch, lines), np.int32)
    if lines == 0 or ones.size == 0:
        return words, ones
    kind = _kind(x.dtype)
    assert kind is not None
    for index in np.ndindex(batch):
        _pack_matrix(x[index], axis, kind, words[index], ones[index])
    return words, ones


def _pack_matrix(x: np.ndarray, axis: int, kind: int, words: np.ndarray, ones: np.ndarray) -> None:
    k, lines = x.shape[axis], x.shape[-1 - axis - 2]
    k_stride, line_stride = x.strides[axis], x.strides[-3 - axis]
    source, out, counts = _address(x), _address(words), _address(ones)
    threads = min(settings.kernel_threads(), x.size // ELEMENTS_A_THREAD)
    step = lines
    if threads > 1:
        tile = 64 if line_stride == SIZES[kind] else 1
        step = -(-lines // (PARTS_A_THREAD * threads * tile)) * tile
    parts, size = -(-lines // step), SIZES[kind]

    def kernel(counter: int) -> None:
        kernels.pack(
            counter, parts, source, line_stride, k_stride, lines, step, k, kind, size, out,
            words.strides[0], counts,
        )  # fmt: skip

    run(kernel, parts, threads)


def _words(operand: Any, k_axis: int) -> np.ndarray:
    """Return the packed words of an operand's lines, shape (..., lines, words)."""
    if isinstance(operand, np.ndarray):
        return pack(operand, k_axis)[0]
    words = operand.words
    return words if words.strides[-1] == 8 else np.ascontiguousarray(words)


# Products --------------------------------------------------------------------------------------


def takes(a: Any, b: Any) -> bool:
    """Whether the operands of a product can be taken: see `can_pack`, and K within int32."""
    return 0 < a.shape[-1] <= MAX_K and all(
        can_pack(x.dtype) for x in (a, b) if isinstance(x, np.ndarray)
    )


def gemm(a: Any, b: Any, out: np.ndarray, epilogue: Epilogue | None) -> None:
    """Write the product of operands that this `takes`, not empty, as `numpy_backend.gemm`."""
    k = a.shape[-1]
    left, right = _words(a, -1), _words(b, -2)
    if epilogue is not None:
        epilogue = epilogue.broadcast(out.shape)
    if out.ndim == 2:
        _matrix_product(left, right, k, out, epilogue)
        return
    if right.ndim == 2 and epilogue is None and out.flags.c_contiguous:  # one tall product
        rows = np.ascontiguousarray(left).reshape(-1, left.shape[-1])
        _matrix_product(rows, right, k, out.reshape(-1, out.shape[-1]), None)
        return
    batch = out.shape[:-2]
    left = np.broadcast_to(left, (*batch, *left.shape[-2:]))
    right = np.broadcast_to(right, (*batch, *right.shape[-2:]))
    every = slice(None)
    for index in np.ndindex(batch):
        part = None if epilogue is None else epilogue.part(index, every, every)
        _matrix_product(left[index], right[index], k, out[index], part)


def _matrix_product(
    a: np.ndarray, b: np.ndarray, k: int, out: np.ndarray, epilogue: Epilogue | None
) -> None:
    if out.dtype == np.int32 and epilogue is None:
        _launch(a, b, k, out, kernels.INT32, (None, None, None))
    elif out.dtype == np.float32:
        given = epilogue or Epilogue()
        parts = (_flat(given.row_scale), _flat(given.col_scale), _flat(given.bias))
        _launch(a, b, k, out, kernels.FLOAT32, parts)
    else:
        step = max(1, SUMS_AT_A_TIME // out.shape[1])
        every = slice(None)
        for start in range(0, len(out), step):
            rows = slice(start, start + step)
            sums = np.empty((len(a[rows]), out.shape[1]), np.int32)
            _launch(a[rows], b, k, sums, kernels.INT32, (None, None, None))
            # From the same numbers as NumPy's product, so that all roundings are the same.
            exact = sums.astype(np.float32 if k <= EXACT_FLOAT32 else np.float64)
            part = None if epilogue is None else epilogue.part((), rows, every)
            epilogues.apply(exact, part, out[rows])


def _flat(x: np.ndarray | None) -> np.ndarray | None:
    return None if x is None else x.astype(np.float32).reshape(-1)


def gemm_packed(
    a: Any, b: Any, threshold: np.ndarray | None, flip: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return words and popcounts of a thresholded product, as `numpy_backend.gemm_packed`."""
    k = a.shape[-1]
    left, right = _words(a, -1), _words(b, -2)
    batch = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    m, n = left.shape[-2], right.shape[-2]
    words = np.zeros((*batch, m, -(-n // 64)), WORD)
    left = np.broadcast_to(left, (*batch, *left.shape[-2:]))
    right = np.broadcast_to(right, (*batch, *right.shape[-2:]))
    columns = (
        None if flip is None else np.ascontiguousarray(flip, bool),
        None,
        None if threshold is None else np.ascontiguousarray(threshold, np.int32),
    )
    for index in np.ndindex(batch):
        _launch(left[index], right[index], k, words[index], kernels.BITS, columns)
    return words, np.bitwise_count(words).sum(axis=-1, dtype=np.int32)


def _launch(
    a: np.ndarray,
    b: np.ndarray,
    k: int,
    out: np.ndarray,
    kind: int,
    parts: tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None],
) -> None:
    """Run the kernel, on several threads where that is worth it.

    Parameters
    ----------
    a, b : ndarray of uint64, shapes (M, words) and (N, words)
    out : ndarray, shape (M, N), or words of shape (M, ceil(N / 64))
    parts : scale of rows, scale of columns, bias; for bits flip, None, threshold
    """
    m, n = len(a), len(b)
    by_column = kind != kernels.BITS and abs(out.strides[0]) < abs(out.strides[1])
    swapped = n > m if min(m, n) < FEW_ROWS else by_column
    row, column, bias = (_address(x) for x in parts)
    if swapped:
        units, lanes = b, a
        strides = (out.strides[1], out.strides[0])
        scales = (column, row)
    else:
        units, lanes = a, b
        strides = (out.strides[0], out.strides[1])
        scales = (row, column)
    if kind == kernels.BITS:
        scales = (row, 0)
    count, others, words = len(lanes), len(units), a.shape[1]
    method = kernels.FEW if count <= FEW_LANES else METHOD
    block = kernels.block_of(words)
    unit, lane, result = _address(units), _address(lanes), _address(out)
    threads = min(settings.kernel_threads(), m * n * k // PRODUCTS_A_THREAD)
    u_step, l_step = _steps(others, count, block, threads)
    total = -(-others // u_step) * -(-count // l_step)

    def kernel(counter: int) -> None:
        kernels.product(
            counter, total, method, _TABLE, _scratch.address, block, words, k, unit,
            units.strides[0], others, u_step, lane, lanes.strides[0], count, l_step, result,
            *strides, kind, int(swapped), *scales, bias,
        )  # fmt: skip

    run(kernel, total, threads)


def _steps(units: int, lanes: int, block: int, threads: int) -> tuple[int, int]:
    """Return the units and lanes of a part: as many parts as threads need, no smaller."""
    if threads < 2:
        return units, lanes
    wanted = PARTS_A_THREAD * threads
    u_step, l_step = min(units, block), lanes
    rows = -(-units // u_step)
    if rows < wanted:  # first by lanes, whose parts share the block of units
        tiles = -(-lanes // kernels.LANES)
        l_step = max(1, tiles * rows // wanted) * kernels.LANES
        columns = -(-lanes // l_step)
        if rows * columns < wanted:
            u_step = -(-u_step * rows * columns // (wanted * 64)) * 64
    return u_step, l_step

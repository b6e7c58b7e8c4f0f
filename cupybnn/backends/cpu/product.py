"""Packing and products by compiled kernels: their arguments, and parts for the threads."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

import numpy as np

from cupybnn import settings
from cupybnn.backends import epilogue as epilogues
from cupybnn.backends.cpu import kernels, packing
from cupybnn.backends.cpu.addresses import address
from cupybnn.backends.cpu.cache import features, folder
from cupybnn.backends.cpu.intrinsics import KINDS, SIZES
from cupybnn.backends.cpu.threads import run
from cupybnn.backends.epilogue import Epilogue

__all__ = ["can_pack", "describe", "gemm", "gemm_packed", "pack", "takes"]

MAX_K = np.iinfo(np.int32).max
EXACT_FLOAT32 = 1 << 24

# With at most so many lines in one operand, lines are compared one by one.
FEW_LANES = 4
# With fewer lines than this in one operand, it decides which is taken as lanes.
FEW_ROWS = 64
# A multiplication takes so many times as long if lines are compared one by one.
LONGER_BY_LINE = 4
# What is worth a second thread: multiplications, and elements to pack (100 and 40 microseconds).
PRODUCTS_A_THREAD, ELEMENTS_A_THREAD = 1 << 25, 1 << 17
# Parts for each thread, so that none waits long for another.
PARTS_A_THREAD = 8
# Elements of int32 sums at a time, for results that NumPy converts.
SUMS_AT_A_TIME = 1 << 20

WORD = np.dtype("<u8")
INT32, FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)


def _aligned(size: int) -> np.ndarray:
    """Return `size` bytes that start at a cache line."""
    memory = np.empty(size + 64, np.uint8)
    first = -memory.ctypes.data % 64
    return memory[first : first + size]


_table = _aligned(1 << 13)
_table[:] = kernels.table().reshape(-1)
_TABLE = address(_table)


class _Scratch(threading.local):
    """The memory of each thread."""

    def __init__(self) -> None:
        self.memory = _aligned(kernels.SCRATCH_BYTES)
        self.address = address(self.memory)


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
    source, out, counts = address(x), address(words), address(ones)
    threads = min(settings.kernel_threads(), x.size // ELEMENTS_A_THREAD)
    step = lines
    if threads > 1:
        tile = 64 if line_stride == SIZES[kind] else 1
        step = -(-lines // (PARTS_A_THREAD * threads * tile)) * tile
    parts, size = -(-lines // step), SIZES[kind]

    def kernel(counter: int) -> None:
        packing.pack(
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
    if isinstance(a, np.ndarray) and _kind(a.dtype) is None:
        return False
    if isinstance(b, np.ndarray) and _kind(b.dtype) is None:
        return False
    return 0 < a.shape[-1] <= MAX_K


def gemm(a: Any, b: Any, out: np.ndarray, epilogue: Epilogue | None) -> None:
    """Write the product of operands that this `takes`, not empty, as `numpy_backend.gemm`."""
    k = a.shape[-1]
    if epilogue is not None:
        epilogue = epilogue.broadcast(out.shape)
    if out.ndim == 2:
        m, n = out.shape
        if _threads(m, n, k) < 2:  # the kernel packs
            _matrix_product(_side(a, -1), _side(b, -2), k, out, epilogue)
        else:
            _matrix_product(_packed(_words(a, -1)), _packed(_words(b, -2)), k, out, epilogue)
        return
    left, right = _words(a, -1), _words(b, -2)
    if right.ndim == 2 and epilogue is None and out.flags.c_contiguous:  # one tall product
        rows = np.ascontiguousarray(left).reshape(-1, left.shape[-1])
        _matrix_product(_packed(rows), _packed(right), k, out.reshape(-1, out.shape[-1]), None)
        return
    batch = out.shape[:-2]
    left = np.broadcast_to(left, (*batch, *left.shape[-2:]))
    right = np.broadcast_to(right, (*batch, *right.shape[-2:]))
    every = slice(None)
    for index in np.ndindex(batch):
        part = None if epilogue is None else epilogue.part(index, every, every)
        _matrix_product(_packed(left[index]), _packed(right[index]), k, out[index], part)


#: The lines of an operand, over K, packed or not: the array, its address, and what `_plan` takes.
_Side = tuple[np.ndarray, int, tuple[int, ...]]


def _packed(words: np.ndarray) -> _Side:
    """Return lines of packed words, shape (lines, words)."""
    return words, address(words), (len(words), words.strides[0], 8, kernels.PACKED, 0)


def _side(x: Any, k_axis: int) -> _Side:
    """Return the lines of a matrix, packed or not."""
    if not isinstance(x, np.ndarray):
        return _packed(_words(x, k_axis))
    kind = _kind(x.dtype)
    assert kind is not None
    strides, other = x.strides, -3 - k_axis
    lines = (x.shape[other], strides[other], strides[k_axis], kind, SIZES[kind])
    return x, address(x), lines


def _some(side: _Side, start: int, stop: int) -> _Side:
    """Return some lines of an operand."""
    memory, first, (count, stride, *rest) = side
    return memory, first + start * stride, (min(stop, count) - start, stride, *rest)


def _matrix_product(a: _Side, b: _Side, k: int, out: np.ndarray, epilogue: Epilogue | None) -> None:
    if epilogue is None and out.dtype == INT32:
        _launch(a, b, k, out, kernels.INT32)
    elif out.dtype == FLOAT32:
        if epilogue is None:
            _launch(a, b, k, out, kernels.FLOAT32)
            return
        parts = (epilogue.row_scale, epilogue.col_scale, epilogue.bias)
        _launch(a, b, k, out, kernels.FLOAT32, tuple(map(_flat, parts)))
    else:
        step = max(1, SUMS_AT_A_TIME // out.shape[1])
        every = slice(None)
        for start in range(0, len(out), step):
            rows = slice(start, start + step)
            sums = np.empty(out[rows].shape, np.int32)
            _launch(_some(a, start, start + step), b, k, sums, kernels.INT32)
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
        sides = _packed(left[index]), _packed(right[index])
        _launch(*sides, k, words[index], kernels.BITS, columns)
    return words, np.bitwise_count(words).sum(axis=-1, dtype=np.int32)


def _threads(m: int, n: int, k: int) -> int:
    """Return with how many threads a product is computed."""
    products = m * n * k
    if m <= FEW_LANES or n <= FEW_LANES:
        products *= LONGER_BY_LINE
    wanted = products // PRODUCTS_A_THREAD
    return wanted if wanted < 2 else min(settings.kernel_threads(), wanted)


class _Plan:
    """What a kernel needs to know about operands of a kind; see `_plan`."""

    __slots__ = ("address", "lane_words", "memory", "parts", "swapped", "threads", "words")

    def __init__(self, numbers: dict[str, int], threads: int) -> None:
        self.memory = np.array([numbers[name] for name in kernels.PLAN], np.int64)
        self.address = address(self.memory)
        self.parts, self.threads, self.swapped = numbers["parts"], threads, numbers["swapped"]
        #: Words of lines that the kernel packs: of all, and of units, which come first.
        words = -(-numbers["k"] // 64)
        unit, lane = (
            numbers[side + "s"] * words if numbers[side + "_kind"] != kernels.PACKED else 0
            for side in ("unit", "lane")
        )
        self.words, self.lane_words = unit + lane, unit


_SIDE = ("s", "_stride", "_k", "_kind", "_size")


@lru_cache(maxsize=1024)
def _plan(
    a: tuple[int, ...], b: tuple[int, ...], k: int, strides: tuple[int, int], kind: int,
    threads: int, way: int,
) -> _Plan:  # fmt: skip
    """Return the plan of a product.

    Parameters
    ----------
    a, b : tuple of int
        Number of lines, strides from line to line and along K, kind and size of elements.
    strides : (int, int)
        Of the result.
    way : int
        `METHOD`.
    """
    m, n = a[0], b[0]
    few = min(m, n) <= FEW_LANES
    if min(m, n) >= FEW_ROWS:
        swapped = kind != kernels.BITS and abs(strides[0]) < abs(strides[1])
    else:  # a tile takes 32 lanes or 16, but 4 units or one
        swapped = n > m if few or way != kernels.LOOKUP else m > n
    units, lanes = (b, a) if swapped else (a, b)
    numbers = dict(zip(["unit" + name for name in _SIDE], units, strict=True))
    numbers |= zip(["lane" + name for name in _SIDE], lanes, strict=True)
    out_unit, out_lane = strides[::-1] if swapped else strides
    block = kernels.block_of(-(-k // 64))
    u_step, l_step = max(units[0], 1), max(lanes[0], 1)
    if threads > 1:
        u_step, l_step = _steps(units[0], lanes[0], block, threads)
    numbers |= {
        "parts": -(-units[0] // u_step) * -(-lanes[0] // l_step),
        "method": kernels.FEW if few else way,
        "table": _TABLE,
        "block": block,
        "k": k,
        "kind": kind,
        "swapped": int(swapped),
        "out_unit": out_unit,
        "out_lane": out_lane,
        "unit_step": u_step,
        "lane_step": l_step,
    }
    return _Plan(numbers, threads)


_NOTHING = (None, None, None)


def _launch(
    a: _Side, b: _Side, k: int, out: np.ndarray, kind: int,
    parts: tuple[np.ndarray | None, ...] = _NOTHING,
) -> None:  # fmt: skip
    """Run the kernel, on several threads where that is worth it.

    Parameters
    ----------
    a, b : _Side
        The rows of a and the columns of b; packed words if several threads are worth it.
    out : ndarray, shape (M, N), or words of shape (M, ceil(N / 64))
    parts : scale of rows, scale of columns, bias; for bits flip, None, threshold
    """
    row = column = bias = 0
    if parts is not _NOTHING:
        row, column, bias = [address(x) for x in parts]
    threads = _threads(a[2][0], b[2][0], k)
    plan = _plan(a[2], b[2], k, out.strides, kind, threads, METHOD)
    unit, lane = a[1], b[1]
    if plan.swapped:
        unit, lane = lane, unit
        if kind != kernels.BITS:
            row, column = column, row
    unit_words = lane_words = 0
    if plan.words:
        assert threads < 2  # each thread would pack
        memory = np.empty(plan.words, WORD)
        unit_words = address(memory)
        lane_words = unit_words + 8 * plan.lane_words
    pointers = (unit, unit_words, lane, lane_words, address(out), row, column, bias)
    if plan.parts == 1:
        kernels.product(0, plan.address, _scratch.address, *pointers)
        return

    def kernel(counter: int) -> None:
        kernels.product(counter, plan.address, _scratch.address, *pointers)

    run(kernel, plan.parts, threads)


def _steps(units: int, lanes: int, block: int, threads: int) -> tuple[int, int]:
    """Return the units and lanes of a part: as many parts as threads need, no smaller."""
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

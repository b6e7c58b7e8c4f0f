"""Products by compiled kernels: their arguments, and parts for the threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cupybnn import settings
from cupybnn.backends import epilogue as epilogues
from cupybnn.backends.cpu import kernels, plans
from cupybnn.backends.cpu.addresses import FIELD, address
from cupybnn.backends.cpu.cache import features, folder
from cupybnn.backends.cpu.operands import (
    ROOM,
    WORD,
    Side,
    aligned,
    can_pack,
    pack,
    packed,
    scratch,
    side,
    takes,
)
from cupybnn.backends.cpu.threads import run
from cupybnn.backends.epilogue import Epilogue

__all__ = ["can_pack", "describe", "gemm", "gemm_packed", "pack", "prepared", "takes"]

EXACT_FLOAT32 = 1 << 24
# Elements of int32 sums at a time, for results that NumPy converts.
SUMS_AT_A_TIME = 1 << 20

INT32, FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)


def describe() -> dict[str, Any]:
    """Return what ``cupybnn info`` shows: processor, instructions, threads, folder of the cache."""
    shown = ("avx512vpopcntdq", "avx512bw", "avx2", "popcnt", "neon", "sve")
    cpu, has = features()
    return {
        "cpu": cpu,
        "features": [name for name in shown if name in has],
        "method": "table lookups" if plans.METHOD == kernels.LOOKUP else "popcounts",
        "threads": settings.kernel_threads(),
        "cache": folder(kernels.product),
    }


def gemm(a: Any, b: Any, out: np.ndarray, epilogue: Epilogue | None) -> None:
    """Write the product of operands that this `takes`, not empty, as `numpy_backend.gemm`."""
    k = a.shape[-1]
    if epilogue is not None:
        epilogue = epilogue.broadcast(out.shape)
    if out.ndim == 2:
        m, n = out.shape
        if plans.threads_for(m, n, k) > 1:  # else the kernel packs
            a, b = packed(a, -1), packed(b, -2)
        _matrix_product(side(a, -1), side(b, -2), k, out, epilogue)
        return
    left, right = packed(a, -1), packed(b, -2)
    if right.ndim == 2 and epilogue is None and out.flags.c_contiguous:  # one tall product
        rows = np.ascontiguousarray(left).reshape(-1, left.shape[-1])
        _matrix_product(side(rows, -1), side(right, -2), k, out.reshape(-1, out.shape[-1]), None)
        return
    batch = out.shape[:-2]
    left = np.broadcast_to(left, (*batch, *left.shape[-2:]))
    right = np.broadcast_to(right, (*batch, *right.shape[-2:]))
    every = slice(None)
    for index in np.ndindex(batch):
        part = None if epilogue is None else epilogue.part(index, every, every)
        _matrix_product(side(left[index], -1), side(right[index], -2), k, out[index], part)


def prepared(a: Any, b: Any, dtype: np.dtype) -> Callable[[Any, Any], np.ndarray] | None:
    """Return a function that multiplies two matrices like these, or None.

    It takes arrays, or words of packed matrices, of the same shapes, strides and dtypes, and checks
    nothing. For products that one thread computes with the memory it has.
    """
    m, n, k = a.shape[0], b.shape[1], a.shape[1]
    kind = {INT32: kernels.INT32, FLOAT32: kernels.FLOAT32}.get(dtype)
    if FIELD == 0 or kind is None or m == 0 or n == 0 or plans.threads_for(m, n, k) > 1:
        return None
    left, right = side(a, -1), side(b, -2)
    if any(
        not isinstance(x, np.ndarray) and y[0] is not x.words for x, y in ((a, left), (b, right))
    ):
        return None
    shape = (m, n)
    plan = plans.plan(
        left[2], right[2], k, (n * dtype.itemsize, dtype.itemsize), kind, 0, plans.METHOD
    )
    if plan.words > ROOM:
        return None
    product, numbers, empty, field, swapped = (
        kernels.product.call, plan.address, np.empty, FIELD, plan.swapped
    )  # fmt: skip

    def multiply(x: Any, y: Any, plan: plans.Plan = plan) -> np.ndarray:
        out = empty(shape, dtype)
        if swapped:
            x, y = y, x
        product(0, numbers, scratch.address, id(x), id(y), id(out), 0, field)
        return out

    return multiply


def _some(lines: Side, start: int, stop: int) -> Side:
    """Return some lines of an operand."""
    memory, first, (count, stride, *rest) = lines
    return memory, first + start * stride, (min(stop, count) - start, stride, *rest)


def _matrix_product(a: Side, b: Side, k: int, out: np.ndarray, epilogue: Epilogue | None) -> None:
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
    left, right = packed(a, -1), packed(b, -2)
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
        sides = side(left[index], -1), side(right[index], -2)
        _launch(*sides, k, words[index], kernels.BITS, columns)
    return words, np.bitwise_count(words).sum(axis=-1, dtype=np.int32)


_NOTHING = (None, None, None)


def _launch(
    a: Side, b: Side, k: int, out: np.ndarray, kind: int,
    parts: tuple[np.ndarray | None, ...] = _NOTHING,
) -> None:  # fmt: skip
    """Run the kernel, on several threads where that is worth it.

    Parameters
    ----------
    a, b : Side
        The rows of a and the columns of b; packed words if several threads are worth it.
    out : ndarray, shape (M, N), or words of shape (M, ceil(N / 64))
    parts : scale of rows, scale of columns, bias; for bits flip, None, threshold
    """
    threads = plans.threads_for(a[2][0], b[2][0], k)
    plan = plans.plan(a[2], b[2], k, out.strides, kind, threads, plans.METHOD)
    unit, lane = a[1], b[1]
    parameters = 0
    if parts is not _NOTHING:
        row, column, bias = (address(x) for x in parts)
        if plan.swapped and kind != kernels.BITS:
            row, column = column, row
        numbers = np.array([row, column, bias], np.int64)
        parameters = address(numbers)
    if plan.swapped:
        unit, lane = lane, unit
    pointers = unit, lane, address(out), parameters, 0
    if plan.parts == 1:
        memory = scratch.address
        if plan.words > ROOM:
            large = aligned(kernels.SCRATCH_BYTES + 8 * plan.words)
            memory = address(large)
        kernels.product(0, plan.address, memory, *pointers)
        return
    assert plan.words == 0  # each thread would pack

    def kernel(counter: int) -> None:
        kernels.product(counter, plan.address, scratch.address, *pointers)

    run(kernel, plan.parts, threads)

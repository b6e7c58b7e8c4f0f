"""The exact product of signs on the CPU, on top of NumPy's float32 matmul.

Small products convert both operands to +1.0 and -1.0 and multiply. Larger ones work panel by panel,
so that the floats stay in cache and scratch memory is bounded, and put two lines of one operand
into each float: with ``w = lo + 4096 * hi``, one sum ``t = sum(x * w)`` holds two products,
``hi = rint(t / 4096)`` and ``lo = t - 4096 * hi``, for half the multiplications. That is exact for
K <= 2048: |lo| <= 2048, so t / 4096 is within 1/2 of hi, and every partial sum is at most
2048 * 4097 < 2**24, up to which float32 holds all integers. (At |lo| = 2048 the quotient is
half-way; but then K = 2048, hi is even like every product over an even K, and rint rounds half-way
cases to even.) Products over a longer K are summed: in float32 up to K = 2**24, then in float64.

A product with one or a few rows is bound by reading the other operand: it counts equal bits.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np

from cupybnn.backends import epilogue as epilogues
from cupybnn.backends.epilogue import Epilogue
from cupybnn.backends.numpy_lines import BLOCK, PAIR, Lines, blocks
from cupybnn.backends.numpy_threads import parallel_for

__all__ = ["SCRATCH_BYTES", "product"]

EXACT_FLOAT32 = 1 << 24

# Size of a panel: lines of either operand, and K (limited by the pairs).
BLOCK_A, BLOCK_B, BLOCK_K = 1024, 2048, 2048
# Scratch memory of each thread: a panel of each operand, and their product.
PANEL_A, PANEL_B = BLOCK_A * BLOCK_K, BLOCK_B // 2 * BLOCK_K
PANEL_T = BLOCK_A * BLOCK_B
SCRATCH_BYTES = 4 * (PANEL_A + PANEL_B + PANEL_T)

# Below this many multiplications Python overhead dominates, and fewer calls win.
SMALL_PRODUCT = 1 << 21
# A batch of up to this many elements is converted to floats at once.
SMALL_BATCH = 1 << 20
# For a shorter K, splitting the pairs costs more than they save.
SHORT_K = 192
# With at most this many lines in one operand, counting bits is faster than converting the other to
# floats: for an operand whose lines are adjacent, contiguous or packed. Summing the counts of a
# short row takes as long as for K = 256.
FEW_FOR_ADJACENT, FEW_FOR_ROWS, FEW_FOR_PACKED = 4, 24, 32
# And in a small product, of a packed operand of so many elements or more.
FEW_FOR_SMALL, SMALL_PACKED = 4, 1 << 17
K_FOR_EACH = 256

WHOLE = slice(None)
DOWN, UP = np.float32(1 / PAIR), np.float32(PAIR)


class _Scratch(threading.local):
    """Panels of each thread, reused between calls: fresh memory would cost as much as the work."""

    def __init__(self) -> None:
        self.memory: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def panels(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self.memory is None:
            self.memory = (
                np.empty(PANEL_A, np.float32),
                np.empty(PANEL_B, np.float32),
                np.empty(PANEL_T, np.float32),
            )
        return self.memory


_scratch = _Scratch()


def product(a: Any, b: Any, out: np.ndarray, epilogue: Epilogue | None) -> None:
    """Write the product of the signs of `a` and `b` into `out`; see `numpy_backend.gemm`."""
    if out.size == 0:
        return
    if epilogue is not None:
        epilogue = epilogue.broadcast(out.shape)
    left, right = Lines.of(a, -1), Lines.of(b, -2)
    if left.k == 0:
        epilogues.apply(np.zeros(out.shape, np.float32), epilogue, out)
    elif out.ndim == 2:
        _matrix_product(left, right, out, epilogue)
    else:
        _batch_product(left, right, out, epilogue)


def _batch_product(a: Lines, b: Lines, out: np.ndarray, epilogue: Epilogue | None) -> None:
    contiguous = a.x.flags.c_contiguous and out.flags.c_contiguous
    if b.x.ndim == 2 and contiguous and epilogue is None:  # one tall product
        _matrix_product(a.flat(), b, out.reshape(-1, out.shape[-1]), None)
        return
    batch = out.shape[:-2]
    a, b = a.broadcast(batch), b.broadcast(batch)
    step = SMALL_BATCH // (max(a.count, b.count) * a.k * math.prod(batch[1:]))
    if step and a.count * b.count * a.k <= SMALL_PRODUCT:
        for i in range(0, batch[0], step):
            part = slice(i, i + step)
            acc = a.at((part,)).signs() @ b.at((part,)).signs().swapaxes(-1, -2)
            epilogues.apply(acc, _part(epilogue, (part,), WHOLE, WHOLE), out[part])
        return
    for index in np.ndindex(batch):
        _matrix_product(a.at(index), b.at(index), out[index], _part(epilogue, index, WHOLE, WHOLE))


def _part(
    epilogue: Epilogue | None, lead: tuple[Any, ...], rows: slice, cols: slice
) -> Epilogue | None:
    return None if epilogue is None else epilogue.part(lead, rows, cols)


def _matrix_product(a: Lines, b: Lines, out: np.ndarray, epilogue: Epilogue | None) -> None:
    small = a.count * b.count * a.k <= SMALL_PRODUCT
    if a.count <= b.count and a.count <= _few_for(b, small):
        epilogues.apply(_count_product(a, b), epilogue, out)
    elif b.count < a.count and b.count <= _few_for(a, small):
        epilogues.apply(_count_product(b, a).T, epilogue, out)
    elif small:
        _small_product(a, b, out, epilogue)
    else:
        _panel_product(a, b, out, epilogue)


def _few_for(many: Lines, small: bool) -> int:
    """Return with how many lines in the other operand bits are counted."""
    if small:
        worth = many.packed and many.k >= K_FOR_EACH and many.size >= SMALL_PACKED
        return FEW_FOR_SMALL if worth else 0
    if many.packed:
        return FEW_FOR_PACKED
    return FEW_FOR_ADJACENT if many.adjacent else min(FEW_FOR_ROWS, many.k // K_FOR_EACH)


def _small_product(a: Lines, b: Lines, out: np.ndarray, epilogue: Epilogue | None) -> None:
    signs_a, signs_b = a.signs(), b.signs().T
    if epilogue is None and out.dtype == np.float32:
        np.matmul(signs_a, signs_b, out=out)
    else:
        epilogues.apply(signs_a @ signs_b, epilogue, out)


def _count_product(a: Lines, b: Lines) -> np.ndarray:
    """Return the product of the few lines of `a` with those of `b`, int64, by counting bits."""
    if b.adjacent:
        acc = np.zeros((a.count, b.count), np.int64)
        bits_a = np.empty((a.count, a.k), bool)
        a.write_bits(slice(0, a.count), slice(0, a.k), bits_a)
        lock = threading.Lock()

        # Split along K, because only whole rows are read at full memory speed.
        def count_equal(start: int, stop: int) -> None:
            # A byte counts up to 255 equal bits: sums of that many rows stay bytes, and fast.
            step = min(255, max(1, 8 * BLOCK // b.count))
            bits = np.empty((2, min(step, stop - start), b.count), bool)
            sums = np.zeros_like(acc)
            for ks in blocks(start, stop, step):
                part, equal = bits[:, : ks.stop - ks.start]
                b.write_bits(slice(0, b.count), ks, part.T)
                for row, bits_row in zip(sums, bits_a, strict=True):
                    np.equal(part, bits_row[ks, None], out=equal)
                    row += np.add.reduce(equal.view(np.uint8), axis=0, dtype=np.uint8)
            with lock:
                np.add(acc, sums, out=acc)

        parallel_for(b.k, b.size, count_equal)
        acc *= 2
        acc -= a.k
        return acc
    acc = np.empty((a.count, b.count), np.int64)
    words_a = a.words(slice(0, a.count))

    def count_different(start: int, stop: int) -> None:
        step = max(1, 2 * BLOCK // (words_a.shape[1] * (2 if b.packed else 64)))
        for cols in blocks(start, stop, step):
            words = b.words(cols)
            for row, words_row in zip(acc, words_a, strict=True):
                differ = np.bitwise_count(words ^ words_row)
                row[cols] = a.k - 2 * np.add.reduce(differ, axis=1, dtype=np.int64)

    parallel_for(b.count, b.size // 16 if b.packed else b.size, count_different)
    return acc


def _panel_product(a: Lines, b: Lines, out: np.ndarray, epilogue: Epilogue | None) -> None:
    # Pairs are formed from the operand with more lines, called b from here on.
    swapped = a.count > b.count
    if swapped:
        a, b, out = b, a, out.T
    paired = a.k >= SHORT_K
    block_b, block_k = BLOCK_B, BLOCK_K
    if b.adjacent and a.count <= BLOCK_A // 4:
        # Converting b to floats is much of the work, and fastest along whole rows of memory.
        block_b = min(max(b.count, BLOCK_B), 4 * BLOCK_B)
        block_k = BLOCK_K * BLOCK_B // block_b // 64 * 64
    one_step = a.k <= block_k and epilogue is None
    memory_a, memory_b, memory_t = _scratch.panels()
    if not one_step:
        dtype = np.float32 if a.k <= EXACT_FLOAT32 else np.float64
        memory_sums = np.empty(min(a.count, BLOCK_A) * min(b.count, block_b), dtype)
    for cols in blocks(0, b.count, block_b):
        for rows in blocks(0, a.count, BLOCK_A):
            target = out[rows, cols]
            sums = target if one_step else memory_sums[: target.size].reshape(target.shape)
            for ks in blocks(0, a.k, block_k):
                panel_a = a.panel(rows, ks, memory_a)
                if rows.start == 0 or a.k > block_k:  # else already there
                    panel_b = (b.pair_panel if paired else b.panel)(cols, ks, memory_b)
                t = _multiply(panel_a, panel_b, sums, memory_t)
                if paired:
                    _split_pairs(t, b.adjacent, sums, add=ks.start > 0)
                elif ks.start > 0:
                    sums += t
                else:
                    sums[...] = t
            if not one_step:
                if swapped:
                    epilogues.apply(sums.T, _part(epilogue, (), cols, rows), target.T)
                else:
                    epilogues.apply(sums, _part(epilogue, (), rows, cols), target)


def _multiply(a: np.ndarray, b: np.ndarray, target: np.ndarray, memory: np.ndarray) -> np.ndarray:
    """Return ``a @ b.T``, stored in `memory` with the axis order of `target`."""
    m, n = len(a), len(b)
    if abs(target.strides[0]) < abs(target.strides[1]):
        return np.matmul(b, a.T, out=memory[: m * n].reshape(n, m)).T
    return np.matmul(a, b.T, out=memory[: m * n].reshape(m, n))


def _split_pairs(t: np.ndarray, adjacent: bool, target: np.ndarray, add: bool) -> None:
    """Write or add both products held by each element of `t` to `target`; overwrites `t`."""
    n, half = target.shape[1], t.shape[1]
    low, high = (
        (target[:, 0::2], target[:, 1::2]) if adjacent else (target[:, :half], target[:, half:])
    )

    def split(start: int, stop: int) -> None:
        for rows in blocks(start, stop, max(1, BLOCK // half)):
            lo = t[rows]
            lo *= DOWN
            hi = np.rint(lo)
            lo -= hi
            lo *= UP
            if add:
                low[rows] += lo
                high[rows] += hi[:, : n - half]
            else:
                low[rows] = lo
                high[rows] = hi[:, : n - half]

    parallel_for(len(t), t.size, split)

"""The operands of compiled kernels: which arrays they take, packing them, and their lines."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

import numpy as np

from cupybnn import settings
from cupybnn.backends.cpu import kernels, packing
from cupybnn.backends.cpu.addresses import address
from cupybnn.backends.cpu.signs import KINDS, SIZES
from cupybnn.backends.cpu.threads import run

__all__ = ["ROOM", "Side", "aligned", "can_pack", "pack", "packed", "scratch", "side", "takes"]

MAX_K = np.iinfo(np.int32).max
WORD = np.dtype("<u8")

# What is worth a second thread: elements to pack (60 to 90 microseconds for float32).
ELEMENTS_A_THREAD = 1 << 19
# Parts for each thread, so that none waits long for another.
PARTS_A_THREAD = 8

#: Words of lines for which every thread has memory.
ROOM = 1 << 12


def aligned(size: int) -> np.ndarray:
    """Return `size` bytes that start at a cache line."""
    memory = np.empty(size + 64, np.uint8)
    first = -memory.ctypes.data % 64
    return memory[first : first + size]


class _Scratch(threading.local):
    """The memory of each thread."""

    def __init__(self) -> None:
        self.memory = aligned(kernels.SCRATCH_BYTES + 8 * ROOM)
        self.address = address(self.memory)


scratch = _Scratch()


@lru_cache(maxsize=256)
def _kind(dtype: np.dtype) -> int | None:
    return KINDS.get(dtype.name) if dtype.isnative else None


def can_pack(dtype: np.dtype) -> bool:
    """Whether arrays of `dtype` can be packed here: in native byte order, at most 64 bits."""
    return _kind(dtype) is not None


def takes(a: Any, b: Any) -> bool:
    """Whether the operands of a product can be taken: see `can_pack`, and K within int32."""
    if isinstance(a, np.ndarray) and _kind(a.dtype) is None:
        return False
    if isinstance(b, np.ndarray) and _kind(b.dtype) is None:
        return False
    return 0 < a.shape[-1] <= MAX_K


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
            words.strides[0], counts, scratch.address,
        )  # fmt: skip

    run(kernel, parts, threads)


def packed(operand: Any, k_axis: int) -> np.ndarray:
    """Return the packed words of an operand's lines, shape (..., lines, words)."""
    if isinstance(operand, np.ndarray):
        return pack(operand, k_axis)[0]
    words = operand.words
    return words if words.strides[-1] == 8 else np.ascontiguousarray(words)


#: The lines of an operand, over K, packed or not: the array, its address, and what `plans.plan`
#: takes: number of lines, strides from line to line and along K, kind and size of elements.
Side = tuple[np.ndarray, int, tuple[int, ...]]


def side(x: Any, k_axis: int) -> Side:
    """Return the lines of a matrix: an array, a packed matrix, or words, shape (lines, words)."""
    if not isinstance(x, np.ndarray):
        x = packed(x, k_axis)
    if x.dtype == WORD:  # unsigned numbers are no operands
        return x, address(x), (len(x), x.strides[0], 8, kernels.PACKED, 0)
    kind = _kind(x.dtype)
    assert kind is not None
    strides, other = x.strides, -3 - k_axis
    return x, address(x), (x.shape[other], strides[other], strides[k_axis], kind, SIZES[kind])

"""The kernel that packs the signs of an array."""

from __future__ import annotations

import numpy as np

from cupybnn.backends.cpu.cache import cached
from cupybnn.backends.cpu.memory import load_u64, popcount, store_i32, store_u64
from cupybnn.backends.cpu.parts import first_part, inline, next_part
from cupybnn.backends.cpu.signs import mask, mask_8, mask_64, transpose

__all__ = ["SCRATCH_BYTES", "pack", "pack_lines"]

SCRATCH_BYTES = 512


@inline
def _signs(address, kind, size, count):
    """Return the signs of up to 64 neighbors, from bit 0."""
    if count == 64:
        return mask_64(address, kind)
    word = np.uint64(0)
    for i in range(0, count & ~7, 8):
        word |= mask_8(address + i * size, kind) << np.uint64(i)
    for i in range(count & ~7, count):
        word |= mask(address + i * size, kind) << np.uint64(i)
    return word


@inline
def pack_lines(
    x, line_stride, k_stride, lines, start, stop, k, kind, size, out, out_stride, ones, scratch
):
    """Pack the lines start ... stop, as `pack`; do not count ones if their address is 0."""
    words = (k + 63) >> 6
    if k_stride == size or k <= 1:
        for line in range(start, stop):
            for w in range(words):
                source = x + line * line_stride + 64 * w * size
                store_u64(
                    out + line * out_stride + 8 * w, _signs(source, kind, size, min(64, k - 64 * w))
                )
    elif line_stride == size:
        for w in range(words):
            rows = min(64, k - 64 * w)
            for first in range(start, stop, 64):
                # The last tile overlaps the one before it, so that it is as fast.
                line = max(0, min(first, lines - 64))
                count = min(64, lines - line)
                source = x + 64 * w * k_stride + line * size
                for i in range(rows):
                    store_u64(scratch + 8 * i, _signs(source + i * k_stride, kind, size, count))
                for i in range(rows, 64):
                    store_u64(scratch + 8 * i, np.uint64(0))
                transpose(scratch)
                for i in range(first - line, min(stop - line, 64)):
                    store_u64(out + (line + i) * out_stride + 8 * w, load_u64(scratch + 8 * i))
    else:
        for line in range(start, stop):
            for w in range(words):
                word = np.uint64(0)
                for i in range(min(64, k - 64 * w)):
                    element = x + line * line_stride + (64 * w + i) * k_stride
                    word |= mask(element, kind) << np.uint64(i)
                store_u64(out + line * out_stride + 8 * w, word)
    if ones == 0:
        return
    for line in range(start, stop):
        total = 0
        for w in range(words):
            total += popcount(load_u64(out + line * out_stride + 8 * w))
        store_i32(ones + 4 * line, np.int32(total))


@cached()
def pack(
    counter, parts, x, line_stride, k_stride, lines, step, k, kind, size, out, out_stride, ones,
    scratch,
):  # fmt: skip
    """Pack the signs of all lines, or of the parts that this thread takes, and count their ones.

    Parameters
    ----------
    counter, parts : address or 0, int
        See `cupybnn.backends.cpu.threads`: ceil(lines / step).
    x : address of the elements; strides in bytes
    step : int
        Lines of a part.
    kind, size : int
        `signs.KINDS` of the dtype, and bytes of an element.
    out : address of ceil(k / 64) words for each line
    ones : address of an int32 for each line
    scratch : address of SCRATCH_BYTES
    """
    part = first_part(counter)
    while part < parts:
        start = part * step
        pack_lines(
            x, line_stride, k_stride, lines, start, min(start + step, lines), k, kind, size, out,
            out_stride, ones, scratch,
        )  # fmt: skip
        part = next_part(counter, part)

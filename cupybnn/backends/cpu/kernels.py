"""The kernels: packing and products on packed words, for a part of the result each.

Arguments are addresses, strides in bytes and counts, all integers. The kernels hold no interpreter
lock; the caller's threads each compute a part.

A product counts the bits in which two lines differ: sign(a) @ sign(b) = K - 2 * count. Lines of one
operand are its *units*, those of the other its *lanes*, which a tile computes side by side:

LOOKUP
    An entry of a table of 256 × 32 bytes holds for each nibble n how many bits of n differ from the
    lower four bits of a byte, and from its upper four. One PSHUFB with the entry of a unit's byte
    looks up the counts of 16 lanes for eight elements of K, and one PADDB adds them. A tile of
    4 units × 32 lanes takes 8 of each, 4 entries and 2 vectors of nibbles for 8 elements: the two
    units that shuffle bytes are the bound, at 256 products a clock. The table, a tile's nibbles and
    its units stay in the L1 cache, units and sums of a block in the L2 cache. Sums of bytes hold at
    most 7 words, 56 × 4 < 256, and are then added to 32-bit sums.
COUNT
    XOR and popcount in vectors of eight words, 4 lines × 4: for AVX-512 VPOPCNTDQ (512 products for
    each VPOPCNTQ), and for processors without AVX2.
FEW
    XOR and popcount, a line with a line: for a few lanes, where reading the units is the bound.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from cupybnn.backends.cpu import intrinsics
from cupybnn.backends.cpu.cache import cached
from cupybnn.backends.cpu.intrinsics import (
    add_counts,
    fetch_add,
    load_counter,
    load_f32,
    load_i32,
    load_u8,
    load_u64,
    mask,
    mask_8,
    mask_64,
    popcount,
    store_f32,
    store_i32,
    store_u64,
)

__all__ = [
    "BLOCK",
    "COUNT",
    "FEW",
    "LOOKUP",
    "SCRATCH_BYTES",
    "block_of",
    "close",
    "first_part",
    "next_part",
    "pack",
    "product",
    "wait",
]

LOOKUP, COUNT, FEW = 0, 1, 2
INT32, FLOAT32, BITS = 0, 1, 2

LANES = intrinsics.LANES
#: Words of K that are expanded at a time for 32 lanes (twice as many for 16), and that sums of
#: bytes hold.
WORDS, BYTE_WORDS = 14, 7
#: Units in a block at most; their words should take no more than so many bytes.
BLOCK, BLOCK_BYTES = 512, 1 << 18
#: What a thread needs: the expanded words of a tile of lanes, and the sums of a block.
SUMS = WORDS * 8 * 2 * LANES
SCRATCH_BYTES = SUMS + BLOCK * LANES * 4

_tile_4_32 = intrinsics.add_lookups[4, 32]
_tile_4_16 = intrinsics.add_lookups[4, 16]
_tile_1_32 = intrinsics.add_lookups[1, 32]
_tile_1_16 = intrinsics.add_lookups[1, 16]
_expand_32, _expand_16 = intrinsics.expand_word[32], intrinsics.expand_word[16]

_inline = njit(inline="never", nogil=True)


def block_of(words: int) -> int:
    """Return the units in a block of lines of so many words, a multiple of 64."""
    return max(64, min(BLOCK, BLOCK_BYTES // (8 * max(words, 1)) // 64 * 64))


# Parts of a kernel's work, taken by several threads: see `cupybnn.backends.cpu.threads` -----------

DONE = 64  # bytes from the counter of parts taken to that of parts done


@_inline
def first_part(counter):
    """Return the first part that this thread does; 0 without a counter."""
    return fetch_add(counter, 1) if counter != 0 else 0


@_inline
def next_part(counter, part):
    """Count `part` as done, and return the next one."""
    if counter == 0:
        return part + 1
    fetch_add(counter + DONE, 1)
    return fetch_add(counter, 1)


@cached
def close(counter, parts):
    """Let no more parts be taken; return how many were, or a larger number."""
    return fetch_add(counter, parts)


@cached
def wait(counter, parts, looks):
    """Return whether so many parts are done, after looking at most so many times."""
    looked = 0
    while looked < looks and load_counter(counter + DONE) < parts:
        looked += 1
    return looked < looks


# Products ----------------------------------------------------------------------------------------


@_inline
def _look_up(unit, unit_stride, units, lane, lane_stride, lanes, words, table, scratch):
    sums = scratch + SUMS
    step = WORDS if lanes > 16 else 2 * WORDS
    for first in range(0, words, step):
        count = min(step, words - first)
        for w in range(count):
            source = lane + 8 * (first + w)
            if lanes > 16:
                _expand_32(source, lane_stride, lanes - 1, scratch + w * 512)
            else:
                _expand_16(source, lane_stride, lanes - 1, scratch + w * 256)
        full = units & ~3
        for u in range(0, units, 4):
            for start in range(0, count, BYTE_WORDS):
                here = min(BYTE_WORDS, count - start)
                row = unit + u * unit_stride + 8 * (first + start)
                if u < full:
                    if lanes > 16:
                        index = scratch + start * 512
                        _tile_4_32(row, unit_stride, index, here, table, sums + u * 128)
                    else:
                        index = scratch + start * 256
                        _tile_4_16(row, unit_stride, index, here, table, sums + u * 64)
                    continue
                for i in range(units - u):
                    if lanes > 16:
                        index, target = scratch + start * 512, sums + (u + i) * 128
                        _tile_1_32(row + i * unit_stride, unit_stride, index, here, table, target)
                    else:
                        index, target = scratch + start * 256, sums + (u + i) * 64
                        _tile_1_16(row + i * unit_stride, unit_stride, index, here, table, target)


@_inline
def _count_differing(unit, lane, words):
    total = 0
    for w in range(words):
        total += popcount(load_u64(unit + 8 * w) ^ load_u64(lane + 8 * w))
    return total


@_inline
def _count(unit, unit_stride, units, lane, lane_stride, lanes, words, scratch, width):
    sums = scratch + SUMS
    for u in range(0, units - 3, 4):
        for i in range(0, lanes - 3, 4):
            add_counts(
                unit + u * unit_stride,
                unit_stride,
                lane + i * lane_stride,
                lane_stride,
                words,
                sums + 4 * (u * LANES + i),
            )
    for u in range(units):
        first = lanes & ~3 if u < units & ~3 else 0
        for i in range(first, lanes):
            total = _count_differing(unit + u * unit_stride, lane + i * lane_stride, words)
            store_i32(sums + 4 * (u * width + i), np.int32(total))


@_inline
def _finish(
    sums, width, k, units, lanes, u0, l0, out, out_unit, out_lane, kind, swapped,
    unit_scale, lane_scale, bias,
):  # fmt: skip
    """Write K - 2 * sums: as int32, through an epilogue as float32, or compared as bits.

    `bias` of bits: int32 thresholds, one for each column; `unit_scale`: bytes that flip them.
    """
    if kind == INT32:
        for u in range(units):
            row, target = sums + 4 * u * width, out + (u0 + u) * out_unit + l0 * out_lane
            if out_lane == 4:
                for i in range(lanes):
                    store_i32(target + 4 * i, np.int32(k - 2 * load_i32(row + 4 * i)))
            else:
                for i in range(lanes):
                    store_i32(target + i * out_lane, np.int32(k - 2 * load_i32(row + 4 * i)))
        return
    if kind == FLOAT32:
        plain = unit_scale == 0 and lane_scale == 0 and bias == 0
        for u in range(units):
            row, target = sums + 4 * u * width, out + (u0 + u) * out_unit + l0 * out_lane
            if plain and out_lane == 4:
                for i in range(lanes):
                    store_f32(target + 4 * i, np.float32(np.int32(k - 2 * load_i32(row + 4 * i))))
                continue
            for i in range(lanes):
                x = np.float32(np.int32(k - 2 * load_i32(row + 4 * i)))
                # The scale of rows comes first; rows are lanes if the operands are swapped.
                if swapped and lane_scale != 0:
                    x = x * load_f32(lane_scale + 4 * (l0 + i))
                if unit_scale != 0:
                    x = x * load_f32(unit_scale + 4 * (u0 + u))
                if not swapped and lane_scale != 0:
                    x = x * load_f32(lane_scale + 4 * (l0 + i))
                if bias != 0:
                    x = x + load_f32(bias + 4 * (u0 + u if swapped else l0 + i))
                store_f32(target + i * out_lane, x)
        return
    if not swapped:
        for u in range(units):
            row, word = sums + 4 * u * width, np.int64(0)
            for i in range(lanes):
                value = np.int32(k - 2 * load_i32(row + 4 * i))
                least = np.int32(0) if bias == 0 else load_i32(bias + 4 * (l0 + i))
                plus = np.int64(value >= least)
                if unit_scale != 0:
                    plus ^= np.int64(load_u8(unit_scale + l0 + i))
                word |= plus << i
            store_i32(out + (u0 + u) * out_unit + l0 // 8, np.int32(word))
        return
    for i in range(lanes):
        for first in range(0, units, 64):
            bits = np.uint64(0)
            for u in range(first, min(first + 64, units)):
                value = np.int32(k - 2 * load_i32(sums + 4 * (u * width + i)))
                least = np.int32(0) if bias == 0 else load_i32(bias + 4 * (u0 + u))
                plus_64 = np.uint64(value >= least)
                if unit_scale != 0:
                    plus_64 ^= np.uint64(load_u8(unit_scale + u0 + u))
                bits |= plus_64 << np.uint64(u - first)
            store_u64(out + (l0 + i) * out_lane + (u0 + first) // 8, bits)


@cached
def product(
    counter, parts, method, table, scratch, block, words, k, unit, unit_stride, all_units, u_step,
    lane, lane_stride, all_lanes, l_step, out, out_unit, out_lane, kind, swapped, unit_scale,
    lane_scale, bias,
):  # fmt: skip
    """Write the products of all units and all lanes, or the parts that this thread takes.

    Parameters
    ----------
    counter, parts : address or 0, int
        See `cupybnn.backends.cpu.threads`: ceil(all_units / u_step) * ceil(all_lanes / l_step).
    method : int
        LOOKUP, COUNT or FEW.
    table, scratch : address
        As `table` returns it; SCRATCH_BYTES aligned to 64 bytes.
    block : int
        `block_of` the words of a line.
    words, k : int
        Words and elements of a line.
    unit, lane : address of packed words; strides from line to line in bytes
    u_step, l_step : int
        Units and lanes of a part; where bits are written, multiples of 64 and 32.
    out : address of the result; strides in bytes
    kind : int
        INT32, FLOAT32 or BITS.
    swapped : int
        Whether lanes are rows of the result and units columns.
    unit_scale, lane_scale, bias : address or 0
    """
    sums = scratch + SUMS
    across = (all_lanes + l_step - 1) // l_step
    part = first_part(counter)
    while part < parts:
        u0, l0 = part // across * u_step, part % across * l_step
        u1, l1 = min(u0 + u_step, all_units), min(l0 + l_step, all_lanes)
        for ub in range(u0, u1, block):
            units = min(block, u1 - ub)
            first = unit + ub * unit_stride
            for lb in range(l0, l1, LANES):
                lanes = min(LANES, l1 - lb)
                width = LANES if method == COUNT or lanes > 16 else 16
                second = lane + lb * lane_stride
                if method == FEW:
                    for u in range(units):
                        for i in range(lanes):
                            total = _count_differing(
                                first + u * unit_stride, second + i * lane_stride, words
                            )
                            store_i32(sums + 4 * (u * width + i), np.int32(total))
                else:
                    for i in range(0, 4 * units * width, 8):
                        store_u64(sums + i, np.uint64(0))
                    if method == LOOKUP:
                        _look_up(
                            first, unit_stride, units, second, lane_stride, lanes, words, table,
                            scratch,
                        )  # fmt: skip
                    else:
                        _count(
                            first, unit_stride, units, second, lane_stride, lanes, words, scratch,
                            width,
                        )  # fmt: skip
                _finish(
                    sums, width, k, units, lanes, ub, lb, out, out_unit, out_lane, kind, swapped,
                    unit_scale, lane_scale, bias,
                )  # fmt: skip
        part = next_part(counter, part)


@_inline
def _signs(address, kind, size, count):
    """Return the signs of up to 64 neighbours, from bit 0."""
    if count == 64:
        return mask_64(address, kind)
    word = np.uint64(0)
    for i in range(0, count & ~7, 8):
        word |= mask_8(address + i * size, kind) << np.uint64(i)
    for i in range(count & ~7, count):
        word |= mask(address + i * size, kind) << np.uint64(i)
    return word


@_inline
def _transpose(x):
    """Transpose 64 × 64 bits: bit j of word i becomes bit i of word j.

    Blocks are swapped as in Warren, Hacker's Delight, section 7-3.
    """
    bits, low = 32, np.uint64(0x00000000FFFFFFFF)
    while bits:
        shift = np.uint64(bits)
        for first in range(0, 64, 2 * bits):
            for i in range(first, first + bits):
                differ = ((x[i] >> shift) ^ x[i + bits]) & low
                x[i] ^= differ << shift
                x[i + bits] ^= differ
        bits >>= 1
        low ^= low << np.uint64(bits)


@cached
def pack(
    counter, parts, x, line_stride, k_stride, lines, step, k, kind, size, out, out_stride, ones
):
    """Pack the signs of all lines, or of the parts that this thread takes, and count their ones.

    Parameters
    ----------
    counter, parts : address or 0, int
        See `cupybnn.backends.cpu.threads`: ceil(lines / step).
    x : address of the elements; strides in bytes
    step : int
        Lines of a part.
    kind, size : int
        `intrinsics.KINDS` of the dtype, and bytes of an element.
    out : address of ceil(k / 64) words for each line
    ones : address of an int32 for each line
    """
    part = first_part(counter)
    while part < parts:
        start = part * step
        _pack_lines(
            x, line_stride, k_stride, lines, start, min(start + step, lines), k, kind, size, out,
            out_stride, ones,
        )  # fmt: skip
        part = next_part(counter, part)


@_inline
def _pack_lines(x, line_stride, k_stride, lines, start, stop, k, kind, size, out, out_stride, ones):
    words = (k + 63) >> 6
    if k_stride == size or k <= 1:
        for line in range(start, stop):
            for w in range(words):
                source = x + line * line_stride + 64 * w * size
                store_u64(
                    out + line * out_stride + 8 * w, _signs(source, kind, size, min(64, k - 64 * w))
                )
    elif line_stride == size:
        square = np.zeros(64, np.uint64)
        for w in range(words):
            rows = min(64, k - 64 * w)
            for first in range(start, stop, 64):
                # The last tile overlaps the one before it, so that it is as fast.
                line = max(0, min(first, lines - 64))
                count = min(64, lines - line)
                source = x + 64 * w * k_stride + line * size
                for i in range(rows):
                    square[i] = _signs(source + i * k_stride, kind, size, count)
                square[rows:] = np.uint64(0)
                _transpose(square)
                for i in range(first - line, min(stop - line, 64)):
                    store_u64(out + (line + i) * out_stride + 8 * w, square[i])
    else:
        for line in range(start, stop):
            for w in range(words):
                word = np.uint64(0)
                for i in range(min(64, k - 64 * w)):
                    element = x + line * line_stride + (64 * w + i) * k_stride
                    word |= mask(element, kind) << np.uint64(i)
                store_u64(out + line * out_stride + 8 * w, word)
    for line in range(start, stop):
        total = 0
        for w in range(words):
            total += popcount(load_u64(out + line * out_stride + 8 * w))
        store_i32(ones + 4 * line, np.int32(total))


def table() -> Any:
    """Return the table of LOOKUP, uint8 of shape (256, 2, 16): see the top."""
    octet, half, nibble = np.ogrid[:256, :2, :16]
    return np.bitwise_count(((octet >> 4 * half) & 15) ^ nibble).astype(np.uint8)

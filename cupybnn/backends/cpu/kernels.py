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
    most 7 words, 56 × 4 < 256, and are then added to 16-bit sums. Where these hold all of K, whole
    tiles write products to where they belong; others leave sums for `finish`.
COUNT
    XOR and popcount in vectors of eight words, 4 lines × 4: for AVX-512 VPOPCNTDQ (512 products for
    each VPOPCNTQ), and for processors without AVX2.
FEW
    XOR and popcount, a line with a line: for a few lanes, where reading the units is the bound.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cupybnn.backends.cpu.cache import cached
from cupybnn.backends.cpu.count_tile import LANES, add_counts
from cupybnn.backends.cpu.finish import BITS, FLOAT32, INT32, finish
from cupybnn.backends.cpu.lookup_tile import (
    ADD,
    FLOATS,
    INTEGERS,
    SET,
    count_lookups,
    expand_word,
)
from cupybnn.backends.cpu.memory import (
    load_i64,
    load_u64,
    popcount,
    store_i32,
    store_u64,
)
from cupybnn.backends.cpu.packing import pack_lines
from cupybnn.backends.cpu.parts import first_part, inline, next_part

__all__ = [
    "BITS",
    "BLOCK",
    "COUNT",
    "FEW",
    "FLOAT32",
    "INT32",
    "LOOKUP",
    "PACKED",
    "PLAN",
    "SCRATCH_BYTES",
    "block_of",
    "product",
]

LOOKUP, COUNT, FEW = 0, 1, 2
PACKED = -1  # instead of one of `signs.KINDS`

#: Words of K that are expanded at a time for 32 lanes; twice as many for 16.
WORDS = 32
#: Units in a block at most; their words should take no more than so many bytes.
BLOCK, BLOCK_BYTES = 512, 1 << 18
#: What a thread needs: the expanded words of a tile of lanes, and the sums of a block.
SUMS = WORDS * 8 * 2 * LANES
SCRATCH_BYTES = SUMS + BLOCK * LANES * 4

_tile_4_32, _tile_4_16 = count_lookups[4, 32], count_lookups[4, 16]
_tile_1_32, _tile_1_16 = count_lookups[1, 32], count_lookups[1, 16]
_expand_32, _expand_16 = expand_word[32], expand_word[16]


def block_of(words: int) -> int:
    """Return the units in a block of lines of so many words, a multiple of 64."""
    return max(64, min(BLOCK, BLOCK_BYTES // (8 * max(words, 1)) // 64 * 64))


@inline
def _look_up(
    unit, unit_stride, units, lane, lane_stride, lanes, words, table, scratch, target, pitch, way, k
):
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
        for u in range(0, full, 4):
            row, sums = unit + u * unit_stride + 8 * first, target + u * pitch
            if lanes > 16:
                _tile_4_32(row, unit_stride, scratch, count, table, sums, pitch, way, k)
            else:
                _tile_4_16(row, unit_stride, scratch, count, table, sums, pitch, way, k)
        for u in range(full, units):
            row, sums = unit + u * unit_stride + 8 * first, target + u * pitch
            if lanes > 16:
                _tile_1_32(row, unit_stride, scratch, count, table, sums, pitch, way, k)
            else:
                _tile_1_16(row, unit_stride, scratch, count, table, sums, pitch, way, k)
        way = ADD


@inline
def _count_differing(unit, lane, words):
    total = 0
    for w in range(words):
        total += popcount(load_u64(unit + 8 * w) ^ load_u64(lane + 8 * w))
    return total


@inline
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


#: What a plan holds, int64 each, in this order.
PLAN = (
    *("parts", "method", "table", "block", "k", "kind", "swapped", "out_unit", "out_lane"),
    *("units", "unit_stride", "unit_k", "unit_kind", "unit_size", "unit_step"),
    *("lanes", "lane_stride", "lane_k", "lane_kind", "lane_size", "lane_step"),
)


@inline
def _number(plan, place):
    return load_i64(plan + 8 * place)


@cached()
def product(counter, plan, scratch, unit, lane, out, parameters, field):
    """Write the products of all units and all lanes, or the parts that this thread takes.

    Lines that are not packed yet are packed first, if this thread does all parts.

    Parameters
    ----------
    counter : address or 0
        See `cupybnn.backends.cpu.threads`.
    plan : address
        Numbers that are the same for all operands of a kind: see `PLAN`. method is LOOKUP, COUNT or
        FEW; table is the address of `table`; block is `block_of` the words of a line; k is the
        elements of a line. kind is INT32, FLOAT32 or BITS; swapped, whether lanes are rows of the
        result and units columns. unit_stride, unit_k, unit_size are bytes and unit_kind a number,
        as for `packing.pack`, or PACKED. unit_step and lane_step are the lines of a part: where
        bits are written, multiples of 64 and 32. out_unit and out_lane are strides.
    scratch : address
        SCRATCH_BYTES aligned to 64 bytes, and behind them the words of lines that are not packed.
    unit, lane, out : address
        Or, with `field`, of objects that hold the address in so many bytes from their beginning.
    parameters : address or 0
        Three addresses, or 0, of the scales of units and lanes and of the bias: see `finish`.
    field : int
    """
    parts, method, table = _number(plan, 0), _number(plan, 1), _number(plan, 2)
    block, k, kind, swapped = (
        _number(plan, 3), _number(plan, 4), _number(plan, 5), _number(plan, 6)
    )  # fmt: skip
    out_unit, out_lane = _number(plan, 7), _number(plan, 8)
    all_units, unit_stride, u_step = _number(plan, 9), _number(plan, 10), _number(plan, 14)
    all_lanes, lane_stride, l_step = _number(plan, 15), _number(plan, 16), _number(plan, 20)
    unit_scale = lane_scale = bias = np.int64(0)
    if parameters != 0:
        unit_scale, lane_scale = _number(parameters, 0), _number(parameters, 1)
        bias = _number(parameters, 2)
    if field != 0:
        unit, lane, out = load_i64(unit + field), load_i64(lane + field), load_i64(out + field)
    words = (k + 63) >> 6
    packed = scratch + SCRATCH_BYTES
    if _number(plan, 12) != PACKED:
        pack_lines(
            unit, unit_stride, _number(plan, 11), all_units, 0, all_units, k, _number(plan, 12),
            _number(plan, 13), packed, 8 * words, 0, scratch,
        )  # fmt: skip
        unit, unit_stride = packed, 8 * words
        packed += 8 * words * all_units
    if _number(plan, 18) != PACKED:
        pack_lines(
            lane, lane_stride, _number(plan, 17), all_lanes, 0, all_lanes, k, _number(plan, 18),
            _number(plan, 19), packed, 8 * words, 0, scratch,
        )  # fmt: skip
        lane, lane_stride = packed, 8 * words
    sums = scratch + SUMS
    # Whether the tiles of lookups may write products.
    plain = out_lane == 4 and unit_scale == 0 and lane_scale == 0 and bias == 0 and kind != BITS
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
                if method == LOOKUP:
                    whole = plain and lanes == width and words * width <= WORDS * LANES
                    target, pitch, way = sums, 4 * width, SET
                    if whole:
                        target, pitch = out + ub * out_unit + lb * out_lane, out_unit
                        way = INTEGERS if kind == INT32 else FLOATS
                    _look_up(
                        first, unit_stride, units, second, lane_stride, lanes, words, table,
                        scratch, target, pitch, way, k,
                    )  # fmt: skip
                    if whole:
                        continue
                elif method == FEW:
                    for u in range(units):
                        for i in range(lanes):
                            total = _count_differing(
                                first + u * unit_stride, second + i * lane_stride, words
                            )
                            store_i32(sums + 4 * (u * width + i), np.int32(total))
                else:
                    for i in range(0, 4 * units * width, 8):
                        store_u64(sums + i, np.uint64(0))
                    _count(
                        first, unit_stride, units, second, lane_stride, lanes, words, scratch,
                        width,
                    )  # fmt: skip
                finish(
                    sums, width, k, units, lanes, ub, lb, out, out_unit, out_lane, kind, swapped,
                    unit_scale, lane_scale, bias,
                )  # fmt: skip
        part = next_part(counter, part)


def table() -> Any:
    """Return the table of LOOKUP, uint8 of shape (256, 2, 16): see the top."""
    octet, half, nibble = np.ogrid[:256, :2, :16]
    return np.bitwise_count(((octet >> 4 * half) & 15) ^ nibble).astype(np.uint8)

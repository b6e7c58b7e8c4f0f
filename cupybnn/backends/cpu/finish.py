"""From counts of differing bits to results: products, an epilogue, or signs."""

from __future__ import annotations

import numpy as np

from cupybnn.backends.cpu.count_tile import LANES
from cupybnn.backends.cpu.memory import (
    load_f32,
    load_i32,
    load_u8,
    store_f32,
    store_i32,
    store_u64,
)
from cupybnn.backends.cpu.parts import inline
from cupybnn.backends.cpu.signs import compare_32

__all__ = ["BITS", "FLOAT32", "INT32", "finish"]

#: Kinds of results.
INT32, FLOAT32, BITS = 0, 1, 2


@inline
def finish(
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
            row, target = sums + 4 * u * width, out + (u0 + u) * out_unit + l0 // 8
            if lanes == LANES:
                least_32 = 0 if bias == 0 else bias + 4 * l0
                flips_32 = 0 if unit_scale == 0 else unit_scale + l0
                store_i32(target, compare_32(row, k, least_32, flips_32))
                continue
            word = np.int64(0)
            for i in range(lanes):
                value = np.int32(k - 2 * load_i32(row + 4 * i))
                least = np.int32(0) if bias == 0 else load_i32(bias + 4 * (l0 + i))
                plus = np.int64(value >= least)
                if unit_scale != 0:
                    plus ^= np.int64(load_u8(unit_scale + l0 + i))
                word |= plus << i
            store_i32(target, np.int32(word))
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

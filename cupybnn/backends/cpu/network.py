"""The kernels of a packed network of pixels: its first and last layer, and a few rows through all.

Arguments are as for `cupybnn.backends.cpu.kernels`: addresses, strides in bytes and counts.

The first layer multiplies pixels with weights that are whole numbers, ``high * 2**shift + low``,
and compares with a whole threshold. VPMADDWD multiplies 16 pixels with 16 parts of weights and adds
neighbors, from half the memory that float32 takes. Almost always the sum with the high parts
decides; where it is too near to the threshold for that, the sum with the low parts is added.
"""

from __future__ import annotations

import numpy as np

from cupybnn.backends.cpu.cache import cached
from cupybnn.backends.cpu.count_tile import count_4
from cupybnn.backends.cpu.memory import (
    load_i32,
    load_i64,
    load_u8,
    load_u64,
    store_i16,
    store_i32,
    store_u64,
)
from cupybnn.backends.cpu.parts import inline
from cupybnn.backends.cpu.pixel_tiles import (
    STEP,
    SUMS,
    compare,
    signed_sums_1,
    signed_sums_5,
    tile_1_1,
    tile_1_4,
    tile_4_2,
    widen,
)
from cupybnn.backends.cpu.signs import compare_32

__all__ = ["FIRST", "ROWS", "STEP", "end", "first", "scratch_bytes", "through"]

#: Rows that a kernel has in its scratch memory at a time.
ROWS = 16


def scratch_bytes(padded: int) -> int:
    """Return the scratch memory of `first` for rows of so many pixels, rounded up to `STEP`."""
    return ROWS * (SUMS + 8 + 2 * padded)


#: Numbers of a first layer, each 8 bytes: addresses of the high parts and of the low parts (int16,
#: a line a unit, padded to a multiple of STEP), the thresholds and shifts (int64), and the flips
#: (packed), all of them padded to a multiple of 64 units; its inputs, padded inputs and units.
FIRST = 8


@inline
def _expand(x, stride, rows, inputs, padded, wide, totals):
    """Write pixels as int16, with zeros behind them, and their sums."""
    for r in range(rows):
        source, target, total = x + r * stride, wide + r * 2 * padded, np.int64(0)
        whole = inputs & ~15
        for i in range(0, whole, 16):
            total += widen(source + i, target + 2 * i)
        for i in range(whole, padded):
            value = np.int64(load_u8(source + i)) if i < inputs else np.int64(0)
            total += value
            store_i16(target + 2 * i, np.int16(value))
        store_u64(totals + 8 * r, np.uint64(total))


@inline
def _signs(sums, pixels, total, layer, word, count):
    """Return the signs of the 64 units from `word` on, of which `count` exist, for a row."""
    padded = load_i64(layer + 48)
    threshold, shift = load_i64(layer + 16) + 8 * word, load_i64(layer + 24) + 8 * word
    bits = np.uint64(0)
    for u in range(0, count, 4):
        found = compare(sums + 4 * u, total, threshold + 8 * u, shift + 8 * u)
        if found >> 4:
            for i in range(min(4, count - u)):
                if found >> (4 + i) & 1:
                    here = 8 * (u + i)
                    above = np.int64(load_i32(sums + 4 * (u + i))) << load_i64(shift + here)
                    low = load_i64(layer + 8) + 2 * padded * (word + u + i)
                    place = sums + 4 * (u + i)
                    tile_1_1(pixels, 0, low, 0, padded // 16, place)
                    above += np.int64(load_i32(place)) - load_i64(threshold + here)
                    found = found & ~(1 << i) | np.int64(above >= 0) << i
        bits |= np.uint64(found & 15) << np.uint64(u)
    bits ^= load_u64(load_i64(layer + 32) + word // 8)
    return bits if count == 64 else bits & ((np.uint64(1) << np.uint64(count)) - np.uint64(1))


@inline
def _first(x, stride, rows, layer, u0, u1, scratch, out, out_stride):
    inputs, padded = load_i64(layer + 40), load_i64(layer + 48)
    high, steps, pitch = load_i64(layer), padded // 16, 2 * padded
    sums, totals = scratch, scratch + 16 * 256
    wide = totals + 16 * 8
    _expand(x, stride, rows, inputs, padded, wide, totals)
    for word in range(u0, u1, 64):
        count = min(64, u1 - word)
        for u in range(0, count, 4):
            line, r = high + pitch * (word + u), 0
            while r + 4 <= rows:
                place = sums + 256 * r + 4 * u
                tile_4_2(wide + pitch * r, pitch, line, pitch, steps, place)
                tile_4_2(wide + pitch * r, pitch, line + 2 * pitch, pitch, steps, place + 8)
                r += 4
            while r < rows:
                tile_1_4(wide + pitch * r, 0, line, pitch, steps, sums + 256 * r + 4 * u)
                r += 1
        for r in range(rows):
            total = load_i64(totals + 8 * r)
            bits = _signs(sums + 256 * r, wide + pitch * r, total, layer, word, count)
            store_u64(out + r * out_stride + word // 8, bits)


@cached()
def first(x, stride, rows, layer, u0, u1, scratch, out, out_stride):
    """Write the signs of a first layer for the units u0 ... u1; u0 is a multiple of 64.

    Parameters
    ----------
    x : address of pixels, a byte each; stride from row to row in bytes
    rows : int
    layer : address of FIRST numbers
    scratch : address of `scratch_bytes`
    out : address of words; stride from row to row in bytes
    """
    for r in range(0, rows, 16):
        count = min(16, rows - r)
        _first(
            x + r * stride, stride, count, layer, u0, u1, scratch, out + r * out_stride, out_stride
        )


@inline
def _end(bits, stride, rows, weights, weight_stride, octets, units, out):
    for r in range(rows):
        signs, sums = bits + r * stride, out + 4 * r * units
        many = units - units % 5
        for u in range(0, many, 5):
            signed_sums_5(signs, weights + u * weight_stride, weight_stride, octets, sums + 4 * u)
        for u in range(many, units):
            signed_sums_1(signs, weights + u * weight_stride, weight_stride, octets, sums + 4 * u)


@cached()
def end(bits, stride, rows, weights, weight_stride, octets, units, out):
    """Write the products of signs and real weights as float32.

    Parameters
    ----------
    bits : address of words; stride from row to row in bytes
    rows : int
    weights : address of float32, a line a unit, zeros behind it; stride in bytes
    octets : int
        Bytes of signs in a row.
    units : int
    out : address of float32, shape (rows, units)
    """
    _end(bits, stride, rows, weights, weight_stride, octets, units, out)


@inline
def _hidden(bits, layer, sums, out):
    """A row through a layer of signs: see `through`."""
    weights, threshold = load_i64(layer), load_i64(layer + 8)
    flips, k = load_i64(layer + 16), load_i64(layer + 24)
    units, words = load_i64(layer + 32), load_i64(layer + 40)
    for first in range(0, units, 32):
        count = min(32, units - first)
        line, limits, turned = weights + 8 * words * first, threshold + 4 * first, flips + first
        for u in range(0, count & ~3, 4):
            count_4(line + 8 * words * u, 8 * words, bits, words, sums + 4 * u)
        if count == 32:
            store_i32(out + first // 8, compare_32(sums, k, limits, turned))
            continue
        for u in range(count & ~3, count):
            count_4(line + 8 * words * u, 0, bits, words, sums + 4 * u)
        signs = np.int64(0)
        for u in range(count):
            plus = np.int64(k - 2 * load_i32(sums + 4 * u) >= load_i32(limits + 4 * u))
            signs |= (plus ^ np.int64(load_u8(turned + u))) << u
        store_i32(out + first // 8, np.int32(signs))
    if units & 63 and units & 63 <= 32:  # the upper half of the last word
        store_i32(out + units // 64 * 8 + 4, np.int32(0))


@cached()
def through(
    x, stride, rows, layer, hidden, count, weights, weight_stride, octets, units, scratch, bits,
    bits_stride, out,
):  # fmt: skip
    """Write the logits of a few rows, which go through all layers one after the other.

    Parameters
    ----------
    x, stride, rows, layer, scratch
        As for `first`.
    hidden : address
        Six numbers for each layer between: addresses of its packed weights, thresholds (int32) and
        flips (bool), its inputs, units, and words of a line.
    count : int
        Layers between.
    weights, weight_stride, octets, units, out
        As for `end`.
    bits : address of two rows of words, `bits_stride` bytes apart
    """
    for r in range(rows):
        _first(
            x + r * stride, stride, 1, layer, 0, load_i64(layer + 56), scratch, bits,
            bits_stride,
        )  # fmt: skip
        here, there = bits, bits + bits_stride
        for i in range(count):
            _hidden(here, hidden + 48 * i, scratch, there)
            here, there = there, here
        _end(here, 0, 1, weights, weight_stride, octets, units, out + 4 * units * r)

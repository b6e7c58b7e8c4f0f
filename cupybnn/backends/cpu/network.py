"""The kernels of a packed network of pixels: its first and last layer, and a few rows through all.

Arguments are as for `cupybnn.backends.cpu.kernels`: addresses, strides in bytes and counts.

The first layer multiplies pixels with weights that are whole numbers, ``high * 2**shift + low``,
and compares with a whole threshold. VPMADDWD multiplies 16 pixels with 16 parts of weights and adds
neighbours, from half the memory that float32 takes. Almost always the sum with the high parts
decides; where it is too near to the threshold for that, the sum with the low parts is added.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from cupybnn.backends.cpu.cache import cached
from cupybnn.backends.cpu.intrinsics import (
    F32,
    I8,
    I16,
    I32,
    _has_avx2,
    _load,
    _number,
    _places,
    _store,
    load_i32,
    load_u8,
    load_u64,
    popcount,
    store_f32,
    store_u64,
)

__all__ = ["FIRST", "ROWS", "STEP", "end", "first", "scratch_bytes", "through"]

#: Pixels of an instruction; rows that a kernel has in its scratch memory at a time; bytes of the
#: sums of 64 units.
STEP, ROWS, SUMS = 16, 16, 256
_inline = njit(inline="never", nogil=True)


@_inline
def _number_at(address):
    """Return an integer of 8 bytes; it may be an address."""
    return np.int64(load_u64(address))


def scratch_bytes(padded: int) -> int:
    """Return the scratch memory of `first` for rows of so many pixels, rounded up to `STEP`."""
    return ROWS * (SUMS + 8 + 2 * padded)


def _madd(builder: Any, context: Any, a: Any, b: Any) -> Any:
    """Return the sums of neighbouring products of vectors of 16 int16, as eight int32."""
    halves, longs = ir.VectorType(I16, 16), ir.VectorType(I32, 16)
    if _has_avx2(context):
        kind = ir.FunctionType(ir.VectorType(I32, 8), [halves, halves])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pmadd.wd")
        return builder.call(function, [a, b])
    product = builder.mul(builder.sext(a, longs), builder.sext(b, longs))
    nothing = ir.Constant(longs, ir.Undefined)
    even, odd = (
        builder.shuffle_vector(product, nothing, _places(list(range(at, 16, 2)))) for at in (0, 1)
    )
    return builder.add(even, odd)


def _tile(rows: int, units: int) -> Any:
    """Return an intrinsic: the products of so many rows of pixels with so many units.

    They are written as int32, `SUMS` bytes from row to row.
    """
    vector, halves = ir.VectorType(I32, 8), ir.VectorType(I16, 16)

    @intrinsic
    def multiply(
        typing: Any, x: Any, x_stride: Any, w: Any, w_stride: Any, steps: Any, sums: Any
    ) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, x_stride, w, w_stride, steps, sums = args

            def lines(begin: Any, stride: Any, count: int) -> list[Any]:
                return [builder.add(begin, builder.mul(stride, _number(i))) for i in range(count)]

            left, right = lines(x, x_stride, rows), lines(w, w_stride, units)
            zero = ir.Constant(vector, None)
            totals = [cgutils.alloca_once_value(builder, zero) for _ in range(rows * units)]
            with cgutils.for_range(builder, steps) as loop:
                at = builder.mul(loop.index, _number(2 * STEP))
                pixels = [_load(builder, builder.add(line, at), halves) for line in left]
                for u, line in enumerate(right):
                    weights = _load(builder, builder.add(line, at), halves)
                    for r, pixel in enumerate(pixels):
                        total = totals[r * units + u]
                        product = _madd(builder, context, pixel, weights)
                        builder.store(builder.add(builder.load(total), product), total)
            name = "llvm.vector.reduce.add.v8i32"
            add = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(I32, [vector]), name
            )
            for i, total in enumerate(totals):
                value = builder.call(add, [builder.load(total)])
                at = SUMS * (i // units) + 4 * (i % units)
                _store(builder, value, builder.add(sums, _number(at)), 4)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), code

    return multiply


# Measured with 784 pixels: 64 billion products a second by a core, 48 by 2 x 4 or 3 x 4.
_tile_4_2, _tile_1_4, _tile_1_1 = _tile(4, 2), _tile(1, 4), _tile(1, 1)


@intrinsic
def _compare(typing: Any, sums: Any, total: Any, threshold: Any, shift: Any) -> Any:
    """Compare the sums of four units with their thresholds.

    Bits 0 to 3 of the result: whether a sum of high parts reaches the threshold. Bits 4 to 7:
    whether the low parts can change that; none of them exceeds half of ``2**shift``.
    """
    i64 = ir.IntType(64)
    longs, ints = ir.VectorType(i64, 4), ir.VectorType(I32, 4)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, total, threshold, shift = args
        by, zero = _load(builder, shift, longs), ir.Constant(longs, None)
        wide = builder.shl(builder.sext(_load(builder, sums, ints), longs), by)
        above = builder.sub(wide, _load(builder, threshold, longs))
        one = builder.insert_element(ir.Constant(longs, ir.Undefined), total, _number(0, I32))
        same = builder.shuffle_vector(one, zero, _places([0] * 4))
        half = builder.lshr(builder.shl(same, by), ir.Constant(longs, [ir.Constant(i64, 1)] * 4))
        bound = builder.select(builder.icmp_unsigned("==", by, zero), zero, half)
        near = builder.and_(
            builder.icmp_signed("<", above, bound),
            builder.icmp_signed(">=", above, builder.sub(zero, bound)),
        )
        reached = builder.icmp_signed(">=", above, zero)

        def bits(mask: Any) -> Any:
            return builder.zext(builder.bitcast(mask, ir.IntType(4)), i64)

        return builder.or_(bits(reached), builder.shl(bits(near), _number(4)))

    return types.int64(*[types.intp] * 4), code


@intrinsic
def _widen(typing: Any, source: Any, target: Any) -> Any:
    """Write 16 bytes as int16 and return their sum."""
    octets, halves = ir.VectorType(I8, 16), ir.VectorType(I16, 16)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = builder.zext(_load(builder, args[0], octets), halves)
        _store(builder, wide, args[1])
        add = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(I16, [halves]), "llvm.vector.reduce.add.v16i16"
        )
        return builder.zext(builder.call(add, [wide]), ir.IntType(64))

    return types.int64(types.intp, types.intp), code


@intrinsic
def _store_i16(typing: Any, address: Any, value: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _store(builder, builder.trunc(args[1], I16), args[0])
        return context.get_dummy_value()

    return types.void(types.intp, types.int64), code


@intrinsic
def _signed_sum(typing: Any, bits: Any, weights: Any, octets: Any) -> Any:
    """Return the sum of eight floats for each byte, negative where its bits are 0."""
    vector, masks = ir.VectorType(F32, 8), ir.VectorType(I32, 8)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits, weights, octets = args
        total = cgutils.alloca_once_value(builder, ir.Constant(vector, None))
        each = ir.Constant(masks, [ir.Constant(I32, 1 << i) for i in range(8)])
        sign = ir.Constant(masks, [ir.Constant(I32, 1 << 31)] * 8)
        none = ir.Constant(masks, None)
        with cgutils.for_range(builder, octets) as loop:
            octet = builder.zext(_load(builder, builder.add(bits, loop.index), I8), I32)
            one = builder.insert_element(ir.Constant(masks, ir.Undefined), octet, _number(0, I32))
            same = builder.shuffle_vector(one, none, _places([0] * 8))
            minus = builder.icmp_unsigned("==", builder.and_(same, each), none)
            at = builder.add(weights, builder.mul(loop.index, _number(32)))
            value = _load(builder, at, masks)
            flipped = builder.xor(value, builder.select(minus, sign, none))
            added = builder.fadd(builder.load(total), builder.bitcast(flipped, vector))
            builder.store(added, total)
        sums = builder.load(total)
        parts = [builder.extract_element(sums, _number(i, I32)) for i in range(8)]
        while len(parts) > 1:
            half = len(parts) // 2
            parts = [builder.fadd(a, b) for a, b in zip(parts[:half], parts[half:], strict=True)]
        return parts[0]

    return types.float32(types.intp, types.intp, types.intp), code


#: Numbers of a first layer, each 8 bytes: addresses of the high parts and of the low parts (int16,
#: a line a unit, padded to a multiple of STEP), the thresholds and shifts (int64), and the flips
#: (packed), all of them padded to a multiple of 64 units; its inputs, padded inputs and units.
FIRST = 8


@_inline
def _expand(x, stride, rows, inputs, padded, wide, totals):
    """Write pixels as int16, with zeros behind them, and their sums."""
    for r in range(rows):
        source, target, total = x + r * stride, wide + r * 2 * padded, np.int64(0)
        whole = inputs & ~15
        for i in range(0, whole, 16):
            total += _widen(source + i, target + 2 * i)
        for i in range(whole, padded):
            value = np.int64(load_u8(source + i)) if i < inputs else np.int64(0)
            total += value
            _store_i16(target + 2 * i, value)
        store_u64(totals + 8 * r, np.uint64(total))


@_inline
def _signs(sums, pixels, total, layer, word, count):
    """Return the signs of the 64 units from `word` on, of which `count` exist, for a row."""
    padded = _number_at(layer + 48)
    threshold, shift = _number_at(layer + 16) + 8 * word, _number_at(layer + 24) + 8 * word
    bits = np.uint64(0)
    for u in range(0, count, 4):
        found = _compare(sums + 4 * u, total, threshold + 8 * u, shift + 8 * u)
        if found >> 4:
            for i in range(min(4, count - u)):
                if found >> (4 + i) & 1:
                    here = 8 * (u + i)
                    above = np.int64(load_i32(sums + 4 * (u + i))) << _number_at(shift + here)
                    low = _number_at(layer + 8) + 2 * padded * (word + u + i)
                    place = sums + 4 * (u + i)
                    _tile_1_1(pixels, 0, low, 0, padded // 16, place)
                    above += np.int64(load_i32(place)) - _number_at(threshold + here)
                    found = found & ~(1 << i) | np.int64(above >= 0) << i
        bits |= np.uint64(found & 15) << np.uint64(u)
    bits ^= load_u64(_number_at(layer + 32) + word // 8)
    return bits if count == 64 else bits & ((np.uint64(1) << np.uint64(count)) - np.uint64(1))


@_inline
def _first(x, stride, rows, layer, u0, u1, scratch, out, out_stride):
    inputs, padded = _number_at(layer + 40), _number_at(layer + 48)
    high, steps, pitch = _number_at(layer), padded // 16, 2 * padded
    sums, totals = scratch, scratch + 16 * 256
    wide = totals + 16 * 8
    _expand(x, stride, rows, inputs, padded, wide, totals)
    for word in range(u0, u1, 64):
        count = min(64, u1 - word)
        for u in range(0, count, 4):
            line, r = high + pitch * (word + u), 0
            while r + 4 <= rows:
                place = sums + 256 * r + 4 * u
                _tile_4_2(wide + pitch * r, pitch, line, pitch, steps, place)
                _tile_4_2(wide + pitch * r, pitch, line + 2 * pitch, pitch, steps, place + 8)
                r += 4
            while r < rows:
                _tile_1_4(wide + pitch * r, 0, line, pitch, steps, sums + 256 * r + 4 * u)
                r += 1
        for r in range(rows):
            total = _number_at(totals + 8 * r)
            bits = _signs(sums + 256 * r, wide + pitch * r, total, layer, word, count)
            store_u64(out + r * out_stride + word // 8, bits)


@cached
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


@_inline
def _end(bits, stride, rows, weights, weight_stride, octets, units, out):
    for r in range(rows):
        for u in range(units):
            value = _signed_sum(bits + r * stride, weights + u * weight_stride, octets)
            store_f32(out + 4 * (r * units + u), value)


@cached
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


@_inline
def _hidden(bits, layer, out):
    """A row through a layer of signs: see `through`."""
    weights, threshold = _number_at(layer), _number_at(layer + 8)
    flips, k = _number_at(layer + 16), _number_at(layer + 24)
    units, words = _number_at(layer + 32), _number_at(layer + 40)
    for word in range(0, units, 64):
        signs = np.uint64(0)
        for u in range(word, min(word + 64, units)):
            line, total = weights + 8 * words * u, np.int64(0)
            for w in range(words):
                total += popcount(load_u64(line + 8 * w) ^ load_u64(bits + 8 * w))
            plus = np.uint64(k - 2 * total >= np.int64(load_i32(threshold + 4 * u)))
            signs |= (plus ^ np.uint64(load_u8(flips + u))) << np.uint64(u - word)
        store_u64(out + word // 8, signs)


@cached
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
            x + r * stride, stride, 1, layer, 0, _number_at(layer + 56), scratch, bits,
            bits_stride,
        )  # fmt: skip
        here, there = bits, bits + bits_stride
        for i in range(count):
            _hidden(here, hidden + 48 * i, there)
            here, there = there, here
        _end(here, 0, 1, weights, weight_stride, octets, units, out + 4 * units * r)

"""Pieces of LLVM code for a packed network of pixels: products of whole numbers, signed sums."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cupybnn.backends.cpu.llvm import F32, I8, I16, I32, has_avx2, load, number, places, store

__all__ = [
    "STEP",
    "SUMS",
    "compare",
    "signed_sums_1",
    "signed_sums_5",
    "tile_1_1",
    "tile_1_4",
    "tile_4_2",
    "widen",
]

#: Pixels of an instruction; bytes of the sums of 64 units.
STEP, SUMS = 16, 256


def _madd(builder: Any, context: Any, a: Any, b: Any) -> Any:
    """Return the sums of neighboring products of vectors of 16 int16, as eight int32."""
    halves, longs = ir.VectorType(I16, 16), ir.VectorType(I32, 16)
    if has_avx2(context):
        kind = ir.FunctionType(ir.VectorType(I32, 8), [halves, halves])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pmadd.wd")
        return builder.call(function, [a, b])
    product = builder.mul(builder.sext(a, longs), builder.sext(b, longs))
    nothing = ir.Constant(longs, ir.Undefined)
    even, odd = (
        builder.shuffle_vector(product, nothing, places(list(range(at, 16, 2)))) for at in (0, 1)
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
                return [builder.add(begin, builder.mul(stride, number(i))) for i in range(count)]

            left, right = lines(x, x_stride, rows), lines(w, w_stride, units)
            zero = ir.Constant(vector, None)
            totals = [cgutils.alloca_once_value(builder, zero) for _ in range(rows * units)]
            with cgutils.for_range(builder, steps) as loop:
                at = builder.mul(loop.index, number(2 * STEP))
                pixels = [load(builder, builder.add(line, at), halves) for line in left]
                for u, line in enumerate(right):
                    weights = load(builder, builder.add(line, at), halves)
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
                store(builder, value, builder.add(sums, number(at)), 4)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), code

    return multiply


# Measured with 784 pixels: 64 billion products a second by a core, 48 by 2 x 4 or 3 x 4.
tile_4_2, tile_1_4, tile_1_1 = _tile(4, 2), _tile(1, 4), _tile(1, 1)


@intrinsic
def compare(typing: Any, sums: Any, total: Any, threshold: Any, shift: Any) -> Any:
    """Compare the sums of four units with their thresholds.

    Bits 0 to 3 of the result: whether a sum of high parts reaches the threshold. Bits 4 to 7:
    whether the low parts can change that; none of them exceeds half of ``2**shift``.
    """
    i64 = ir.IntType(64)
    longs, ints = ir.VectorType(i64, 4), ir.VectorType(I32, 4)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, total, threshold, shift = args
        by, zero = load(builder, shift, longs), ir.Constant(longs, None)
        wide = builder.shl(builder.sext(load(builder, sums, ints), longs), by)
        above = builder.sub(wide, load(builder, threshold, longs))
        one = builder.insert_element(ir.Constant(longs, ir.Undefined), total, number(0, I32))
        same = builder.shuffle_vector(one, zero, places([0] * 4))
        half = builder.lshr(builder.shl(same, by), ir.Constant(longs, [ir.Constant(i64, 1)] * 4))
        bound = builder.select(builder.icmp_unsigned("==", by, zero), zero, half)
        near = builder.and_(
            builder.icmp_signed("<", above, bound),
            builder.icmp_signed(">=", above, builder.sub(zero, bound)),
        )
        reached = builder.icmp_signed(">=", above, zero)

        def bits(mask: Any) -> Any:
            return builder.zext(builder.bitcast(mask, ir.IntType(4)), i64)

        return builder.or_(bits(reached), builder.shl(bits(near), number(4)))

    return types.int64(*[types.intp] * 4), code


@intrinsic
def widen(typing: Any, source: Any, target: Any) -> Any:
    """Write 16 bytes as int16 and return their sum."""
    octets, halves = ir.VectorType(I8, 16), ir.VectorType(I16, 16)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = builder.zext(load(builder, args[0], octets), halves)
        store(builder, wide, args[1])
        add = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(I16, [halves]), "llvm.vector.reduce.add.v16i16"
        )
        return builder.zext(builder.call(add, [wide]), ir.IntType(64))

    return types.int64(types.intp, types.intp), code


def _signed_sums(units: int) -> Any:
    """Return an intrinsic: the sums of eight floats for each byte, negative where its bits are 0.

    Of so many units, one after the other in memory, whose additions do not wait for each other.
    """
    vector, masks = ir.VectorType(F32, 8), ir.VectorType(I32, 8)

    @intrinsic
    def write_sums(typing: Any, bits: Any, weights: Any, stride: Any, octets: Any, out: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            bits, weights, stride, octets, out = args
            zero = ir.Constant(vector, None)
            totals = [cgutils.alloca_once_value(builder, zero) for _ in range(units)]
            lines = [builder.add(weights, builder.mul(stride, number(u))) for u in range(units)]
            each = ir.Constant(masks, [ir.Constant(I32, 1 << i) for i in range(8)])
            sign = ir.Constant(masks, [ir.Constant(I32, 1 << 31)] * 8)
            none = ir.Constant(masks, None)
            with cgutils.for_range(builder, octets) as loop:
                octet = builder.zext(load(builder, builder.add(bits, loop.index), I8), I32)
                one = ir.Constant(masks, ir.Undefined)
                one = builder.insert_element(one, octet, number(0, I32))
                same = builder.shuffle_vector(one, none, places([0] * 8))
                minus = builder.icmp_unsigned("==", builder.and_(same, each), none)
                minus = builder.select(minus, sign, none)
                at = builder.mul(loop.index, number(32))
                for line, total in zip(lines, totals, strict=True):
                    value = builder.xor(load(builder, builder.add(line, at), masks), minus)
                    added = builder.fadd(builder.load(total), builder.bitcast(value, vector))
                    builder.store(added, total)
            for u, total in enumerate(totals):
                sums = builder.load(total)
                parts = [builder.extract_element(sums, number(i, I32)) for i in range(8)]
                while len(parts) > 1:
                    half = len(parts) // 2
                    parts = [
                        builder.fadd(a, b) for a, b in zip(parts[:half], parts[half:], strict=True)
                    ]
                store(builder, parts[0], builder.add(out, number(4 * u)))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 5), code

    return write_sums


signed_sums_5, signed_sums_1 = _signed_sums(5), _signed_sums(1)

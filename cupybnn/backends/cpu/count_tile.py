"""A tile of a product by counting: XOR and popcount."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cupybnn.backends.cpu.llvm import I32, I64, load, number, places, store, vector_of
from cupybnn.backends.cpu.memory import count_ones

__all__ = ["LANES", "add_counts", "count_4"]

#: Lines of one operand whose products a tile computes side by side.
LANES = 32


@intrinsic
def add_counts(
    typing: Any, table: Any, table_stride: Any, lane: Any, lane_stride: Any, words: Any, sums: Any
) -> Any:
    """Add the differing bits of 4 lines with 4 others to ``sums[unit * LANES + lane]``.

    Vectors of eight words: one VPOPCNTQ with AVX-512 VPOPCNTDQ, and what the processor has
    elsewhere.
    """
    width = 8
    vector = ir.VectorType(I64, width)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        table, table_stride, lane, lane_stride, words, sums = args

        def rows(first: Any, stride: Any) -> list[Any]:
            return [builder.add(first, builder.mul(stride, number(i))) for i in range(4)]

        tables, lanes = rows(table, table_stride), rows(lane, lane_stride)

        # Words come one by one, so that no registers hold those that are not counted yet.
        def differing(offset: Any, kind: Any) -> Iterator[Any]:
            left = [load(builder, builder.add(row, offset), kind, 1) for row in tables]
            right = [load(builder, builder.add(row, offset), kind, 1) for row in lanes]
            for x in left:
                for y in right:
                    yield builder.xor(x, y)

        def count(totals: list[Any], words: Iterable[Any]) -> None:
            for total, word in zip(totals, words, strict=True):
                builder.store(builder.add(builder.load(total), count_ones(builder, word)), total)

        def add_to_sums(unit: int, values: Any) -> None:
            address = builder.add(sums, number(4 * unit * LANES))
            before = load(builder, address, values.type, 4)
            store(builder, builder.add(before, values), address, 4)

        enough = builder.icmp_unsigned(">=", words, number(width))
        with builder.if_else(enough) as (in_vectors, one_by_one):
            with in_vectors:
                wide = [
                    cgutils.alloca_once_value(builder, ir.Constant(vector, None)) for _ in range(16)
                ]
                with cgutils.for_range(builder, builder.lshr(words, number(3))) as loop:
                    count(wide, differing(builder.mul(loop.index, number(8 * width)), vector))
                rest = builder.and_(words, number(width - 1))
                with builder.if_then(builder.icmp_unsigned("!=", rest, number(0))):
                    # The last eight words, without those that have been counted.
                    known = builder.sub(number(width), rest)
                    known = builder.insert_element(ir.Constant(vector, None), known, number(0, I32))
                    known = builder.shuffle_vector(known, known, places([0] * width))
                    new = builder.icmp_unsigned(">=", vector_of(vector, [*range(width)]), known)
                    new = builder.sext(new, vector)
                    last = builder.mul(builder.sub(words, number(width)), number(8))
                    count(wide, (builder.and_(w, new) for w in differing(last, vector)))
                totals = [builder.load(total) for total in wide]
                for unit in (0, 2):
                    both = builder.trunc(
                        _sums_of_eight(builder, totals[4 * unit : 4 * unit + 8]),
                        ir.VectorType(I32, 8),
                    )
                    for i in (0, 1):
                        four = places([4 * i + j for j in range(4)])
                        add_to_sums(unit + i, builder.shuffle_vector(both, both, four))
            with one_by_one:
                single = [cgutils.alloca_once_value(builder, number(0)) for _ in range(16)]
                with cgutils.for_range(builder, words) as loop:
                    count(single, differing(builder.mul(loop.index, number(8)), I64))
                for unit in range(4):
                    values = ir.Constant(ir.VectorType(I32, 4), ir.Undefined)
                    for i in range(4):
                        total = builder.trunc(builder.load(single[4 * unit + i]), I32)
                        values = builder.insert_element(values, total, number(i, I32))
                    add_to_sums(unit, values)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6), code


def _sums_of_eight(builder: Any, vectors: list[Any]) -> Any:
    """Return the sums of the elements of eight vectors of eight, as a vector.

    Halves are added to each other between vectors: so three steps take 21 instructions instead of
    the 56 that eight separate sums take.
    """

    def joined(x: Any, y: Any, low: list[int], high: list[int]) -> Any:
        pair = (builder.shuffle_vector(x, y, places(which)) for which in (low, high))
        return builder.add(*pair)

    steps = [([0, 8, 2, 10, 4, 12, 6, 14], [1, 9, 3, 11, 5, 13, 7, 15])]
    steps += [([0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15])] * 2
    for low, high in steps:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [joined(x, y, low, high) for x, y in pairs]
    return vectors[0]


@intrinsic
def count_4(typing: Any, lines: Any, stride: Any, line: Any, words: Any, counts: Any) -> Any:
    """Write the differing bits of 4 lines with another as int32.

    Word by word: for short lines that is faster than the vectors that LLVM would make of it.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lines, stride, line, words, counts = args
        rows = [builder.add(lines, builder.mul(stride, number(i))) for i in range(4)]
        totals = [cgutils.alloca_once_value(builder, number(0)) for _ in rows]
        in_order = ir.FunctionType(I64, [I64])
        with cgutils.for_range(builder, words) as loop:
            at = builder.shl(loop.index, number(3))
            other = load(builder, builder.add(line, at), I64)
            for row, total in zip(rows, totals, strict=True):
                word = builder.xor(load(builder, builder.add(row, at), I64), other)
                added = builder.add(builder.load(total), count_ones(builder, word))
                builder.store(builder.asm(in_order, "", "=r,0", [added], False), total)
        for i, total in enumerate(totals):
            value = builder.trunc(builder.load(total), I32)
            store(builder, value, builder.add(counts, number(4 * i)))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), code

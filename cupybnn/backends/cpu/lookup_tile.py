"""A tile of a product by table: PSHUFB looks up the differing bits of 16 lanes at once.

See LOOKUP in `cupybnn.backends.cpu.kernels`.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cupybnn.backends.cpu.llvm import (
    F32,
    I8,
    I16,
    I32,
    I64,
    has_avx2,
    load,
    number,
    places,
    store,
    vector_of,
)

__all__ = ["ADD", "BYTE_WORDS", "FLOATS", "INTEGERS", "SET", "count_lookups", "expand_word"]

BYTES, HALVES, LONGS = (ir.VectorType(I8, 32), ir.VectorType(I16, 16), ir.VectorType(I32, 16))
#: Words whose differing bits a byte can count: 7 * 8 * 4 < 256.
BYTE_WORDS = 7
#: What a tile does with its counts, as int32: write them, add them to what is there, or write
#: products, ``k - 2 * count``, as int32 or float32.
SET, ADD, INTEGERS, FLOATS = 0, 1, 2, 3


def _lookup_tile(units: int, vectors: int) -> Any:
    lanes = 16 * vectors

    @intrinsic
    def count_lookups(
        typing: Any, unit: Any, stride: Any, lane: Any, words: Any, table: Any, target: Any,
        pitch: Any, way: Any, k: Any,
    ) -> Any:  # fmt: skip
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if not has_avx2(context):  # never called there
                return context.get_dummy_value()
            unit, stride, lane, words, table, target, pitch, way, k = args
            shuffle = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(BYTES, [BYTES, BYTES]), "llvm.x86.avx2.pshuf.b"
            )

            def zeros(kind: Any) -> list[list[Any]]:
                zero = ir.Constant(kind, None)
                return [
                    [cgutils.alloca_once_value(builder, zero) for _ in range(vectors)]
                    for _ in range(units)
                ]

            def lines(first: Any, stride: Any) -> list[Any]:
                return [builder.add(first, builder.mul(stride, number(u))) for u in range(units)]

            counts, sums, rows = zeros(BYTES), zeros(HALVES), lines(unit, stride)

            def count_word(at: Any) -> None:
                word = builder.shl(at, number(3))
                here = builder.add(lane, builder.mul(word, number(2 * lanes)))
                for octet in range(8):
                    index = [
                        load(
                            builder,
                            builder.add(here, number((octet * vectors + v) * 32)),
                            BYTES,
                            32,
                        )
                        for v in range(vectors)
                    ]
                    for u in range(units):
                        address = builder.add(builder.add(rows[u], word), number(octet))
                        entry = builder.shl(
                            builder.zext(load(builder, address, I8), I64), number(5)
                        )
                        entries = load(builder, builder.add(table, entry), BYTES, 32)
                        for v in range(vectors):
                            total = builder.add(
                                builder.load(counts[u][v]),
                                builder.call(shuffle, [entries, index[v]]),
                            )
                            builder.store(_in_order(builder, total), counts[u][v])

            with cgutils.for_range_slice(
                builder, number(0), words, number(BYTE_WORDS), inc=True
            ) as (start, _):
                for row in counts:
                    for count in row:
                        builder.store(ir.Constant(BYTES, None), count)
                end = builder.add(start, number(BYTE_WORDS))
                end = builder.select(builder.icmp_signed("<", end, words), end, words)
                with cgutils.for_range(builder, builder.sub(end, start)) as loop:
                    count_word(builder.add(start, loop.index))
                for u in range(units):
                    for v in range(vectors):
                        both = _both_halves(builder, builder.load(counts[u][v]))
                        builder.store(builder.add(builder.load(sums[u][v]), both), sums[u][v])

            def each(write: Any) -> None:
                for u, line in enumerate(lines(target, pitch)):
                    for v in range(vectors):
                        total = builder.zext(builder.load(sums[u][v]), LONGS)
                        write(total, builder.add(line, number(64 * v)))

            def added(total: Any, address: Any) -> None:
                store(builder, builder.add(load(builder, address, LONGS, 4), total), address, 4)

            def product(total: Any) -> Any:
                one = ir.Constant(LONGS, ir.Undefined)
                one = builder.insert_element(one, builder.trunc(k, I32), number(0, I32))
                same = builder.shuffle_vector(one, one, places([0] * 16))
                return builder.sub(same, builder.add(total, total))

            ways = {
                SET: lambda total, address: store(builder, total, address, 4),
                ADD: added,
                INTEGERS: lambda total, address: store(builder, product(total), address, 4),
                FLOATS: lambda total, address: store(
                    builder,
                    builder.sitofp(product(total), ir.VectorType(F32, 16)),
                    address,
                    4,
                ),
            }
            done = builder.append_basic_block("written")
            switch = builder.switch(way, done)
            for value, write in ways.items():
                with builder.goto_block(builder.append_basic_block("write")):
                    switch.add_case(number(value), builder.block)
                    each(write)
                    builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 9), code

    return count_lookups


def _in_order(builder: Any, value: Any) -> Any:
    """Return `value`, behind an empty instruction that LLVM does not move sums across.

    It would add the lookups of several bytes to each other first, for which the registers do not
    suffice.
    """
    return builder.asm(ir.FunctionType(value.type, [value.type]), "", "=x,0", [value], False)


def _both_halves(builder: Any, counts: Any) -> Any:
    """Return the sums of the bytes i and 16 + i as a vector of 16 i16."""
    nothing = ir.Constant(BYTES, ir.Undefined)
    low, high = (
        builder.zext(
            builder.shuffle_vector(counts, nothing, places(list(range(at, at + 16)))), HALVES
        )
        for at in (0, 16)
    )
    return builder.add(low, high)


#: ``count_lookups[units, lanes]`` counts the differing bits of so many lines with so many lanes,
#: at most 65,535 for each.
count_lookups = {(u, 16 * v): _lookup_tile(u, v) for u in (1, 4) for v in (1, 2)}


def _expander(vectors: int) -> Any:
    quads = 2 * vectors  # words of eight bytes, a byte from each of eight lines
    vector, four = ir.VectorType(I64, quads), ir.VectorType(I64, 4)

    @intrinsic
    def expand_word(typing: Any, source: Any, stride: Any, last: Any, target: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            source, stride, last, target = args

            def same(value: int) -> Any:
                return vector_of(vector, [value] * quads)

            x = []
            for i in range(8):
                words = ir.Constant(vector, ir.Undefined)
                for quad in range(quads):
                    line = number(8 * quad + i)
                    line = builder.select(builder.icmp_signed("<", line, last), line, last)
                    word = load(builder, builder.add(source, builder.mul(line, stride)), I64)
                    words = builder.insert_element(words, word, number(quad, I32))
                x.append(words)
            # Transpose 8 x 8 bytes: pairs of bytes, of 16 bits, of 32.
            for step in (1, 2, 4):
                bits = 8 * step
                low = sum(((1 << bits) - 1) << at for at in range(0, 64, 2 * bits))
                high = low << bits
                for i in (i for i in range(8) if not i & step):
                    j = i + step
                    moved = builder.shl(x[j], same(bits)), builder.lshr(x[i], same(bits))
                    x[i], x[j] = (
                        builder.or_(
                            builder.and_(x[i], same(low)), builder.and_(moved[0], same(high))
                        ),
                        builder.or_(
                            builder.and_(moved[1], same(low)), builder.and_(x[j], same(high))
                        ),
                    )
            nibbles = same(0x0F0F0F0F0F0F0F0F)
            for octet in range(8):
                first = builder.and_(x[octet], nibbles)
                second = builder.and_(builder.lshr(x[octet], same(4)), nibbles)
                for v in range(vectors):
                    pairs = [2 * v, 2 * v + 1, quads + 2 * v, quads + 2 * v + 1]
                    both = builder.shuffle_vector(first, second, places(pairs))
                    assert both.type == four
                    address = builder.add(target, number((octet * vectors + v) * 32))
                    store(builder, both, address, 32)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 4), code

    return expand_word


#: ``expand_word[lanes]`` writes a word of so many lines as indices of tables: for each byte and
#: each 16 lanes a vector of their lower, then of their upper four bits.
expand_word = {16 * v: _expander(v) for v in (1, 2)}

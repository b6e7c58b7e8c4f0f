"""Pieces of LLVM code for the kernels: loads, popcounts, sign masks and the tiles of a product.

Numba compiles plain Python to good scalar code; the vector code of the inner loops is written here.
All memory is addressed by integers, so that a kernel has one signature whatever the arrays are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = [
    "LANES",
    "add_counts",
    "add_lookups",
    "expand_word",
    "fetch_add",
    "floats",
    "integers",
    "load_counter",
    "load_f32",
    "load_i32",
    "load_u8",
    "load_u64",
    "mask",
    "mask_8",
    "mask_64",
    "popcount",
    "store_f32",
    "store_i32",
    "store_u64",
]

#: Lines of one operand whose products a tile computes side by side.
LANES = 32

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32, F64 = ir.FloatType(), ir.DoubleType()
BYTES = ir.VectorType(I8, 32)


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _load(builder: Any, address: Any, kind: Any, align: int = 1) -> Any:
    value = builder.load(_pointer(builder, address, kind))
    value.align = align
    return value


def _store(builder: Any, value: Any, address: Any, align: int = 1) -> None:
    builder.store(value, _pointer(builder, address, value.type)).align = align


def _number(value: int, kind: Any = I64) -> Any:
    return ir.Constant(kind, value)


def _vector(kind: Any, values: list[int]) -> Any:
    return ir.Constant(kind, [ir.Constant(kind.element, value) for value in values])


def _places(values: list[int]) -> Any:
    return _vector(ir.VectorType(I32, len(values)), values)


def _loader(result: Any, kind: Any) -> Any:
    @intrinsic
    def load(typing: Any, address: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return _load(builder, args[0], kind)

        return result(types.intp), code

    return load


def _storer(given: Any) -> Any:
    @intrinsic
    def store(typing: Any, address: Any, value: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _store(builder, args[1], args[0])
            return context.get_dummy_value()

        return types.void(types.intp, given), code

    return store


load_u8 = _loader(types.uint8, I8)
load_u64 = _loader(types.uint64, I64)
load_i32 = _loader(types.int32, I32)
load_f32 = _loader(types.float32, F32)
store_u64 = _storer(types.uint64)
store_i32 = _storer(types.int32)
store_f32 = _storer(types.float32)


@intrinsic
def fetch_add(typing: Any, address: Any, value: Any) -> Any:
    """Add to an int64 that threads share, and return what it was."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(builder, args[0], I64), args[1], "seq_cst")

    return types.int64(types.intp, types.int64), code


@intrinsic
def load_counter(typing: Any, address: Any) -> Any:
    """Return an int64 that threads share, and see what they wrote before they changed it."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(builder, args[0], I64), "acquire", 8)

    return types.int64(types.intp), code


def _pointer_to(element: Any, kind: Any) -> Any:
    @intrinsic
    def pointer(typing: Any, address: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return _pointer(builder, args[0], kind)

        return types.CPointer(element)(types.intp), code

    return pointer


#: An address as a pointer, for `numba.carray`.
floats, integers = _pointer_to(types.float32, F32), _pointer_to(types.int64, I64)


def _popcount(builder: Any, value: Any) -> Any:
    name = "i64" if value.type == I64 else f"v{value.type.count}i64"
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(value.type, [value.type]), f"llvm.ctpop.{name}"
    )
    return builder.call(function, [value])


@intrinsic
def popcount(typing: Any, word: Any) -> Any:
    """Return the number of ones in a uint64."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _popcount(builder, args[0])

    return types.int64(types.uint64), code


# The sign bit ----------------------------------------------------------------------------------
# As `numpy_bits.write_bits` defines it, for any number of elements at once.

_FLOATS, _INTEGERS = {4: F32, 8: F64}, {1: I8, 2: I16, 4: I32, 8: I64}
_INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80}
_DTYPES = (
    *("float32", "float64", "float16", "bfloat16"),
    *("int8", "int16", "int32", "int64", "bool"),
)
#: The number by which a kernel is told the dtype of an operand, and the bytes of an element.
KINDS = {name: number for number, name in enumerate(_DTYPES)}
SIZES = (4, 8, 2, 2, 1, 2, 4, 8, 1)


def _sign_bits(builder: Any, address: Any, name: str, count: int) -> Any:
    """Load `count` elements of the dtype `name`; return an i1, or a vector of them, for x >= 0."""
    size = SIZES[KINDS[name]]
    kind = _FLOATS[size] if name in ("float32", "float64") else _INTEGERS[size]
    if count > 1:
        kind = ir.VectorType(kind, count)

    def same(value: int) -> Any:
        return _vector(kind, [value] * count) if count > 1 else ir.Constant(kind, value)

    x = _load(builder, address, kind)
    if name in ("float32", "float64"):
        return builder.fcmp_ordered(">=", x, ir.Constant(kind, None) if count > 1 else kind(0.0))
    if name == "bool":
        return builder.icmp_unsigned("!=", x, same(0))
    if name in _INFINITY:
        number = builder.icmp_unsigned("<=", x, same(_INFINITY[name]))
        return builder.or_(number, builder.icmp_unsigned("==", x, same(0x8000)))
    return builder.icmp_signed(">=", x, same(0))


def _masker(count: int) -> Any:
    @intrinsic
    def mask(typing: Any, address: Any, kind: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            end = builder.append_basic_block("mask.end")
            switch = builder.switch(args[1], end)
            results = [(_number(0), builder.block)]
            for name, number in KINDS.items():
                with builder.goto_block(builder.append_basic_block(f"mask.{name}")):
                    switch.add_case(_number(number), builder.block)
                    bits = _sign_bits(builder, args[0], name, count)
                    if count > 1:
                        bits = builder.bitcast(bits, ir.IntType(count))
                    word = bits if bits.type == I64 else builder.zext(bits, I64)
                    results.append((word, builder.block))
                    builder.branch(end)
            builder.position_at_end(end)
            word = builder.phi(I64)
            for value, block in results:
                word.add_incoming(value, block)
            return word

        return types.uint64(types.intp, types.intp), code

    return mask


#: The signs of 64 or eight neighbouring elements as a word, from bit 0, and of one.
mask_64, mask_8, mask = _masker(64), _masker(8), _masker(1)


# A tile by counting: XOR and popcount ----------------------------------------------------------


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
            return [builder.add(first, builder.mul(stride, _number(i))) for i in range(4)]

        tables, lanes = rows(table, table_stride), rows(lane, lane_stride)

        # Words come one by one, so that no registers hold those that are not counted yet.
        def differing(offset: Any, kind: Any) -> Iterator[Any]:
            left = [_load(builder, builder.add(row, offset), kind, 1) for row in tables]
            right = [_load(builder, builder.add(row, offset), kind, 1) for row in lanes]
            for x in left:
                for y in right:
                    yield builder.xor(x, y)

        def count(totals: list[Any], words: Iterable[Any]) -> None:
            for total, word in zip(totals, words, strict=True):
                builder.store(builder.add(builder.load(total), _popcount(builder, word)), total)

        def add_to_sums(unit: int, values: Any) -> None:
            address = builder.add(sums, _number(4 * unit * LANES))
            before = _load(builder, address, values.type, 4)
            _store(builder, builder.add(before, values), address, 4)

        enough = builder.icmp_unsigned(">=", words, _number(width))
        with builder.if_else(enough) as (in_vectors, one_by_one):
            with in_vectors:
                wide = [
                    cgutils.alloca_once_value(builder, ir.Constant(vector, None)) for _ in range(16)
                ]
                with cgutils.for_range(builder, builder.lshr(words, _number(3))) as loop:
                    count(wide, differing(builder.mul(loop.index, _number(8 * width)), vector))
                rest = builder.and_(words, _number(width - 1))
                with builder.if_then(builder.icmp_unsigned("!=", rest, _number(0))):
                    # The last eight words, without those that have been counted.
                    known = builder.sub(_number(width), rest)
                    known = builder.insert_element(
                        ir.Constant(vector, None), known, _number(0, I32)
                    )
                    known = builder.shuffle_vector(known, known, _places([0] * width))
                    new = builder.icmp_unsigned(">=", _vector(vector, [*range(width)]), known)
                    new = builder.sext(new, vector)
                    last = builder.mul(builder.sub(words, _number(width)), _number(8))
                    count(wide, (builder.and_(w, new) for w in differing(last, vector)))
                totals = [builder.load(total) for total in wide]
                for unit in (0, 2):
                    both = builder.trunc(
                        _sums_of_eight(builder, totals[4 * unit : 4 * unit + 8]),
                        ir.VectorType(I32, 8),
                    )
                    for i in (0, 1):
                        places = _places([4 * i + j for j in range(4)])
                        add_to_sums(unit + i, builder.shuffle_vector(both, both, places))
            with one_by_one:
                single = [cgutils.alloca_once_value(builder, _number(0)) for _ in range(16)]
                with cgutils.for_range(builder, words) as loop:
                    count(single, differing(builder.mul(loop.index, _number(8)), I64))
                for unit in range(4):
                    values = ir.Constant(ir.VectorType(I32, 4), ir.Undefined)
                    for i in range(4):
                        total = builder.trunc(builder.load(single[4 * unit + i]), I32)
                        values = builder.insert_element(values, total, _number(i, I32))
                    add_to_sums(unit, values)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6), code


def _sums_of_eight(builder: Any, vectors: list[Any]) -> Any:
    """Return the sums of the elements of eight vectors of eight, as a vector.

    Halves are added to each other between vectors: so three steps take 21 instructions instead of
    the 56 that eight separate sums take.
    """

    def joined(x: Any, y: Any, low: list[int], high: list[int]) -> Any:
        pair = (builder.shuffle_vector(x, y, _places(places)) for places in (low, high))
        return builder.add(*pair)

    steps = [([0, 8, 2, 10, 4, 12, 6, 14], [1, 9, 3, 11, 5, 13, 7, 15])]
    steps += [([0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15])] * 2
    for low, high in steps:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [joined(x, y, low, high) for x, y in pairs]
    return vectors[0]


# A tile by table: PSHUFB -----------------------------------------------------------------------


def _has_avx2(context: Any) -> bool:
    return "+avx2" in context.codegen().magic_tuple()[2].split(",")


def _lookup_tile(units: int, vectors: int) -> Any:
    lanes = 16 * vectors

    @intrinsic
    def add_lookups(
        typing: Any, unit: Any, stride: Any, lane: Any, words: Any, table: Any, sums: Any
    ) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if not _has_avx2(context):  # never called there
                return context.get_dummy_value()
            unit, stride, lane, words, table, sums = args
            shuffle = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(BYTES, [BYTES, BYTES]), "llvm.x86.avx2.pshuf.b"
            )
            zero = ir.Constant(BYTES, None)
            counts = [
                [cgutils.alloca_once_value(builder, zero) for _ in range(vectors)]
                for _ in range(units)
            ]
            rows = [builder.add(unit, builder.mul(stride, _number(u))) for u in range(units)]
            with cgutils.for_range(builder, words) as loop:
                word = builder.shl(loop.index, _number(3))
                here = builder.add(lane, builder.mul(word, _number(2 * lanes)))
                for octet in range(8):
                    index = [
                        _load(
                            builder,
                            builder.add(here, _number((octet * vectors + v) * 32)),
                            BYTES,
                            32,
                        )
                        for v in range(vectors)
                    ]
                    for u in range(units):
                        address = builder.add(builder.add(rows[u], word), _number(octet))
                        entry = builder.shl(
                            builder.zext(_load(builder, address, I8), I64), _number(5)
                        )
                        entries = _load(builder, builder.add(table, entry), BYTES, 32)
                        for v in range(vectors):
                            total = builder.add(
                                builder.load(counts[u][v]),
                                builder.call(shuffle, [entries, index[v]]),
                            )
                            builder.store(_in_order(builder, total), counts[u][v])
            for u in range(units):
                for v in range(vectors):
                    total = _both_halves(builder, builder.load(counts[u][v]))
                    address = builder.add(sums, _number(4 * (u * lanes + 16 * v)))
                    before = _load(builder, address, total.type, 4)
                    _store(builder, builder.add(before, total), address, 4)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), code

    return add_lookups


def _in_order(builder: Any, value: Any) -> Any:
    """Return `value`, behind an empty instruction that LLVM does not move sums across.

    It would add the lookups of several bytes to each other first, for which the registers do not
    suffice.
    """
    return builder.asm(ir.FunctionType(value.type, [value.type]), "", "=x,0", [value], False)


def _both_halves(builder: Any, counts: Any) -> Any:
    """Return the sums of the bytes i and 16 + i as a vector of 16 i32."""
    words, longs = ir.VectorType(I16, 16), ir.VectorType(I32, 16)
    nothing = ir.Constant(BYTES, ir.Undefined)
    low, high = (
        builder.zext(
            builder.shuffle_vector(counts, nothing, _places(list(range(at, at + 16)))), words
        )
        for at in (0, 16)
    )
    return builder.zext(builder.add(low, high), longs)


#: ``add_lookups[units, lanes]`` adds the differing bits of so many lines with so many lanes.
add_lookups = {(u, 16 * v): _lookup_tile(u, v) for u in (1, 4) for v in (1, 2)}


def _expander(vectors: int) -> Any:
    quads = 2 * vectors  # words of eight bytes, a byte from each of eight lines
    vector, four = ir.VectorType(I64, quads), ir.VectorType(I64, 4)

    @intrinsic
    def expand_word(typing: Any, source: Any, stride: Any, last: Any, target: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            source, stride, last, target = args

            def same(value: int) -> Any:
                return _vector(vector, [value] * quads)

            x = []
            for i in range(8):
                words = ir.Constant(vector, ir.Undefined)
                for quad in range(quads):
                    line = _number(8 * quad + i)
                    line = builder.select(builder.icmp_signed("<", line, last), line, last)
                    word = _load(builder, builder.add(source, builder.mul(line, stride)), I64)
                    words = builder.insert_element(words, word, _number(quad, I32))
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
                    places = _places([2 * v, 2 * v + 1, quads + 2 * v, quads + 2 * v + 1])
                    both = builder.shuffle_vector(first, second, places)
                    assert both.type == four
                    address = builder.add(target, _number((octet * vectors + v) * 32))
                    _store(builder, both, address, 32)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 4), code

    return expand_word


#: ``expand_word[lanes]`` writes a word of so many lines as indices of tables: for each byte and
#: each 16 lanes a vector of their lower, then of their upper four bits.
expand_word = {16 * v: _expander(v) for v in (1, 2)}

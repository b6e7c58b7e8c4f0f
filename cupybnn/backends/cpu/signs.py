"""The sign bits of neighboring elements, whatever their dtype, as `numpy_bits` defines them."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cupybnn.backends.cpu.llvm import (
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    load,
    number,
    places,
    store,
    vector_of,
)

__all__ = ["KINDS", "SIZES", "compare_32", "mask", "mask_8", "mask_64", "transpose"]

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
        return vector_of(kind, [value] * count) if count > 1 else ir.Constant(kind, value)

    x = load(builder, address, kind)
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
            results = [(number(0), builder.block)]
            for name, given in KINDS.items():
                with builder.goto_block(builder.append_basic_block(f"mask.{name}")):
                    switch.add_case(number(given), builder.block)
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


#: The signs of 64 or eight neighboring elements as a word, from bit 0, and of one.
mask_64, mask_8, mask = _masker(64), _masker(8), _masker(1)


@intrinsic
def transpose(typing: Any, square: Any) -> Any:
    """Transpose 64 x 64 bits at an address: bit j of word i becomes bit i of word j.

    Blocks are swapped as in Warren, Hacker's Delight, section 7-3, four rows at a time.
    """
    kind = ir.VectorType(I64, 4)

    def same(value: int) -> Any:
        return vector_of(kind, [value] * 4)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def differing(above: Any, below: Any, bits: int) -> Any:
            low = same(sum(((1 << bits) - 1) << i for i in range(0, 64, 2 * bits)))
            return builder.and_(builder.xor(builder.lshr(above, same(bits)), below), low)

        rows = [builder.add(args[0], number(32 * i)) for i in range(16)]
        x = [load(builder, row, kind, 8) for row in rows]
        for bits in (32, 16, 8, 4):
            for i in (i for i in range(16) if not i & (bits // 4)):
                j = i + bits // 4
                differ = differing(x[i], x[j], bits)
                x[i] = builder.xor(x[i], builder.shl(differ, same(bits)))
                x[j] = builder.xor(x[j], differ)
        for bits, above, below in (
            (2, [0, 1, 0, 1], [2, 3, 2, 3]),
            (1, [0, 0, 2, 2], [1, 1, 3, 3]),
        ):
            # Rows of a vector with each other; the upper of two gets what differs, moved.
            by = vector_of(kind, [0 if i in below else bits for i in range(4)])
            for i in range(16):
                first, second = (
                    builder.shuffle_vector(x[i], x[i], places(which)) for which in (above, below)
                )
                moved = builder.shl(differing(first, second, bits), by)
                x[i] = builder.xor(x[i], moved)
        for row, value in zip(rows, x, strict=True):
            store(builder, value, row, 8)
        return context.get_dummy_value()

    return types.void(types.intp), code


@intrinsic
def compare_32(typing: Any, counts: Any, k: Any, least: Any, flips: Any) -> Any:
    """Return the signs of 32 products, ``k - 2 * count``, from bit 0.

    A sign is +1 from `least` on, an int32 for each, or 0 where that address is 0; the other way
    round where `flips`, a byte for each, is not 0.
    """
    longs, octets = ir.VectorType(I32, 32), ir.VectorType(I8, 32)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        counts, k, least, flips = args

        def there(address: Any, kind: Any) -> Any:
            """Return what is at an address, or zeros."""
            zero = ir.Constant(kind, None)
            value = cgutils.alloca_once_value(builder, zero)
            with builder.if_then(builder.icmp_unsigned("!=", address, number(0))):
                builder.store(load(builder, address, kind), value)
            return builder.load(value)

        one = ir.Constant(longs, ir.Undefined)
        one = builder.insert_element(one, builder.trunc(k, I32), number(0, I32))
        same = builder.shuffle_vector(one, one, places([0] * 32))
        count = load(builder, counts, longs, 4)
        product = builder.sub(same, builder.add(count, count))
        plus = builder.icmp_signed(">=", product, there(least, longs))
        flip = builder.icmp_unsigned("!=", there(flips, octets), ir.Constant(octets, None))
        return builder.bitcast(builder.xor(plus, flip), I32)

    return types.int32(*[types.intp] * 4), code

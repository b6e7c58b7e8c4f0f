"""The sign bits of neighbouring elements, whatever their dtype, as `numpy_bits` defines them."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from cupybnn.backends.cpu.llvm import F32, F64, I8, I16, I32, I64, load, number, vector_of

__all__ = ["KINDS", "SIZES", "mask", "mask_8", "mask_64"]

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


#: The signs of 64 or eight neighbouring elements as a word, from bit 0, and of one.
mask_64, mask_8, mask = _masker(64), _masker(8), _masker(1)

"""What the pieces of LLVM code share: types, constants, loads and stores.

Numba compiles plain Python to good scalar code; the vector code of the inner loops is written as
LLVM code. All memory is addressed by integers, so that a kernel has one signature whatever the
arrays are.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

__all__ = [
    "F32",
    "F64",
    "I8",
    "I16",
    "I32",
    "I64",
    "has_avx2",
    "load",
    "number",
    "places",
    "pointer",
    "store",
    "vector_of",
]

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32, F64 = ir.FloatType(), ir.DoubleType()


def pointer(builder: Any, address: Any, kind: Any) -> Any:
    """Return an address as a pointer to `kind`."""
    return builder.inttoptr(address, kind.as_pointer())


def load(builder: Any, address: Any, kind: Any, align: int = 1) -> Any:
    """Return the value of a type at an address, a multiple of `align`."""
    value = builder.load(pointer(builder, address, kind))
    value.align = align
    return value


def store(builder: Any, value: Any, address: Any, align: int = 1) -> None:
    """Write a value to an address, a multiple of `align`."""
    builder.store(value, pointer(builder, address, value.type)).align = align


def number(value: int, kind: Any = I64) -> Any:
    """Return a constant."""
    return ir.Constant(kind, value)


def vector_of(kind: Any, values: list[int]) -> Any:
    """Return a constant of a type of vectors."""
    return ir.Constant(kind, [ir.Constant(kind.element, value) for value in values])


def places(values: list[int]) -> Any:
    """Return the places of elements for a shuffle."""
    return vector_of(ir.VectorType(I32, len(values)), values)


def has_avx2(context: Any) -> bool:
    """Whether the processor that a kernel is compiled for has AVX2."""
    return "+avx2" in context.codegen().magic_tuple()[2].split(",")

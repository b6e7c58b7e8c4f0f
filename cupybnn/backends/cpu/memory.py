"""Memory by its address, counters that threads share, and popcounts, for kernels."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cupybnn.backends.cpu.llvm import F32, I8, I32, I64, load, pointer, store

__all__ = [
    "count_ones",
    "fetch_add",
    "floats",
    "load_counter",
    "load_f32",
    "load_i32",
    "load_i64",
    "load_u8",
    "load_u64",
    "popcount",
    "store_f32",
    "store_i16",
    "store_i32",
    "store_u64",
]


def _loader(result: Any, kind: Any) -> Any:
    @intrinsic
    def loaded(typing: Any, address: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return load(builder, args[0], kind)

        return result(types.intp), code

    return loaded


def _storer(given: Any) -> Any:
    @intrinsic
    def stored(typing: Any, address: Any, value: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            store(builder, args[1], args[0])
            return context.get_dummy_value()

        return types.void(types.intp, given), code

    return stored


load_u8 = _loader(types.uint8, I8)
load_u64 = _loader(types.uint64, I64)
load_i64 = _loader(types.int64, I64)
load_i32 = _loader(types.int32, I32)
load_f32 = _loader(types.float32, F32)
store_u64 = _storer(types.uint64)
store_i16 = _storer(types.int16)
store_i32 = _storer(types.int32)
store_f32 = _storer(types.float32)


@intrinsic
def fetch_add(typing: Any, address: Any, value: Any) -> Any:
    """Add to an int64 that threads share, and return what it was."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", pointer(builder, args[0], I64), args[1], "seq_cst")

    return types.int64(types.intp, types.int64), code


@intrinsic
def load_counter(typing: Any, address: Any) -> Any:
    """Return an int64 that threads share, and see what they wrote before they changed it."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(pointer(builder, args[0], I64), "acquire", 8)

    return types.int64(types.intp), code


def _pointer_to(element: Any, kind: Any) -> Any:
    @intrinsic
    def as_pointer(typing: Any, address: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return pointer(builder, args[0], kind)

        return types.CPointer(element)(types.intp), code

    return as_pointer


#: An address as a pointer, for `numba.carray`.
floats = _pointer_to(types.float32, F32)


def count_ones(builder: Any, value: Any) -> Any:
    """Return the number of ones in a word, or in each of a vector."""
    name = "i64" if value.type == I64 else f"v{value.type.count}i64"
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(value.type, [value.type]), f"llvm.ctpop.{name}"
    )
    return builder.call(function, [value])


@intrinsic
def popcount(typing: Any, word: Any) -> Any:
    """Return the number of ones in a uint64."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return count_ones(builder, args[0])

    return types.int64(types.uint64), code

"""Packing of strided CuPy arrays, and conversion to and from the canonical layout."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cupybnn.backends.cuda import launching
from cupybnn.backends.cuda.compiler import architecture, load_kernel, multiprocessors
from cupybnn.backends.cuda.launching import Launch
from cupybnn.backends.cuda.lines import place, take
from cupybnn.backends.cuda.structs import Struct

__all__ = [
    "CHUNK_BITS",
    "C_TYPES",
    "OPERAND",
    "OPERANDS",
    "PackLaunch",
    "chunk_count",
    "from_canonical",
    "from_lines",
    "geometry",
    "pack",
    "select",
    "sign",
    "to_canonical",
    "unpack",
    "words_shape",
]

CHUNK_BITS = 1024
CHUNK_WORDS = CHUNK_BITS // 32
_WARPS = 8  # per block of smxx_pack.cu
_BLOCKS_ACROSS = 8  # per multiprocessor, at most, of an operand that is read across lines

OPERAND = Struct(
    "Operand",
    "ptr x, words, pops; i64 lines, k, chunks, batch, line_stride, k_stride, batch_stride;"
    "i64 across, wide, parts, blocks",
)
OPERANDS = Struct("Operands", "Operand a, b", OPERAND)
_ADDRESSES = OPERAND.section("x", "pops")
_NUMBERS = OPERAND.section("lines", "blocks")

# Element types of smxx_pack.cu by dtype name, because bfloat16 is not a NumPy type.
C_TYPES = {
    "float32": "float",
    "float64": "double",
    "float16": "float16_bits",
    "bfloat16": "bfloat16_bits",
    "int8": "signed char",
    "int16": "short",
    "int32": "int",
    "int64": "long long",
    "bool": "bool",
}


def chunk_count(k: int) -> int:
    """Return the number of chunks in a line of `k` bits; an empty line has one chunk of zeros."""
    return -(-k // CHUNK_BITS) or 1


def words_shape(batch: int, lines: int, k: int) -> tuple[int, int, int, int]:
    """Return the shape of the uint32 words of `batch` x `lines` lines of `k` bits (layout.cuh)."""
    return batch, chunk_count(k), (lines + 15) & ~15, CHUNK_WORDS


def pack(x: Any, axis: int) -> tuple[Any, Any]:
    """Pack the signs of a CuPy array of ndim >= 2 along `axis` (-1 or -2).

    Returns
    -------
    words : cupy.ndarray of uint32, in the layout of ``kernels/include/layout.cuh``
    popcounts : cupy.ndarray of int32, shape (*batch, lines)
    """
    if x.ndim > 3:
        words, popcounts = pack(x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:]), axis)
        return words, popcounts.reshape(*x.shape[:-2], popcounts.shape[-1])
    device = x.data.device_id
    key = (x.shape, x.strides, x.dtype, x.data.ptr & 15, axis, device)
    plan = _plans.get(key) or _plans.keep(key, _Plan(x, axis, device))
    words, popcounts = plan(x)
    return words, popcounts


class _Plan:
    """The launch that packs arrays of one kind, and what it returns; for one thread."""

    __slots__ = ("_launch", "_popcounts", "_shape")

    def __init__(self, x: Any, axis: int, device: int) -> None:
        batch, lines, k = geometry(x.shape, axis)
        self._shape = words_shape(batch, lines, k)
        self._popcounts = (*x.shape[:-2], lines)
        self._launch = PackLaunch([(x, axis)], device) if batch * lines else None

    def __call__(self, x: Any) -> tuple[Any, Any]:
        words, stream = launching.empty(self._shape, np.uint32), launching.current_stream()
        if self._launch is None:
            return words, launching.empty(self._popcounts, np.int32)
        memory = None
        if self._launch.adds_up[0]:
            memory = launching.zeros(4 * math.prod(self._popcounts), words.data.device_id, stream)
        popcounts = launching.empty(self._popcounts, np.int32, memory)
        self._launch(stream, x.data.ptr, words.data.ptr, popcounts.data.ptr)
        return words, popcounts


_plans = launching.Plans()


class PackLaunch:
    """A launch that packs one array, or both operands of a product, of a given kind.

    Parameters
    ----------
    operands : list of (x, axis)
        A CuPy array of shape (rows, columns) or (batch, rows, columns), non-empty except along
        `axis`, which is -1 or -2. The launch works for all arrays of the same shape, strides, dtype
        and alignment to 16 bytes.
    device : int
        Index of the current device.

    Attributes
    ----------
    adds_up : tuple of bool
        For each operand, whether its popcounts must be zeros at first: blocks add to them.

    Raises
    ------
    ValueError
        If an operand has 2**31 lines or more.
    """

    __slots__ = ("_go", "adds_up")

    def __init__(self, operands: list[tuple[Any, int]], device: int) -> None:
        numbers: list[bytes] = []
        adds_up = []
        blocks = 0
        for x, axis in operands:
            fields = _operand(x, axis, multiprocessors(device))
            batch, lines = fields["batch"], fields["lines"]
            if batch * ((lines + 15) & ~15) >= 2**31:
                raise ValueError(
                    f"One call packs fewer than 2**31 lines; got {batch} times {lines}. "
                    f"Pack in parts."
                )
            numbers.append(_NUMBERS.fields.pack(*fields.values()))
            blocks += fields["blocks"]
            adds_up.append(bool(fields["across"] and fields["parts"] > 1))
        self.adds_up = tuple(adds_up)
        first, last = operands[0][0].dtype.name, operands[-1][0].dtype.name
        types = (("TYPE_A", C_TYPES[first]), ("TYPE_B", C_TYPES[last]))
        defines = (("SAME_TYPE", int(first == last)), *types)
        kernel = load_kernel("smxx_pack", "pack_operands", defines, device)
        data = b"".join(bytes(_NUMBERS.offset) + each for each in numbers)
        places = [_ADDRESSES.within(OPERAND.size * i) for i in range(len(numbers))]
        self._go = Launch(
            kernel, blocks, 32 * _WARPS, 0, data.ljust(OPERANDS.size, b"\0"), *places,
            overlap=architecture(device) >= 90,
        ).go  # fmt: skip

    def __call__(self, stream: int, *addresses: int) -> None:
        """Pack operands on a stream, given the addresses of each one's array, words, popcounts."""
        self._go(stream, *addresses)


def _operand(x: Any, axis: int, multiprocessors: int) -> dict[str, int]:
    """Return the fields of struct Operand in smxx_pack.cu, in order, except the addresses."""
    shape, strides = x.shape, x.strides
    batch, batch_stride = (1, 0) if len(shape) == 2 else (shape[0], strides[0])
    if axis == -1:
        lines, k, line_stride, k_stride = shape[-2], shape[-1], strides[-2], strides[-1]
    else:
        lines, k, line_stride, k_stride = shape[-1], shape[-2], strides[-1], strides[-2]
    chunks = chunk_count(k)
    itemsize = x.itemsize
    across = line_stride == itemsize and k_stride != itemsize and lines > 1
    if across:
        neighbors = 8 // itemsize if itemsize < 4 else 2  # lines per lane, as in smxx_pack.cu
        aligned = itemsize * neighbors - 1
        wide = not ((x.data.ptr | batch_stride | k_stride) & aligned or lines % neighbors)
        # Wide loads give fewer blocks: avoid them if most of the GPU would be idle.
        quarters = 4 * chunks  # of 256 elements, which a block takes at a time
        wide = wide and batch * lines * quarters >= multiprocessors * 32 * neighbors
        groups = batch * -(-lines // (32 * (neighbors if wide else 1)))
        # Up to eight blocks per multiprocessor, with equal numbers of quarters if possible.
        parts = min(quarters, -(-_BLOCKS_ACROSS * multiprocessors // groups))
        parts = -(-quarters // -(-quarters // parts))
        blocks = groups * parts
    else:
        wide = k_stride == itemsize and not (x.data.ptr | batch_stride | line_stride) & 15
        # A warp takes four chunks at a time of 1-byte elements, two of 2-byte, one of larger.
        units = max(1, 4 // itemsize)
        parts = 1
        while parts < 8 and parts * units < chunks:
            parts *= 2
        blocks = -(-batch * ((lines + 15) & ~15) * parts // _WARPS)
    return {
        "lines": lines, "k": k, "chunks": chunks, "batch": batch,
        "line_stride": line_stride, "k_stride": k_stride, "batch_stride": batch_stride,
        "across": across, "wide": wide, "parts": parts, "blocks": blocks,
    }  # fmt: skip


def _plus_and_minus_one(dtype: np.dtype) -> tuple[str, int, int]:
    """Return the C type of a dtype, and +1 and -1 in it."""
    # Half precision by bit pattern; for bool, -1 is false, which a cast would not give.
    special = {"float16": ("unsigned short", 0x3C00, 0xBC00),
               "bfloat16": ("unsigned short", 0x3F80, 0xBF80),
               "bool": ("bool", 1, 0)}  # fmt: skip
    return special.get(dtype.name) or (C_TYPES[dtype.name], 1, -1)


def _flat_grid(count: int) -> tuple[int]:
    return (min(-(-count // 256), 1 << 16),)


def sign(x: Any, dtype: np.dtype) -> Any:
    """Return +1 where the CuPy array `x` is not negative and -1 elsewhere, in `dtype`."""
    import cupy

    out = cupy.empty(x.shape, dtype)
    x = cupy.ascontiguousarray(x)
    if out.size:
        c_type, one, minus_one = _plus_and_minus_one(dtype)
        result = (("RESULT", c_type), ("ONE", one), ("MINUS_ONE", minus_one))
        defines = (("TYPE", C_TYPES[x.dtype.name]), *result)
        kernel = load_kernel("smxx_sign", "sign", defines, out.device.id)
        kernel(_flat_grid(out.size), (256,), (x, out, out.size))
    return out


def unpack(words: Any, shape: tuple[int, ...], axis: int, dtype: Any) -> Any:
    """Unpack `words` into an array of +1 and -1 of the given logical shape."""
    import cupy

    dtype = np.dtype(dtype)
    batch, lines, k = geometry(shape, axis)
    out = cupy.empty((batch, lines, k), dtype)
    if out.size:
        c_type, one, minus_one = _plus_and_minus_one(dtype)
        defines = (("TYPE", c_type), ("ONE", one), ("MINUS_ONE", minus_one))
        kernel = load_kernel("smxx_unpack", "unpack_lines", defines, out.device.id)
        kernel(_flat_grid(out.size), (256,), (words, out, batch, lines, k, chunk_count(k)))
    if axis == -2:
        out = out.transpose(0, 2, 1)
    return cupy.ascontiguousarray(out).reshape(shape)


def geometry(shape: tuple[int, ...], axis: int) -> tuple[int, int, int]:
    """Return (batch size, lines, k) of matrices of `shape`, ndim >= 2, packed along `axis`."""
    lines, k = shape[-2:] if axis == -1 else shape[:-3:-1]
    return math.prod(shape[:-2]), lines, k


def to_canonical(words: Any, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Return the words as '<u8' on the host, (*batch, lines, ceil(k / 64)), zero-padded."""
    batch, lines, k = geometry(shape, axis)
    numbers = np.arange(batch * lines).reshape(*shape[:-2], lines)
    return take(np, words.get(), numbers, lines, k)


def from_canonical(canonical: np.ndarray, shape: tuple[int, ...], axis: int) -> Any:
    """Return canonical words on the current device, in the kernels' layout."""
    import cupy

    batch, lines, k = geometry(shape, axis)
    return cupy.asarray(place(np, canonical, batch, lines, k, words_shape(batch, lines, k)))


def select(words: Any, shape: tuple[int, ...], axis: int, key: tuple[Any, ...]) -> Any:
    """Return the lines that `key` selects, in the canonical layout, on the device of `words`."""
    import cupy

    batch, lines, k = geometry(shape, axis)
    numbers = cupy.arange(batch * lines).reshape(*shape[:-2], lines)[key]
    return take(cupy, words, cupy.asarray(numbers), lines, k)


def from_lines(lines: Any, shape: tuple[int, ...], axis: int) -> Any:
    """Return canonical lines on the device in the kernels' layout."""
    import cupy

    batch, count, k = geometry(shape, axis)
    return place(cupy, lines, batch, count, k, words_shape(batch, count, k))

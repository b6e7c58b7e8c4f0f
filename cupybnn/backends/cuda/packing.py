"""Packing strided CuPy arrays, and the way between their words and the portable ones."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cupybnn.backends.cuda.compiler import by_value, load_kernel

__all__ = [
    "CHUNK_BITS",
    "chunk_count",
    "from_canonical",
    "geometry",
    "pack",
    "pack_into",
    "to_canonical",
    "unpack",
    "words_shape",
]

CHUNK_BITS = 1024
CHUNK_WORDS = CHUNK_BITS // 32
_WARPS = 8  # of a block of smxx_pack.cu

_OPERANDS = np.dtype((np.void, 8 * 28))  # struct Operands of smxx_pack.cu

# Element types as smxx_pack.cu names them, by dtype name: bfloat16 is not NumPy's own.
_C_TYPES = {
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
    """Chunks of a line of `k` bits; an empty line has one, of zeros."""
    return -(-k // CHUNK_BITS) or 1


def words_shape(batch: int, lines: int, k: int) -> tuple[int, int, int, int]:
    """Shape of the uint32 words of `batch` times `lines` lines of `k` bits (layout.cuh)."""
    return batch, chunk_count(k), (lines + 7) & ~7, CHUNK_WORDS


def pack(x: Any, axis: int) -> tuple[Any, Any]:
    """Pack the signs of a CuPy array of ndim >= 2 along `axis` (-1 or -2).

    Returns
    -------
    words : cupy.ndarray of uint32, in the layout of ``kernels/include/layout.cuh``
    popcounts : cupy.ndarray of int32, shape (*batch, lines)
    """
    import cupy

    batch, lines, k = geometry(x.shape, axis)
    words = cupy.empty(words_shape(batch, lines, k), np.uint32)
    popcounts = cupy.empty((*x.shape[:-2], lines), np.int32)
    if popcounts.size:
        matrices = x if x.ndim <= 3 else x.reshape(batch, *x.shape[-2:])
        pack_into([(matrices, axis, words.data.ptr, popcounts.data.ptr)], x.device.id)
    return words, popcounts


def pack_into(operands: list[tuple[Any, int, int, int]], device: int) -> None:
    """Pack one or two arrays in one launch.

    Parameters
    ----------
    operands : list of (x, axis, words, popcounts)
        A CuPy array of shape (rows, columns) or (batch, rows, columns), none of them 0 except along
        `axis`; -1 or -2; addresses of the memory to fill.
    device : int
        The current device.
    """
    fields: list[int] = []
    blocks = 0
    for x, axis, words, popcounts in operands:
        fields += _operand(x, axis, words, popcounts)
        blocks += fields[-1]
    first, last = operands[0][0].dtype.name, operands[-1][0].dtype.name
    if len(operands) == 1:
        fields += [0] * len(fields)
    kernel = load_kernel(
        "smxx_pack",
        "pack_operands",
        (("TYPE_A", _C_TYPES[first]), ("TYPE_B", _C_TYPES[last])),
        device,
    )
    kernel((blocks,), (32 * _WARPS,), (by_value(fields, _OPERANDS),))


def _operand(x: Any, axis: int, words: int, popcounts: int) -> list[int]:
    """Return the fields of struct Operand in smxx_pack.cu."""
    shape, strides = x.shape, x.strides
    batch, batch_stride = (1, 0) if len(shape) == 2 else (shape[0], strides[0])
    if axis == -1:
        lines, k, line_stride, k_stride = shape[-2], shape[-1], strides[-2], strides[-1]
    else:
        lines, k, line_stride, k_stride = shape[-1], shape[-2], strides[-1], strides[-2]
    chunks = chunk_count(k)
    itemsize, address = x.itemsize, x.data.ptr
    across = line_stride == itemsize and k_stride != itemsize and lines > 1
    vector = 1
    if itemsize < 4 and not (address | batch_stride) & 3:
        fits = 4 // itemsize
        if across:
            if not (k_stride & 3 or lines % fits):
                vector = fits
        elif k_stride == itemsize and not line_stride & 3:
            vector = fits
    if across:
        groups = batch * -(-lines // (32 * vector))
        # Two blocks for each SM of a large GPU, where one for each group of lines is fewer.
        parts = 1 if groups >= 264 else min(chunks, -(-264 // groups))
        blocks = groups * parts
        if parts > 1:
            _zero(popcounts, 4 * batch * lines)
    else:
        parts = 1 if chunks == 1 else 2 if chunks == 2 else 4 if chunks <= 4 else 8
        blocks = -(-batch * ((lines + 7) & ~7) * parts // _WARPS)
    return [
        address, words, popcounts, lines, k, chunks, batch, line_stride, k_stride, batch_stride,
        across, vector, parts, blocks,
    ]  # fmt: skip


def _zero(address: int, size: int) -> None:
    import cupy

    cupy.cuda.runtime.memsetAsync(address, 0, size, cupy.cuda.get_current_stream().ptr)


def unpack(words: Any, shape: tuple[int, ...], axis: int, dtype: Any) -> Any:
    """Return the array of +1 and -1 of the given logical shape that `words` hold."""
    import cupy

    dtype = np.dtype(dtype)
    batch, lines, k = geometry(shape, axis)
    out = cupy.empty((batch, lines, k), dtype)
    if out.size:
        bits = {"float16": ("unsigned short", 0x3C00, 0xBC00),
                "bfloat16": ("unsigned short", 0x3F80, 0xBF80)}  # fmt: skip
        c_type, one, minus_one = bits.get(dtype.name) or (_C_TYPES[dtype.name], 1, -1)
        kernel = load_kernel(
            "smxx_unpack",
            "unpack_lines",
            (("TYPE", c_type), ("ONE", one), ("MINUS_ONE", minus_one)),
            out.device.id,
        )
        blocks = min(-(-out.size // 256), 1 << 16)
        kernel((blocks,), (256,), (words, out, batch, lines, k, chunk_count(k)))
    if axis == -2:
        out = out.transpose(0, 2, 1)
    return cupy.ascontiguousarray(out).reshape(shape)


def geometry(shape: tuple[int, ...], axis: int) -> tuple[int, int, int]:
    """Return (batch size, lines, k) of matrices of `shape`, ndim >= 2, packed along `axis`."""
    lines, k = shape[-2:] if axis == -1 else shape[:-3:-1]
    return math.prod(shape[:-2]), lines, k


def _pieces(lines8: int) -> np.ndarray:
    """Where piece p of each line stands: index array of shape (lines8, 8)."""
    return np.arange(8)[None] ^ (np.arange(lines8) & 7)[:, None]


def to_canonical(words: Any, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Return the words as '<u8' on the host, (*batch, lines, ceil(k / 64)), zero padded."""
    batch, lines, k = geometry(shape, axis)
    host = words.get().reshape(*words_shape(batch, lines, k)[:3], 8, 4)
    lines8 = host.shape[2]
    host = np.take_along_axis(host, _pieces(lines8)[None, None, :, :, None], axis=3)
    host = np.moveaxis(host, 1, 2).reshape(batch, lines8, -1)[:, :lines]
    canonical = np.ascontiguousarray(host).view("<u8")[..., : -(-k // 64)]
    return np.ascontiguousarray(canonical).reshape(*shape[:-2], lines, -(-k // 64))


def from_canonical(canonical: np.ndarray, shape: tuple[int, ...], axis: int) -> Any:
    """Return canonical words on the current device, in the layout of the kernels."""
    import cupy

    batch, lines, k = geometry(shape, axis)
    _, chunks, lines8, _ = words_shape(batch, lines, k)
    host = np.zeros((batch, lines8, chunks * 16), "<u8")
    host[:, :lines, : canonical.shape[-1]] = canonical.reshape(batch, lines, -1)
    pieces = np.moveaxis(host.view(np.uint32).reshape(batch, lines8, chunks, 8, 4), 2, 1)
    # The permutation is its own inverse.
    swizzled = np.take_along_axis(pieces, _pieces(lines8)[None, None, :, :, None], axis=3)
    return cupy.asarray(np.ascontiguousarray(swizzled).reshape(batch, chunks, lines8, CHUNK_WORDS))

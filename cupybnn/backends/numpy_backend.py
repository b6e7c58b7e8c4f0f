"""Packing and products on the CPU. Packed words are in the canonical layout.

What is large enough is handed to kernels compiled by Numba where that is installed; see
`cupybnn.backends.cpu`. All else, and all without it, is pure NumPy, with the same results.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from cupybnn.backends import cpu, numpy_product
from cupybnn.backends.epilogue import Epilogue
from cupybnn.backends.levels import SIGNS, Levels
from cupybnn.backends.numpy_bits import write_bits
from cupybnn.backends.numpy_lines import BLOCK, bits_to_signs, blocks
from cupybnn.backends.numpy_order import fill_order
from cupybnn.backends.numpy_random import random_words, uniform
from cupybnn.backends.numpy_threads import parallel_for, parallel_parts

__all__ = [
    "fill_order",
    "force_kernel",
    "from_canonical",
    "from_lines",
    "gemm",
    "gemm_packed",
    "kernels",
    "pack",
    "pack_levels",
    "parallel_for",
    "parallel_parts",
    "passes",
    "prepare",
    "prepared",
    "quantize_gradient",
    "random_words",
    "select",
    "sign",
    "to_canonical",
    "uniform",
    "unpack",
    "unpack_levels",
]

WORD = np.dtype("<u8")

# Work for which it is worth importing compiled kernels: multiplications, elements to pack, elements
# of a pass over arrays. Once they are there, products and packing of any size gain from them.
IMPORT_PRODUCTS, IMPORT_ELEMENTS, IMPORT_PASS = 1 << 17, 1 << 20, 1 << 18
# Elements from which a pass gains; multiplications of each product of a batch, because NumPy takes
# many small ones together.
KERNEL_PASS, KERNEL_BATCHED = 1 << 8, 1 << 18

_forced: str | None = None
#: Products that compiled kernels are ready to compute, by what the caller knows them by: functions
#: of two arrays, or words of packed matrices. At most so many.
prepared: dict[Any, Callable[[Any, Any], np.ndarray]] = {}
_MOST_PREPARED = 4096


def sign(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return +1 where `x` is not negative and -1 elsewhere, in `dtype`."""
    if x.dtype == dtype and (compiled := passes(x)) is not None:
        result: np.ndarray = compiled.sign(x)
        return result
    # numpy.where branches on each element: on random signs this is ten times as fast.
    signs = np.empty_like(x, dtype)

    def write_part(part: Any) -> None:
        signs[part] = bits_to_signs(write_bits(x[part]))

    parallel_parts(x, 0, write_part)
    return signs


def pack(x: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack the signs of `x` along its last axis (-1) or its last but one (-2).

    Parameters
    ----------
    x : ndarray, shape (..., M, K)
        Of a dtype that has a sign.
    axis : int

    Returns
    -------
    words : ndarray of uint64, shape (..., lines, ceil(k / 64))
    popcounts : ndarray of int32, shape (..., lines)
    """
    compiled = _compiled(x.shape[-2] * x.shape[-1], IMPORT_ELEMENTS)
    if compiled is not None and compiled.can_pack(x.dtype):
        return compiled.pack(x, axis)
    batch, k, lines = x.shape[:-2], x.shape[axis], x.shape[-3 - axis]
    words = np.zeros((*batch, lines, -(-k // 64)), WORD)
    octets = words.view(np.uint8)
    for index in np.ndindex(
        batch if x.size else (0,)
    ):  # leading axes of an empty array may be long
        matrix = x[index] if axis == -1 else x[index].T
        if abs(matrix.strides[0]) >= abs(matrix.strides[1]):
            _pack_rows(matrix, octets[index])
        else:
            _pack_columns(matrix.T, octets[index].T)
    return words, np.bitwise_count(words).sum(axis=-1, dtype=np.int32)


def _pack_rows(x: np.ndarray, octets: np.ndarray) -> None:
    """Pack each row of `x`, whose rows are contiguous in memory, into bytes."""
    rows, k = x.shape

    def work(start: int, stop: int) -> None:
        for part in blocks(start, stop, max(1, BLOCK // max(1, k))):
            bits = np.packbits(write_bits(x[part]), axis=1, bitorder="little")
            octets[part, : bits.shape[1]] = bits

    parallel_for(rows, x.size, work)


def _pack_columns(x: np.ndarray, octets: np.ndarray) -> None:
    """Pack each column of `x`, whose rows are contiguous in memory, into bytes.

    Shifting whole rows turns eight rows into a row of bytes, which is much faster than gathering
    the bits of a column one by one.
    """
    k, lines = x.shape
    full = k // 8

    def work(start: int, stop: int) -> None:
        for part in blocks(start, stop, max(1, BLOCK // 4 // max(1, lines))):
            bits = write_bits(x[8 * part.start : 8 * part.stop]).view(np.uint8)
            octets[part] = _eight_rows(bits)

    parallel_for(full, x.size, work)
    if k % 8:
        last = np.zeros((8, lines), bool)
        write_bits(x[8 * full :], last[: k % 8])
        octets[full] = _eight_rows(last.view(np.uint8))[0]


def _eight_rows(bits: np.ndarray) -> np.ndarray:
    """Pack each group of eight rows of 0 and 1 into a row of bytes; the first row is bit 0."""
    packed = bits[7::8].copy()
    for j in range(6, -1, -1):
        packed += packed
        packed |= bits[j::8]
    return packed


def unpack(words: np.ndarray, shape: tuple[int, ...], axis: int, dtype: np.dtype) -> np.ndarray:
    """Unpack `words` into an array of +1 and -1 of shape `shape`.

    For dtype bool, +1 is True and -1 is False.
    """
    out = np.empty(shape, dtype)
    k, lines = shape[axis], shape[-3 - axis]
    for index in np.ndindex(words.shape[:-2] if out.size else (0,)):
        by_line = out[index] if axis == -1 else out[index].T
        octets = words[index].view(np.uint8)
        for part in blocks(0, lines, max(1, BLOCK // max(1, k))):
            bits = np.unpackbits(octets[part], axis=1, count=k, bitorder="little")
            by_line[part] = bits.view(bool) if out.dtype.kind == "b" else bits_to_signs(bits)
    return out


def gemm(a: Any, b: Any, out: np.ndarray, epilogue: Epilogue | None) -> None:
    """Write the product of the signs of `a` and `b` into `out`.

    Parameters
    ----------
    a : ndarray or PackedMatrix packed along -1, shape (..., M, K)
    b : ndarray or PackedMatrix packed along -2, shape (..., K, N)
    out : ndarray, shape (..., M, N)
        Its leading axes are those of `a` and `b`, broadcast. It overlaps neither operand.
    epilogue : Epilogue or None

    Notes
    -----
    Of two packed operands, one may have levels other than signs.
    """
    if _has_levels(a) or _has_levels(b):
        _planes().gemm_levels(a, b, out, epilogue)
        return
    compiled = _compiled_for(a, b)
    if compiled is None:
        numpy_product.product(a, b, out, epilogue)
    elif out.size:
        compiled.gemm(a, b, out, epilogue)


def prepare(key: Any, a: Any, b: Any, dtype: np.dtype) -> None:
    """Add a product of two matrices to `prepared`, if compiled kernels take it.

    Parameters
    ----------
    key
        Decides the operands' shapes, strides and dtypes, and that of the result.
    a, b
        As for `gemm`, without levels other than signs.
    dtype : dtype
        Of the result.
    """
    compiled = None if _forced is not None else _compiled_for(a, b)
    if compiled is None:
        return
    multiply = compiled.prepared(a, b, dtype)
    if multiply is not None:
        if len(prepared) >= _MOST_PREPARED:
            prepared.clear()
        prepared[key] = multiply


def kernels() -> list[str]:
    """Return the names of what computes products on this CPU: "numpy" and, with Numba, "numba"."""
    return ["numpy", *([cpu.NAME] if cpu.status().available else [])]


@contextlib.contextmanager
def force_kernel(name: str) -> Iterator[None]:
    """Context in which this process computes all products on the CPU by one of `kernels`."""
    global _forced, prepared
    before = _forced, prepared
    _forced, prepared = name, {}
    try:
        yield
    finally:
        _forced, prepared = before


def passes(x: Any, *others: Any) -> ModuleType | None:
    """Return what passes over arrays in compiled code, with NumPy's results, or None.

    Parameters
    ----------
    x, *others
        The arrays; the size of the first decides whether it is worth it.
    """
    if type(x) is not np.ndarray or x.size < max(KERNEL_PASS, 1):
        return None
    if _compiled(x.size, IMPORT_PASS) is None:
        return None
    found = cpu.compiled_passes()
    return found if found.takes(x, *others) else None


def _compiled(work: int, load: int) -> ModuleType | None:
    """Return the compiled kernels, if there are any and `work` is worth importing them."""
    if _forced is not None:
        return cpu.compiled() if _forced == cpu.NAME else None
    return cpu.compiled(work >= load)


def _compiled_for(a: Any, b: Any) -> ModuleType | None:
    """Return the compiled kernels for a product, or None if NumPy computes it."""
    shape = a.shape
    products = shape[-2] * shape[-1] * b.shape[-1]
    if b.ndim > 2:
        if products < KERNEL_BATCHED and _forced is None:
            return None
    elif len(shape) > 2:
        products *= math.prod(shape[:-2])
    compiled = _compiled(products, IMPORT_PRODUCTS)
    return compiled if compiled is not None and compiled.takes(a, b) else None


def gemm_packed(
    a: Any, b: Any, threshold: np.ndarray | None, flip: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the words and popcounts of ``(product >= threshold) != flip``, packed along N.

    Parameters
    ----------
    a, b
        As for `gemm`.
    threshold : ndarray of int32, shape (N,), or None for 0
    flip : ndarray of bool, shape (N,), or None for False
    """
    if _has_levels(a) or _has_levels(b):
        return _planes().gemm_levels_packed(a, b, threshold, flip)  # type: ignore[no-any-return]
    compiled = _compiled_for(a, b)
    if compiled is not None:
        return compiled.gemm_packed(a, b, threshold, flip)
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    acc = np.empty((*batch, a.shape[-2], b.shape[-1]), np.int32)
    numpy_product.product(a, b, acc, None)
    bits = acc >= (0 if threshold is None else threshold)
    if flip is not None:
        bits ^= flip
    return pack(bits, -1)


def pack_levels(x: np.ndarray, axis: int, levels: Levels) -> tuple[np.ndarray, np.ndarray]:
    """Pack the levels nearest to `x`; see `numpy_planes.pack_levels`."""
    return _planes().pack_levels(x, axis, levels)  # type: ignore[no-any-return]


def unpack_levels(
    words: np.ndarray, shape: tuple[int, ...], axis: int, levels: Levels, dtype: np.dtype
) -> np.ndarray:
    """Unpack `words` into an array of levels of shape `shape`."""
    return _planes().unpack_levels(words, shape, axis, levels, dtype)  # type: ignore[no-any-return]


def quantize_gradient(
    grad: np.ndarray, levels: Levels, seed: int, counter: int, first: int, greatest: Any = None
) -> Any:
    """Quantize a gradient; see `numpy_planes.quantize_gradient`."""
    return _planes().quantize_gradient(grad, levels, seed, counter, first, greatest)


def _has_levels(operand: Any) -> bool:
    return getattr(operand, "levels", SIGNS) is not SIGNS


def _planes() -> ModuleType:
    """Return what works plane by plane, on top of this module."""
    from cupybnn.backends import numpy_planes

    return numpy_planes


def to_canonical(words: np.ndarray, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Return the words in the canonical layout, which is this backend's own."""
    return words


def from_canonical(canonical: np.ndarray, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Return words in this backend's layout, which is the canonical one."""
    return canonical


def select(words: np.ndarray, shape: tuple[int, ...], axis: int, key: tuple[Any, ...]) -> Any:
    """Return the lines that `key` selects, in the canonical layout; a view if possible."""
    return words[(*key, slice(None))]


def from_lines(lines: np.ndarray, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Return canonical lines in this backend's layout: contiguous."""
    return np.ascontiguousarray(lines)

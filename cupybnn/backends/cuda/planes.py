"""Matrices of several bits on a GPU: packing, unpacking, quantized gradients, and turned signs.

Words are in the layout of ``kernels/include/layout.cuh``, the chunks of all planes one after the
other, the highest plane first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupybnn.backends.cuda.compiler import load_kernel
from cupybnn.backends.cuda.packing import C_TYPES, chunk_count, geometry
from cupybnn.backends.cuda.structs import Kernel, Struct
from cupybnn.backends.levels import Levels, stored_k

__all__ = [
    "GradientLevels",
    "TurnedSigns",
    "pack_levels",
    "planes_shape",
    "quantize_gradient",
    "unpack_levels",
]

PLANE_LINES = Struct("PlaneLines", "ptr words, sums; i64 lines, chunks")
NUMBERS = Struct(
    "Numbers",
    "ptr x; i64 batch, rows, cols, batch_stride, row_stride, col_stride, along_columns;"
    "PlaneLines to",
    PLANE_LINES,
)
TURN = Struct("Turn", "ptr words; i64 lines, k, chunks; PlaneLines to", PLANE_LINES)
GRADIENT = Struct(
    "Gradient",
    "ptr g; i64 rows, cols; ptr row_most, col_most, row_scale, col_scale;"
    "PlaneLines by_row, by_col; u64 seed; i64 draw; ptr step; i64 first",
    PLANE_LINES,
)
PACK_PLANES = Kernel("smxx_pack_planes", "pack_planes", "Numbers p", NUMBERS)
UNPACK_PLANES = Kernel(
    "smxx_unpack_planes", "unpack_planes", "ptr words, out; i64 batch, lines, k, chunks"
)
TURN_SIGNS = Kernel("smxx_turn", "turn", "Turn p", TURN)
MOST = Kernel("smxx_gradient_levels", "most", "Gradient p", GRADIENT)
QUANTIZE = Kernel("smxx_gradient_levels", "quantize", "Gradient p", GRADIENT)

_TILE, _THREADS = 128, 256  # as in planes.cuh
_EIGHT = 8  # rows whose random numbers share a block of words
_MOST_TILE = 256  # rows and columns of a block of `most`
_C_TYPES = {
    **C_TYPES,
    "uint8": "unsigned char",
    "uint16": "unsigned short",
    "uint32": "unsigned int",
    "uint64": "unsigned long long",
}
_REAL = {"float32": "float", "uint16": "bfloat16_bits"}


def planes_shape(batch: int, lines: int, k: int, bits: int) -> tuple[int, int, int, int]:
    """Return the shape of the uint32 words of lines of `k` elements of so many bits."""
    return batch, bits * chunk_count(k), (lines + 15) & ~15, 32


def _tiles(rows: int, cols: int, size: int = _TILE) -> int:
    return -(-rows // size) * -(-cols // size)


def _launch(kernel: Kernel, defines: Any, device: int, blocks: int, **values: Any) -> None:
    if blocks >= 2**31:
        raise ValueError("A matrix has more tiles than a launch can have blocks. Pack in parts.")
    loaded = load_kernel(kernel.source, kernel.function, defines, device)
    loaded((blocks,), (_THREADS,), kernel.arguments(**values))


def pack_levels(x: Any, axis: int, levels: Levels) -> tuple[Any, Any]:
    """Pack the levels nearest to a CuPy array of ndim >= 2 along `axis`, -1 or -2.

    Returns
    -------
    words : cupy.ndarray of uint32, of `planes_shape`
    sums : cupy.ndarray of int32, shape (*batch, lines)
        Of the levels' numbers.
    """
    import cupy

    if x.ndim > 3:
        words, sums = pack_levels(x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:]), axis, levels)
        return words, sums.reshape(*x.shape[:-2], sums.shape[-1])
    batch, lines, k = geometry(x.shape, axis)
    words = cupy.zeros(planes_shape(batch, lines, k, levels.bits), np.uint32)
    sums = cupy.zeros((*x.shape[:-2], lines), np.int32)
    if not x.size:
        return words, sums
    to = PLANE_LINES.pack(words=words, sums=sums, lines=lines, chunks=chunk_count(k))
    along_columns = axis == -2
    if abs(x.strides[-2]) < abs(x.strides[-1]):  # neighbors of a column are adjacent
        x, along_columns = x.swapaxes(-1, -2), not along_columns
    rows, cols = x.shape[-2:]
    argument = NUMBERS.pack(
        x=x, batch=batch, rows=rows, cols=cols, batch_stride=x.strides[0] if x.ndim > 2 else 0,
        row_stride=x.strides[-2], col_stride=x.strides[-1], along_columns=along_columns, to=to,
    )  # fmt: skip
    defines = (
        ("PLANES", levels.bits),
        ("TYPE", _C_TYPES[x.dtype.name]),
        ("UNSIGNED", int(not levels.signed)),
    )
    _launch(PACK_PLANES, defines, words.device.id, batch * _tiles(rows, cols), p=argument)
    return words, sums


def unpack_levels(
    words: Any, shape: tuple[int, ...], axis: int, levels: Levels, dtype: np.dtype
) -> Any:
    """Unpack `words` into an array of levels of the given logical shape."""
    import cupy

    batch, lines, k = geometry(shape, axis)
    out = cupy.empty((batch, lines, k), np.int16)
    if out.size:
        defines = (("PLANES", levels.bits), ("UNSIGNED", int(not levels.signed)))
        blocks = min(-(-out.size // _THREADS), 1 << 16)
        _launch(
            UNPACK_PLANES, defines, out.device.id, blocks, words=words, out=out, batch=batch,
            lines=lines, k=k, chunks=stored_k(k, levels, "cuda") // levels.bits // 1024,
        )  # fmt: skip
    if axis == -2:
        out = out.transpose(0, 2, 1)
    return cupy.ascontiguousarray(out.astype(dtype)).reshape(shape)


class GradientLevels:
    """A gradient's levels, packed along its rows and along its columns: memory, and its launches.

    Parameters
    ----------
    rows, cols : int
        Neither is 0.
    bits : int

    Attributes
    ----------
    row_words, col_words : cupy.ndarray of uint32, of `planes_shape`
        Packed along axis -1, a line a row; and along axis -2, a line a column.
    row_sums, col_sums : cupy.ndarray of int32
        Of the levels' numbers in each line.
    row_scale, col_scale : cupy.ndarray of float32
        Of each line; a level times its line's scale is the element, rounded.
    row_most, col_most : cupy.ndarray of int32
        Greatest magnitude in each line, as the bits of a float.
    """

    def __init__(self, rows: int, cols: int, bits: int) -> None:
        import cupy

        self.shape, self.bits = (rows, cols), bits
        self.row_words = cupy.zeros(planes_shape(1, rows, cols, bits), np.uint32)
        self.col_words = cupy.zeros(planes_shape(1, cols, rows, bits), np.uint32)
        #: What must be zeros when the launches begin.
        down, across = (-(-n // 4) * 4 for n in (rows, cols))  # kernels load four at a time
        self.cleared = cupy.empty(2 * (down + across), np.int32)
        self.row_sums, self.col_sums = self.cleared[:rows], self.cleared[down : down + cols]
        self.row_most, self.col_most = (
            self.cleared[down + across :][:rows],
            self.cleared[-across:][:cols],
        )
        self._scales = cupy.empty(down + across, np.float32)
        self.row_scale, self.col_scale = self._scales[:rows], self._scales[down:][:cols]

    def clear(self) -> None:
        """Set sums and greatest magnitudes to zeros on the current stream."""
        self.cleared.data.memset_async(0, self.cleared.nbytes)

    def measure(self, grad: Any) -> None:
        """Find the greatest magnitudes of rows and columns on the current stream.

        Parameters
        ----------
        grad : cupy.ndarray, shape (rows, cols), C-contiguous
            float32, or uint16 for bfloat16.
        """
        self.clear()
        self._run(MOST, _MOST_TILE, grad)

    def quantize(self, grad: Any, seed: int, draw: int, step: Any = None, first: int = 0) -> None:
        """Quantize a gradient, after `measure`, on the current stream.

        A kernel that writes the gradient may find the greatest magnitudes instead, after `clear`.

        Parameters
        ----------
        grad : cupy.ndarray
            The same.
        seed, draw : int
            See `cupybnn.backends.random`; `draw` is the counter.
        step : cupy.ndarray of int64, shape (1,), optional
            Added to `draw`.
        first : int
            Rows before this part of a batch.
        """
        self._run(QUANTIZE, _TILE, grad, seed, draw, step, first)

    def _run(
        self, kernel: Kernel, tile: int, grad: Any, seed: int = 0, draw: int = 0,
        step: Any = None, first: int = 0,
    ) -> None:  # fmt: skip
        rows, cols = self.shape
        eights, offset = divmod(first, _EIGHT)
        argument = GRADIENT.pack(
            g=grad, rows=rows, cols=cols, row_most=self.row_most, col_most=self.col_most,
            row_scale=self.row_scale, col_scale=self.col_scale,
            by_row=PLANE_LINES.pack(
                words=self.row_words, sums=self.row_sums, lines=rows, chunks=chunk_count(cols)
            ),
            by_col=PLANE_LINES.pack(
                words=self.col_words, sums=self.col_sums, lines=cols, chunks=chunk_count(rows)
            ),
            seed=seed, draw=draw, step=step, first=eights,
        )  # fmt: skip
        defines = (("PLANES", self.bits), ("REAL", _REAL[grad.dtype.name]), ("OFFSET", offset))
        _launch(kernel, defines, grad.data.device_id, _tiles(rows, cols, tile), p=argument)


def quantize_gradient(
    grad: Any,
    levels: Levels,
    seed: int,
    counter: int,
    first: int,
    greatest: Callable[[Any], Any] | None = None,
) -> tuple[tuple[Any, Any, Any], tuple[Any, Any, Any]]:
    """Quantize a gradient; see `cupybnn.backends.numpy_planes.quantize_gradient`."""
    import cupy

    rows, cols = grad.shape
    made = GradientLevels(rows, cols, levels.bits)
    if grad.size:
        grad = cupy.ascontiguousarray(grad, dtype=np.float32)
        made.measure(grad)
        if greatest is not None:
            made.col_most[...] = greatest(made.col_most)
        made.quantize(grad, seed, counter, first=first)
    else:
        for array in (made.cleared, made._scales):
            array.fill(0)
    return (
        (made.row_words, made.row_sums, made.row_scale),
        (made.col_words, made.col_sums, made.col_scale),
    )


@dataclass(frozen=True)
class TurnedSigns:
    """A packed matrix of signs, packed along the other axis: memory, and the launch that fills it.

    Attributes
    ----------
    words : cupy.ndarray of uint32
    popcounts : cupy.ndarray of int32
    """

    words: Any
    popcounts: Any

    @classmethod
    def of(cls, lines: int, k: int) -> TurnedSigns:
        """Return memory for what `lines` lines of `k` signs become: `k` lines of `lines`."""
        import cupy

        words = cupy.zeros(planes_shape(1, k, lines, 1), np.uint32)
        return cls(words, cupy.empty(k, np.int32))

    def launch(self, words: Any, lines: int) -> None:
        """Turn `lines` lines of packed words on the current stream."""
        k = self.popcounts.size
        self.popcounts.data.memset_async(0, self.popcounts.nbytes)
        to = PLANE_LINES.pack(
            words=self.words, sums=self.popcounts, lines=k, chunks=chunk_count(lines)
        )
        argument = TURN.pack(words=words, lines=lines, k=k, chunks=chunk_count(k), to=to)
        _launch(TURN_SIGNS, (), self.words.device.id, _tiles(lines, k), p=argument)

"""Products of pixels and of signs with real weights, through integers.

Pixels meet digits of weights in the product kernel for bytes, signs meet bit planes in the one for
bits; see `cupybnn.deploy.digits` for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cupybnn.backends.cuda import dispatch
from cupybnn.backends.cuda.architectures import sm90
from cupybnn.backends.cuda.compiler import load_kernel
from cupybnn.backends.cuda.configs import Config, Problem
from cupybnn.backends.cuda.launching import Launch
from cupybnn.backends.cuda.lines import place
from cupybnn.backends.cuda.packing import words_shape
from cupybnn.backends.cuda.product import gemm, prepare
from cupybnn.backends.cuda.product_launch import PRODUCT
from cupybnn.backends.cuda.steps import STEPS, pack_steps
from cupybnn.backends.cuda.structs import Kernel, Struct

__all__ = [
    "MOST_SIGNS",
    "Arrangement",
    "PixelProduct",
    "PlaneProduct",
    "Sum",
    "pixel_config",
    "runs_on",
]

BYTE_LINES = Struct("ByteLines", "ptr words, cleared; i64 clear, rows, cols, chunks; ptr x")
BYTE_LINES_KERNEL = Kernel("smxx_byte_lines", "byte_lines", "ByteLines p", BYTE_LINES)
_X = BYTE_LINES.section("x", "x")
PLANE_SUM = Struct(
    "PlaneSum", "ptr planes, step; Steps after; i64 rows, units, pitch; ptr out", STEPS
)
PLANE_SUM_KERNEL = Kernel("smxx_plane_sum", "plane_sum", "PlaneSum p", PLANE_SUM)
_OUT = PLANE_SUM.section("out", "out")
_CONSTANTS = 2  # pixels that smxx_byte_lines.cu appends
_PACKED = 4  # OUTPUT_* of product.cuh
#: Inputs whose products with signs fit an int16.
MOST_SIGNS = 2**15 - 1


def runs_on(capability: int) -> bool:
    """Whether the product kernel for bytes runs on a compute capability."""
    return capability in sm90.CAPABILITIES


def pixel_config(problem: Problem, digits: int = 1) -> Config:
    """Return the configuration of the product kernel for bytes, with so many digits of weights."""
    tiles, multiprocessors = problem.tiles(128, 128), problem.multiprocessors
    if tiles * 2 <= multiprocessors:
        return sm90.config(1, 64, 8, consumers=1 if tiles * 4 <= multiprocessors else 2)
    if tiles <= multiprocessors:
        return sm90.config(1, 128, 6)
    # Measured on an H200 for 1024, 8192 and 65,536 images of 784 pixels and 4096 units. Passes over
    # several digits need registers that a tile of 192 columns does not leave.
    wide = digits == 1 and tiles > 64 * multiprocessors
    return sm90.config(2, 192 if wide else 128, 4)


class PixelProduct:
    """Pixels times real weights, compared with thresholds, packed.

    Parameters
    ----------
    digits : ndarray of int8, shape (digits, units, inputs + 2)
    threshold : ndarray of int32, shape (units,)
        See `cupybnn.deploy.digits.pixel_digits`.
    flip : cupy.ndarray of bool, shape (units,)
    device : int
        Number of the current device, one that `runs_on` allows.

    Attributes
    ----------
    words : cupy.ndarray of uint32, shape (1, digits * chunks, padded units, 32)
        The digits, laid out.
    threshold, flip : cupy.ndarray
    """

    def __init__(self, digits: np.ndarray, threshold: np.ndarray, flip: Any, device: int) -> None:
        import cupy

        count, self.units, width = digits.shape
        self.inputs, self.digits, self._device = width - _CONSTANTS, count, device
        # Bytes as lines of bits: eight of these to each.
        lines = np.zeros((count, self.units, -(-width // 8) * 8), np.int8)
        lines[..., :width] = digits
        words = [
            place(
                np,
                each.view("<u8"),
                1,
                self.units,
                8 * width,
                words_shape(1, self.units, 8 * width),
            )
            for each in lines
        ]
        self.chunks = words[0].shape[1]
        self.words = cupy.asarray(np.concatenate(words, axis=1))
        self.threshold, self.flip = cupy.asarray(threshold), flip

    def lines_like(self, rows: int) -> Any:
        """Return memory for the pixels of so many images."""
        import cupy

        return cupy.empty(words_shape(1, rows, 8 * (self.inputs + _CONSTANTS)), np.uint32)

    def arrangement(self, words: Any, rows: int, cleared: Any = None) -> Arrangement:
        """Return the launch that lays out pixels for the product.

        Parameters
        ----------
        words : cupy.ndarray
            Of `lines_like`. The caller keeps it.
        rows : int
            Images.
        cleared : cupy.ndarray of int32, optional
            C-contiguous; becomes zeros. The caller keeps it.
        """
        kernel = load_kernel(BYTE_LINES_KERNEL.source, BYTE_LINES_KERNEL.function, (), self._device)
        argument = BYTE_LINES.pack(
            words=words, cleared=cleared, clear=0 if cleared is None else cleared.size, rows=rows,
            cols=self.inputs, chunks=self.chunks, x=0,
        )  # fmt: skip
        blocks = min(-(-words.size // 1024), 1 << 14)
        return Arrangement(Launch(kernel, blocks, 256, 0, argument, _X))

    def __call__(self, words: Any, rows: int) -> tuple[Any, Any]:
        """Multiply laid out pixels.

        Returns
        -------
        words, popcounts : cupy.ndarray
            As those of `cupybnn.backends.cuda.product.gemm_packed`.
        """
        import cupy

        out = cupy.zeros(words_shape(1, rows, self.units), np.uint32)
        ones = cupy.zeros(rows, np.int32)
        self.prepared(words, rows, out, ones)(cupy.cuda.get_current_stream().ptr)
        return out, ones

    def prepared(self, words: Any, rows: int, out: Any, ones: Any) -> Launch:
        """Return the launch of a call, for results in memory that is zeros before the launch."""
        units, chunks = self.units, self.chunks
        problem = dispatch.problem_on(self._device, rows, units, 1024 * chunks, packed=True)
        config = pixel_config(problem, self.digits)
        defines = (*config.defines, ("OUTPUT", _PACKED), ("SCALED", 0), ("DIGITS", self.digits))
        kernel = load_kernel("sm90_xnor_gemm", "xnor_gemm", defines, self._device, config.shared)
        argument = PRODUCT.pack(
            a=words, b=self.words, pop_a=0, pop_b=0, out=out, out_pop=ones, row_scale=0,
            col_scale=0, bias=0, threshold=self.threshold, flip=self.flip, sums=0, m=rows,
            n=units, k=self.inputs, chunks=chunks, batch=1, a_step=1, b_step=1, out_row=0,
            out_col=0, out_batch=0, row_scale_batch=0, col_scale_batch=0, bias_batch=0, swapped=0,
            group=config.group, parts=1,
        )  # fmt: skip
        blocks = config.blocks(config.tiles(rows, units, 1), 1, problem.multiprocessors)
        return Launch(kernel, blocks, config.threads, config.shared, argument)


class Arrangement:
    """A launch that lays out the pixels of so many images; see `PixelProduct.arrangement`."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def __call__(self, x: Any, stream: int) -> None:
        """Lay out pixels: uint8, shape (rows, inputs), C-contiguous; on a stream's address."""
        self._launch.go(stream, x.data.ptr)


class Sum:
    """A launch that puts products with planes together; see `PlaneProduct.prepared`."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def __call__(self, out: Any, stream: int) -> None:
        """Fill `out`: float32, shape (rows, units), C-contiguous; on a stream's address."""
        self._launch.go(stream, out.data.ptr)


class PlaneProduct:
    """Signs times real weights.

    Parameters
    ----------
    planes : PackedMatrix, shape (inputs, columns), packed along the inputs
        Of `cupybnn.deploy.digits.sign_planes`, and any further columns, which are not read:
        `columns` is a multiple of 8. At most `MOST_SIGNS` inputs.
    shift : ndarray of int, shape (units,)
        The weights are whole numbers times ``2.0 ** -shift``; from -126 to 126.
    """

    def __init__(self, planes: Any, shift: np.ndarray) -> None:
        import cupy

        self.units, self._planes = len(shift), planes
        self._step = cupy.asarray(np.ldexp(1.0, -shift).astype(np.float32))

    def __call__(self, x: Any) -> Any:
        """Multiply signs.

        Parameters
        ----------
        x : PackedMatrix, shape (rows, inputs), packed along the inputs
            At least one row.

        Returns
        -------
        cupy.ndarray of float32, shape (rows, units)
        """
        import cupy

        rows = x.shape[0]
        planes = self.planes_like(rows)
        gemm(x, self._planes, planes, None)
        out = cupy.empty((rows, self.units), np.float32)
        self._sum(planes, rows, ())(out, cupy.cuda.get_current_stream().ptr)
        return out

    def planes_like(self, rows: int) -> Any:
        """Return memory for the products of so many rows with the planes."""
        import cupy

        return cupy.empty((rows, self._planes.shape[1]), np.int16)

    def prepared(
        self, x: Any, planes: Any, steps: Sequence[tuple[str, Any]]
    ) -> tuple[Callable[[int], None], Sum]:
        """Return the two launches of a call, with steps after it; the caller keeps the arrays.

        Parameters
        ----------
        x : PackedMatrix, shape (rows, inputs)
        planes : cupy.ndarray
            Of `planes_like`.
        steps : sequence of (kind, array)
            See `cupybnn.backends.cuda.steps.pack_steps`.
        """
        return prepare(x, self._planes, planes), self._sum(planes, x.shape[0], steps)

    def _sum(self, planes: Any, rows: int, steps: Sequence[tuple[str, Any]]) -> Sum:
        kernel = load_kernel(
            PLANE_SUM_KERNEL.source, PLANE_SUM_KERNEL.function, (), planes.data.device_id
        )
        argument = PLANE_SUM.pack(
            planes=planes, step=self._step, after=pack_steps(steps), rows=rows, units=self.units,
            pitch=planes.shape[1], out=0,
        )  # fmt: skip
        blocks = min(-(-rows * self.units // 256), 1 << 14)
        return Sum(Launch(kernel, blocks, 256, 0, argument, _OUT))

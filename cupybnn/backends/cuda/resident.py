"""Layers of a packed network whose weights stay in shared memory, for many rows.

A launch each, which waits for the work in front of it only after it has begun to fetch its weights.
See ``kernels/sm90_resident_gemm.cu``.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import numpy as np

from cupybnn.backends.cuda.architectures import sm90
from cupybnn.backends.cuda.compiler import (
    architecture,
    load_kernel,
    multiprocessors,
    shared_memory_limit,
)
from cupybnn.backends.cuda.launching import Launch
from cupybnn.backends.cuda.lines import place
from cupybnn.backends.cuda.packing import chunk_count, words_shape
from cupybnn.backends.cuda.sign_gemm import TENSOR_MAP
from cupybnn.backends.cuda.steps import STEPS, pack_steps
from cupybnn.backends.cuda.structs import Kernel, Section, Struct

__all__ = ["PLANES", "Shape", "Weights", "choose", "pixel_map"]

# As sm90_resident_gemm.cu has them.
_ROWS, _THREADS, _CHUNK, _STEP = 64, 384, 128, 32
_SLOT = _ROWS * _CHUNK + 16  # with its barriers
PLANES = 24
#: Units of a strip: of signs by signs, and of pixels by one digit and by three.
_SIGNS, _PIXELS, _THREE = (256, 128, 64, 32), (192, 128, 64, 32), (64, 32)
_ENDS = (10, 1)
_LEAST_STAGES, _MOST_STAGES = 4, 24

RESIDENT = Struct(
    "ResidentProduct",
    "TensorMap map; ptr out, a, a_ones, b, b_ones, threshold, rest, flip, constant, step;"
    "Steps after; ptr ones, cleared; i64 rows, units, k, b_chunks, strips",
    TENSOR_MAP,
    STEPS,
)
RESIDENT_KERNEL = Kernel("sm90_resident_gemm", "resident_gemm", "ResidentProduct p", RESIDENT)
#: The fields that launches set: words of the tensor map, and the result's address.
MAP = Section(struct.Struct("<16Q"), 0)
OUT = RESIDENT.section("out", "out")


@dataclass(frozen=True)
class Shape:
    """What of a layer decides how it is compiled and dealt out.

    Attributes
    ----------
    units : int
    width : int
        Bytes of an input: pixels, or signs by eight.
    digits : {0, 1, 3}
        0 for signs.
    end : bool
        Whether the results are numbers.
    """

    units: int
    width: int
    digits: int = 0
    end: bool = False

    @property
    def chunks(self) -> int:
        """Chunks of K."""
        return -(-self.width // _CHUNK)

    @property
    def last(self) -> int:
        """Instructions for the last chunk."""
        return -(-(self.width - (self.chunks - 1) * _CHUNK) // _STEP)

    @property
    def lines(self) -> int:
        """Lines of weights of a unit."""
        return PLANES if self.end else max(self.digits, 1)

    @property
    def strips(self) -> tuple[int, ...]:
        """Units that a strip may have."""
        if self.end:
            return _ENDS
        return {0: _SIGNS, 1: _PIXELS, 3: _THREE}[self.digits]

    def defines(self, units: int, stages: int) -> tuple[tuple[str, int], ...]:
        """Return what the kernel is compiled with for strips of so many units."""
        return (
            ("LINES", units * self.lines), ("CHUNKS", self.chunks), ("LAST", self.last),
            ("STAGES", stages), ("DIGITS", self.digits), ("END", int(self.end)),
        )  # fmt: skip

    def shared_bytes(self, units: int, stages: int) -> int:
        """Return the size of struct Shared of the kernel, or a few bytes more."""
        words = 1 if self.end else units // 32
        few = 8 * units + 8 * words + 8 * (self.chunks + 2)
        return self.chunks * units * self.lines * _CHUNK + few + 16 + stages * _SLOT

    def stages(self, units: int, limit: int) -> int:
        """Return the slots that fit in shared memory next to a strip; 0 if they are too few."""
        stages = min((limit - self.shared_bytes(units, 0)) // _SLOT, _MOST_STAGES)
        return max(0, stages) if stages >= _LEAST_STAGES else 0


@dataclass(frozen=True)
class Deal:
    """How a layer's rows and units are dealt out to blocks.

    Attributes
    ----------
    units : int
        Of a strip.
    strips, workers : int
        Blocks are ``strips * workers``.
    stages : int
    """

    units: int
    strips: int
    workers: int
    stages: int


def choose(shape: Shape, rows: int, multiprocessors: int, limit: int) -> Deal | None:
    """Return the fastest way to deal out `rows` rows, by counts of clocks; None if none fits.

    `limit` is the shared memory that a block may have.
    """
    tiles, found = -(-rows // _ROWS), []
    for units in shape.strips:
        strips, stages = -(-shape.units // units), shape.stages(units, limit)
        if not stages or strips > multiprocessors:
            continue
        workers = min(multiprocessors // strips, tiles)
        lines = units * shape.lines
        # A tile: the tensor cores, the L2 cache, or writing it out. Fetching the weights takes no
        # time, measured on an H200, since it begins early; of equals wider strips are better.
        steps = 4 * (shape.chunks - 1) + shape.last
        tile = max(steps * lines // 2, shape.chunks * _ROWS * _CHUNK // 28, 6 * lines)
        found.append((-(-tiles // workers) * tile, Deal(units, strips, workers, stages)))
    return min(found, key=lambda way: way[0])[1] if found else None


@dataclass(frozen=True)
class Weights:
    """A layer's weights on a GPU, and what follows its product.

    Made by `of_pixels`, `of_signs` or `of_end`, on the current device.
    """

    shape: Shape
    device: int
    fields: dict[str, Any]
    steps: Sequence[tuple[str, Any]] = ()
    kept: list[Any] = field(default_factory=list)

    @classmethod
    def of_pixels(
        cls, words: Any, digits: np.ndarray, threshold: Any, flip: Any, device: int
    ) -> Weights:
        """Return those of a first layer.

        Parameters
        ----------
        words : cupy.ndarray
            The digits, laid out by `cupybnn.backends.cuda.byte_product.PixelProduct`.
        digits : ndarray of int8, shape (digits, units, inputs + 2)
        threshold : cupy.ndarray of int32, shape (units,)
            See `cupybnn.deploy.digits.pixel_digits`.
        flip : cupy.ndarray of bool, shape (units,)
        device : int
        """
        import cupy

        count, units, width = digits.shape
        # The weights of the pixels 2 and 1 are what is added to the sums of a digit.
        added = digits[:, :, -2:].astype(np.int32) @ np.array([2, 1], np.int32)
        rest = cupy.asarray((added[0] + (added[1] << 8)) if count > 1 else added[0])
        fields = {
            "b": words, "threshold": threshold, "flip": flip, "rest": rest, "k": width - 2,
            "b_chunks": words.shape[1] // count,
        }  # fmt: skip
        return cls(Shape(units, width - 2, count), device, fields)

    @classmethod
    def of_signs(cls, weight: Any, threshold: Any, flip: Any, device: int) -> Weights:
        """Return those of a layer of signs by signs.

        Parameters
        ----------
        weight : PackedMatrix, shape (inputs, units), packed along the inputs
        threshold : cupy.ndarray of int32, shape (units,)
        flip : cupy.ndarray of bool, shape (units,)
        device : int
        """
        inputs, units = weight.shape
        fields = {
            "b": weight.words, "b_ones": weight.popcounts, "threshold": threshold, "flip": flip,
            "k": inputs, "b_chunks": chunk_count(inputs),
        }  # fmt: skip
        return cls(Shape(units, -(-inputs // 8)), device, fields)

    @classmethod
    def of_end(
        cls, whole: np.ndarray, shift: np.ndarray, steps: Sequence[tuple[str, Any]], device: int
    ) -> Weights:
        """Return those of a last layer of real weights.

        Parameters
        ----------
        whole : ndarray of int64, shape (inputs, units)
            From ``-2 ** 23`` to ``2 ** 23 - 1``; the weights are ``whole * 2.0 ** -shift``.
        shift : ndarray of int, shape (units,)
            From -126 to 126.
        steps : sequence of (kind, array)
            See `cupybnn.backends.cuda.steps.pack_steps`.
        device : int
        """
        import cupy

        inputs, units = whole.shape
        above = whole + (1 << (PLANES - 1))
        # A lane of four takes six planes: column 8 f + 2 q + b is plane 6 q + 2 f + b.
        column = np.arange(PLANES)
        plane = 6 * (column % 8 // 2) + 2 * (column // 8) + column % 2
        count = -(-units * PLANES // 16) * 16
        bits = np.zeros((count, -(-inputs // 64) * 64), np.uint8)
        bits[: units * PLANES, :inputs] = (
            (above.T[:, None, :] >> plane[:, None]) & 1
        ).reshape(-1, inputs)  # fmt: skip
        lines = np.packbits(bits, axis=1, bitorder="little").view("<u8")
        number = np.arange(count)  # position_of in layout.cuh, whose order `place` takes back
        position = (number & ~15) | ((number & 2) << 2) | ((number & 12) >> 1) | (number & 1)
        words = place(np, lines[position], 1, count, inputs, words_shape(1, count, inputs))
        constant = cupy.asarray((inputs << (PLANES - 1)) - above.sum(axis=0))
        step = cupy.asarray(np.ldexp(1.0, -shift).astype(np.float32))
        fields = {
            "b": cupy.asarray(words), "constant": constant, "step": step, "k": inputs,
            "b_chunks": words.shape[1],
        }  # fmt: skip
        return cls(Shape(units, -(-inputs // 8), end=True), device, fields, steps)

    def deal(self, rows: int) -> Deal | None:
        """Return how so many rows are dealt out; None if the weights do not fit."""
        return choose(
            self.shape, rows, multiprocessors(self.device), shared_memory_limit(self.device)
        )

    def launch(
        self, rows: int, a: Any, out: Any, *changing: Section,
        ones: Sequence[Any] = (None, None, None), deal: Deal | None = None,
    ) -> Launch:  # fmt: skip
        """Return the launch for so many rows, which begins while the work in front of it ends.

        It reads the weights before that work has ended: they must be complete by then.

        Parameters
        ----------
        rows : int
            Which `deal` takes.
        a : cupy.ndarray or None
            Words of the inputs; None for pixels, which `MAP` sets. The caller keeps it.
        out : cupy.ndarray or None
            Words of the results, zeros where units end; None for numbers, which `OUT` sets.
        *changing : Section
            `MAP` or `OUT`.
        ones : sequence of cupy.ndarray of int32, shape (rows,), or None
            The ones of each input; those of each result, zeros before the launch; and what becomes
            zeros.
        deal : Deal, optional
            Another way to deal them out than the fastest.
        """
        shape, deal = self.shape, deal or self.deal(rows)
        assert deal is not None
        defines = shape.defines(deal.units, deal.stages)
        shared = shape.shared_bytes(deal.units, deal.stages)
        kernel = load_kernel(
            RESIDENT_KERNEL.source, RESIDENT_KERNEL.function, defines, self.device, shared
        )
        values: dict[str, Any] = dict.fromkeys((f.name for f in RESIDENT.fields), 0)
        values |= {"map": bytes(TENSOR_MAP.size), "after": pack_steps(self.steps), **self.fields}
        values |= {"rows": rows, "units": shape.units, "strips": deal.strips, "a": a, "out": out}
        values |= dict(zip(("a_ones", "ones", "cleared"), ones, strict=True))
        argument = RESIDENT.pack(**values)
        argument += bytes(-len(argument) % 64)  # the struct is aligned to 64 bytes
        return Launch(
            kernel, deal.strips * deal.workers, _THREADS, shared, argument, *changing, overlap=True
        )


def runs_on(device: int) -> bool:
    """Whether the kernel runs on a device."""
    return architecture(device) in sm90.CAPABILITIES


@cache
def _encode() -> Any:
    library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    return library.cuTensorMapEncodeTiled


# CUtensorMapDataType, CUtensorMapSwizzle, CUtensorMapL2promotion
_UINT8, _SWIZZLE_128, _PROMOTE_128 = 0, 3, 2


@lru_cache(maxsize=256)
def pixel_map(address: int, rows: int, cols: int, pitch: int) -> tuple[int, ...]:
    """Return the words of the tensor map of pixels, a byte each.

    Parameters
    ----------
    address : int
        A multiple of 16.
    rows, cols : int
    pitch : int
        Bytes from a row to the next; a multiple of 16.

    Raises
    ------
    RuntimeError
        If the driver reports an error.
    """
    memory = ctypes.create_string_buffer(TENSOR_MAP.size + 64)
    at = -(-ctypes.addressof(memory) // 64) * 64
    error = _encode()(
        ctypes.c_void_p(at), _UINT8, 2, ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(cols, rows), (ctypes.c_uint64 * 1)(pitch),
        (ctypes.c_uint32 * 2)(_CHUNK, _ROWS), (ctypes.c_uint32 * 2)(1, 1),
        0, _SWIZZLE_128, _PROMOTE_128, 0,
    )  # fmt: skip
    if error:
        raise RuntimeError(f"The driver cannot describe {rows} x {cols} pixels: error {error}.")
    return struct.unpack("<16Q", ctypes.string_at(at, TENSOR_MAP.size))

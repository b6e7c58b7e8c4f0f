"""Everything in a product's launches that is the same for operands of one kind.

Apart from addresses, a launch depends only on shapes, strides and dtypes. It is prepared once, at
the first call of its kind, because host time dominates a small product.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from cupybnn.backends.cuda import dispatch, launching, tuning
from cupybnn.backends.cuda.compiler import load_kernel
from cupybnn.backends.cuda.launching import Launch
from cupybnn.backends.cuda.packing import PackLaunch, chunk_count, geometry, words_shape
from cupybnn.backends.cuda.structs import Struct
from cupybnn.backends.levels import SIGNS, Levels

__all__ = ["NO_COLUMNS", "OUTPUTS", "PACKED", "PRODUCT", "ProductLaunch"]

# OUTPUT_* of product.cuh, by the dtype's character, which is faster to look up than its name.
OUTPUTS = {np.dtype(np.int32).char: 0, "f": 1, "e": 2, "E": 3, "h": 5}
PACKED = 4

PRODUCT = Struct(
    "Product",
    "ptr a, b, pop_a, pop_b, out, out_pop, row_scale, col_scale, bias, threshold, flip, sums;"
    "i64 m, n, k, chunks, batch, a_step, b_step, out_row, out_col, out_batch;"
    "i64 row_scale_batch, col_scale_batch, bias_batch, swapped, group, parts",
)
_ADDRESSES = PRODUCT.section("a", "sums")
_SCALES = PRODUCT.section("row_scale_batch", "bias_batch")
NO_COLUMNS: tuple[int, ...] = (0,) * 5


class ProductLaunch:
    """Everything in a product's launches that depends on shapes, strides and dtypes.

    Attributes
    ----------
    swap : bool
        Whether rows and columns of the result are exchanged.
    workspace_bytes : int
        Size of the memory that `launch` works in; 0 if it needs none.
    """

    __slots__ = (
        "_argument",
        "_arrays",
        "_bytes",
        "_device",
        "_go",
        "_kernel",
        "_pack",
        "_sums",
        "_zeros",
        "swap",
        "workspace_bytes",
    )

    def __init__(
        self, a: Any, b: Any, *, batch_shape: tuple[int, ...], strides: tuple[int, int, int],
        output: int, scaled: bool, device: int,
    ) -> None:  # fmt: skip
        (m, k), n, batch = a.shape[-2:], b.shape[-1], math.prod(batch_shape)
        packed = output == PACKED
        levels = [getattr(x, "levels", SIGNS) for x in (a, b)]
        of_b = levels[1] is not SIGNS
        problem = dispatch.problem_on(
            device, m, n, k, batch=batch, packed=packed, scaled=scaled, planes=levels[of_b].bits
        )
        config = dispatch.choose(problem, tuning.winners(device))
        if packed and config.swap:
            raise ValueError(f"The configuration {config} cannot write packed results.")
        if problem.planes > 1 and (config.split_k > 1 or config.deferred):
            raise ValueError(f"The configuration {config} cannot multiply several bit planes.")
        self.swap = config.swap
        self._device = device
        shared = config.shared_bytes(scaled)
        defines = (*config.defines, ("OUTPUT", output), ("SCALED", int(scaled)))
        if levels[of_b] is not SIGNS:
            defines = (*defines, *_planes(levels[of_b], of_b != config.swap))
        source = f"{config.kernel}_xnor_gemm"
        kernel = load_kernel(source, "xnor_gemm", defines, device, shared)
        a_step, b_step = (1 if x.shape[:-2] == batch_shape else 0 for x in (a, b))
        row, col, item = strides
        if config.swap:
            m, n, a_step, b_step, row, col = n, m, b_step, a_step, col, row
        tiles, parts = config.tiles(m, n, batch), config.parts_of(chunk_count(k))
        blocks = config.blocks(tiles, parts, problem.multiprocessors)
        if blocks >= 2**31 or max(m, n) >= 2**31:
            raise ValueError(
                f"A product of {batch} times ({m}, {k}) by ({k}, {n}) has more tiles than a launch "
                f"can have blocks. Multiply in parts."
            )
        self._sums = config.sums_bytes(tiles, parts)
        fields = dict.fromkeys((field.name for field in PRODUCT.fields), 0)
        fields |= {
            "m": m, "n": n, "k": k, "chunks": chunk_count(k), "batch": batch, "a_step": a_step,
            "b_step": b_step, "out_row": row, "out_col": col, "out_batch": item,
            "swapped": config.swap, "group": config.group, "parts": parts,
        }  # fmt: skip
        self._kernel = kernel, blocks, config.threads, shared
        self._argument = PRODUCT.pack(**fields)
        changing = (_ADDRESSES, _SCALES) if scaled else (_ADDRESSES,)
        self._go = Launch(*self._kernel, self._argument, *changing, overlap=config.overlap).go
        self._prepare_packing(a, b, device)

    def _prepare_packing(self, a: Any, b: Any, device: int) -> None:
        # Words, then popcounts of each unpacked operand, at offsets in one allocation; and how many
        # bytes of popcounts must be zeros instead.
        self._arrays: list[tuple[int, int, int, int]] = []
        self._bytes = 0
        self._zeros = _whole(self._sums)
        operands = [(x, axis) for x, axis in ((a, -1), (b, -2)) if not hasattr(x, "words")]
        self._pack = PackLaunch(operands, device) if operands else None
        adds_up = iter(self._pack.adds_up if self._pack is not None else ())
        for i, (x, axis) in enumerate(((a, -1), (b, -2))):
            if hasattr(x, "words"):
                continue
            batch, lines, k = geometry(x.shape, axis)
            words = 4 * math.prod(words_shape(batch, lines, k))
            cleared = 4 * batch * lines if next(adds_up) else 0
            self._zeros += _whole(cleared)
            self._arrays.append((i, self._bytes, self._bytes + words, cleared))
            self._bytes += _whole(words + 4 * batch * lines)
        self.workspace_bytes = self._bytes + self._zeros

    def __call__(
        self, a: Any, b: Any, *, out: tuple[int, int], columns: tuple[int, ...] = NO_COLUMNS,
        strides: tuple[int, ...] = (), stream: int | None = None,
    ) -> None:  # fmt: skip
        """Launch for operands of this kind.

        Parameters
        ----------
        a, b : cupy.ndarray or packed matrix
        out : (int, int)
            Addresses of the result, and of its popcounts if packed.
        columns : tuple of int
            Addresses of row scale, column scale, bias, threshold and flip, or 0.
        strides : tuple of int, optional
            Batch strides of row scale, column scale and bias, for a scaled product.
        stream : int, optional
            Handle of the current stream, if known.
        """
        if stream is None:
            stream = launching.current_stream()
        if self._pack is None:
            left, right = _addresses(a), _addresses(b)
        else:
            sides: list[Any] = [a, b]
            # Freed on return, for reuse by later work on the stream.
            memory = [launching.alloc(self._bytes)]
            base = memory[0].ptr
            arrays: list[int] = []
            for i, words, counts, cleared in self._arrays:
                side = base + words, base + counts
                if cleared:
                    memory.append(launching.zeros(cleared, self._device, stream))
                    side = base + words, memory[-1].ptr
                arrays += [sides[i].data.ptr, *side]
                sides[i] = side
            self._pack(stream, *arrays)
            left, right = (x if type(x) is tuple else _addresses(x) for x in sides)
        sums = launching.zeros(self._sums, self._device, stream).ptr if self._sums else 0
        self._go(stream, *self._operands(left, right), *out, *columns, sums, *strides)

    def _operands(self, left: tuple[int, int], right: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return the addresses of packed operands as the kernel takes them."""
        if self.swap:
            left, right = right, left
        return left[0], right[0], left[1], right[1]

    def launch(self, sides: list[Any], workspace: int, out: tuple[int, int], stream: int) -> None:
        """Launch for addresses alone, whoever owns the memory.

        Parameters
        ----------
        sides : list
            For each operand its address, or those of its words and popcounts if it is packed.
        workspace : int
            Address of `workspace_bytes` bytes, aligned to 256.
        out : (int, int)
            As for a call.
        stream : int
            Handle of the current stream.
        """
        sides, zeros = list(sides), workspace + self._bytes
        if self._zeros:
            sys.modules["cupy"].cuda.runtime.memsetAsync(zeros, 0, self._zeros, stream)
        if self._pack is not None:
            arrays: list[int] = []
            for i, words, counts, cleared in self._arrays:
                side = workspace + words, zeros if cleared else workspace + counts
                zeros += _whole(cleared)
                arrays += [sides[i], *side]
                sides[i] = side
            self._pack(stream, *arrays)
        sums = zeros if self._sums else 0
        self._go(stream, *self._operands(*sides), *out, *NO_COLUMNS, sums)

    def prepared(
        self, a: Any, b: Any, out: tuple[int, int], columns: tuple[int, ...] = NO_COLUMNS
    ) -> Callable[[int], None]:
        """Return the launch of two packed operands; the caller keeps the arrays."""
        memory = launching.alloc(self._sums) if self._sums else None
        sums = 0 if memory is None else memory.ptr
        operands = self._operands(_addresses(a), _addresses(b))
        argument = bytearray(self._argument)
        _ADDRESSES.fields.pack_into(argument, _ADDRESSES.offset, *operands, *out, *columns, sums)
        launch = Launch(*self._kernel, bytes(argument)).go
        return launch if memory is None else _Clearing(launch, memory, self._sums)


class _Clearing:
    """A launch, and the memory for its sums, which is cleared before."""

    def __init__(self, launch: Callable[[int], None], memory: Any, size: int) -> None:
        self._launch, self._memory, self._size = launch, memory, size

    def __call__(self, stream: int) -> None:
        """Launch on a stream, given by its address."""
        sys.modules["cupy"].cuda.runtime.memsetAsync(self._memory.ptr, 0, self._size, stream)
        self._launch(stream)


def _planes(levels: Levels, of_b: bool) -> tuple[tuple[str, int], ...]:
    """Return what a kernel is to define for an operand of levels; see product.cuh."""
    return (
        ("PLANES", levels.bits), ("PLANES_OF_B", int(of_b)), ("UNSIGNED", int(not levels.signed))
    )  # fmt: skip


def _whole(size: int) -> int:
    """Round bytes up to what aligns memory behind them, as a pool does."""
    return (size + 255) & ~255


def _addresses(packed: Any) -> tuple[int, int]:
    return packed.words.data.ptr, packed.popcounts.data.ptr

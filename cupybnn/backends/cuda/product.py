"""Launch of a product: packs operands that are not packed, then runs one kernel for any result.

Apart from addresses, a launch depends only on shapes, strides and dtypes. It is prepared once, at
the first call of its kind, because host time dominates a small product.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cupybnn.backends.cuda import dispatch, tuning
from cupybnn.backends.cuda.compiler import load_kernel
from cupybnn.backends.cuda.fast_launch import FastLaunch
from cupybnn.backends.cuda.packing import PackLaunch, chunk_count, geometry, words_shape
from cupybnn.backends.cuda.structs import Struct
from cupybnn.backends.devices import is_cupy
from cupybnn.backends.epilogue import Epilogue

__all__ = [
    "OUTPUTS",
    "PRODUCT",
    "ProductLaunch",
    "forget_launches",
    "gemm",
    "gemm_packed",
    "prepare",
    "prepare_packed",
]

# OUTPUT_* of product.cuh, by the dtype's character, which is faster to look up than its name.
OUTPUTS = {np.dtype(np.int32).char: 0, "f": 1, "e": 2, "E": 3, "h": 5}
_PACKED = 4

PRODUCT = Struct(
    "Product",
    "ptr a, b, pop_a, pop_b, out, out_pop, row_scale, col_scale, bias, threshold, flip;"
    "i64 m, n, k, chunks, batch, a_step, b_step, out_row, out_col, out_batch;"
    "i64 row_scale_batch, col_scale_batch, bias_batch, swapped, group",
)
_ADDRESSES = PRODUCT.section("a", "flip")
_SIZES = PRODUCT.section("m", "out_batch")
_SCALES = PRODUCT.section("row_scale_batch", "bias_batch")
_CHOICES = PRODUCT.section("swapped", "group")
_NO_COLUMNS = (0,) * 5
_NO_STRIDES = (0,) * 3


class ProductLaunch:
    """Everything in a product's launches that depends on shapes, strides and dtypes.

    Attributes
    ----------
    swap : bool
        Whether rows and columns of the result are exchanged.
    workspace_bytes : int
        Size of the memory that a launch packs into; 0 if both operands are packed.
    """

    __slots__ = (
        "_arrays",
        "_block",
        "_choices",
        "_grid",
        "_kernel",
        "_pack",
        "_shared",
        "_sizes",
        "swap",
        "workspace_bytes",
    )

    def __init__(
        self, a: Any, b: Any, *, batch_shape: tuple[int, ...], strides: tuple[int, int, int],
        output: int, scaled: bool, device: int,
    ) -> None:  # fmt: skip
        (m, k), n, batch = a.shape[-2:], b.shape[-1], math.prod(batch_shape)
        packed = output == _PACKED
        problem = dispatch.problem_on(device, m, n, k, batch=batch, packed=packed, scaled=scaled)
        config = dispatch.choose(problem, tuning.winners(device))
        if packed and config.swap:
            raise ValueError(f"The configuration {config} cannot write packed results.")
        self.swap = config.swap
        self._shared = config.shared_bytes(scaled)
        defines = (*config.defines, ("OUTPUT", output), ("SCALED", int(scaled)))
        source = f"{config.kernel}_xnor_gemm"
        self._kernel = load_kernel(source, "xnor_gemm", defines, device, self._shared)
        steps = tuple(1 if x.shape[:-2] == batch_shape else 0 for x in (a, b))
        row, col, item = strides
        if config.swap:
            m, n, steps, row, col = n, m, steps[::-1], col, row
        blocks = config.blocks(m, n, batch, problem.multiprocessors)
        if blocks >= 2**31 or max(m, n) >= 2**31:
            raise ValueError(
                f"A product of {batch} times ({m}, {k}) by ({k}, {n}) has more tiles than a launch "
                f"can have blocks. Multiply in parts."
            )
        self._grid, self._block = (blocks,), (config.threads,)
        self._sizes = _SIZES.pack(m, n, k, chunk_count(k), batch, *steps, row, col, item)
        self._choices = _CHOICES.pack(config.swap, config.group)
        self._prepare_packing(a, b, device)

    def _prepare_packing(self, a: Any, b: Any, device: int) -> None:
        # Words, then popcounts of each unpacked operand, at offsets in one allocation.
        self._arrays: list[tuple[int, int, int]] = []
        self.workspace_bytes = 0
        operands = []
        for i, (x, axis) in enumerate(((a, -1), (b, -2))):
            if hasattr(x, "words"):
                continue
            operands.append((x, axis))
            batch, lines, k = geometry(x.shape, axis)
            words = 4 * math.prod(words_shape(batch, lines, k))
            start = self.workspace_bytes
            self._arrays.append((i, start, start + words))
            # Align the next operand to 256 bytes, like memory from a pool.
            self.workspace_bytes += (words + 4 * batch * lines + 255) & ~255
        self._pack = PackLaunch(operands, device) if operands else None

    def __call__(
        self, a: Any, b: Any, *, out: tuple[int, int], columns: tuple[int, ...] = _NO_COLUMNS,
        strides: tuple[int, ...] = _NO_STRIDES,
    ) -> None:  # fmt: skip
        """Launch for operands of this kind.

        Parameters
        ----------
        a, b : cupy.ndarray or packed matrix
        out : (int, int)
            Addresses of the result, and of its popcounts if packed.
        columns : tuple of int
            Addresses of row scale, column scale, bias, threshold and flip, or 0.
        strides : tuple of int
            Batch strides of row scale, column scale and bias.
        """
        # Freed on return, for reuse by later work on the stream.
        workspace = None if self._pack is None else _alloc(self.workspace_bytes)
        sides = [
            (x.words.data.ptr, x.popcounts.data.ptr) if hasattr(x, "words") else x.data.ptr
            for x in (a, b)
        ]
        self.launch(sides, 0 if workspace is None else workspace.ptr, out, columns, strides)

    def launch(
        self,
        sides: list[Any],
        workspace: int,
        out: tuple[int, int],
        columns: tuple[int, ...] = _NO_COLUMNS,
        strides: tuple[int, ...] = _NO_STRIDES,
    ) -> None:
        """Launch for addresses alone, whoever owns the memory.

        Parameters
        ----------
        sides : list
            For each operand its address, or those of its words and popcounts if it is packed.
        workspace : int
            Address of `workspace_bytes` bytes, aligned to 256.
        out, columns, strides
            As for a call.
        """
        if self._pack is not None:
            addresses = []
            for i, words, popcounts in self._arrays:
                addresses.append((sides[i], workspace + words, workspace + popcounts))
                sides[i] = (workspace + words, workspace + popcounts)
            self._pack(addresses)
        argument = PRODUCT.argument(self._argument(sides, out, columns, strides))
        self._kernel(self._grid, self._block, (argument,), shared_mem=self._shared)

    def _argument(
        self, sides: list[Any], out: tuple[int, int], columns: tuple[int, ...],
        strides: tuple[int, ...],
    ) -> bytes:  # fmt: skip
        left, right = sides[::-1] if self.swap else sides
        pointers = _ADDRESSES.pack(left[0], right[0], left[1], right[1], *out, *columns)
        return b"".join((pointers, self._sizes, _SCALES.pack(*strides), self._choices))

    def prepared(
        self, a: Any, b: Any, out: tuple[int, int], columns: tuple[int, ...] = _NO_COLUMNS
    ) -> FastLaunch:
        """Return the launch of two packed operands; the caller keeps the arrays."""
        sides: list[Any] = [(x.words.data.ptr, x.popcounts.data.ptr) for x in (a, b)]
        argument = self._argument(sides, out, columns, _NO_STRIDES)
        return FastLaunch(self._kernel, *self._grid, *self._block, self._shared, argument)


def _alloc(size: int) -> Any:
    import cupy

    return cupy.cuda.alloc(size)


_launches: dict[tuple[Any, ...], ProductLaunch] = {}
_MOST_LAUNCHES = 10_000  # bounds memory in a program whose shapes never repeat


def forget_launches() -> None:
    """Clear the cached launches, because the tuned table has changed."""
    _launches.clear()


def _kind(x: Any) -> Any:
    """Return the properties of an operand that a launch depends on."""
    if is_cupy(x):
        return x.shape, x.strides, x.dtype, x.data.ptr & 15
    return x.shape


def _launch_for(
    a: Any, b: Any, batch_shape: tuple[int, ...], strides: tuple[int, int, int],
    output: int, scaled: bool, device: int,
) -> ProductLaunch:  # fmt: skip
    key = (_kind(a), _kind(b), batch_shape, strides, output, scaled, device, dispatch.forced())
    launch = _launches.get(key)
    if launch is None:
        if len(_launches) >= _MOST_LAUNCHES:
            _launches.clear()
        launch = _launches[key] = ProductLaunch(
            a, b, batch_shape=batch_shape, strides=strides, output=output, scaled=scaled,
            device=device,
        )  # fmt: skip
    return launch


def gemm(a: Any, b: Any, out: Any, epilogue: Epilogue | None) -> None:
    """Fill `out` with the product of the signs of `a` and `b`.

    Parameters
    ----------
    a, b : cupy.ndarray or PackedMatrix
        (*batch_a, M, K) and (*batch_b, K, N), on the current device; a PackedMatrix is packed along
        K. The batch shapes broadcast to that of `out`.
    out : cupy.ndarray, shape (*batch, M, N)
        With any strides and any valid result dtype.
    epilogue : Epilogue or None
        Scale and bias, or None for the integers.
    """
    if out.size == 0:
        return
    shape = out.shape
    output = OUTPUTS.get(out.dtype.char)
    if output is None or (len(shape) > 3 and not out.flags.c_contiguous):
        _gemm_through_copy(a, b, out, epilogue)
        return
    strides, itemsize = out.strides, out.itemsize
    batch_shape = shape[:-2]
    batch_stride = strides[-3] // itemsize if batch_shape else 0
    if batch_shape:
        a, b = _batched(a, -1, batch_shape), _batched(b, -2, batch_shape)
        batch_shape = (math.prod(batch_shape),)
    steps = (strides[-2] // itemsize, strides[-1] // itemsize, batch_stride)
    launch = _launch_for(a, b, batch_shape, steps, output, epilogue is not None, out.data.device_id)
    if epilogue is None:
        launch(a, b, out=(out.data.ptr, 0))
    else:
        # Keep references until the launch.
        rows = _scale(epilogue.row_scale, shape[:-2], shape[-2])
        cols = _scale(epilogue.col_scale, shape[:-2], shape[-1])
        bias = _scale(epilogue.bias, shape[:-2], shape[-1])
        if launch.swap:
            rows, cols = cols, rows
        columns = (rows[1], cols[1], bias[1], 0, 0)
        strides = (rows[2], cols[2], bias[2])
        launch(a, b, out=(out.data.ptr, 0), columns=columns, strides=strides)


class _Batch:
    """A packed operand with its batch axes merged."""

    __slots__ = ("popcounts", "shape", "words")

    def __init__(self, words: Any, popcounts: Any, shape: tuple[int, ...]) -> None:
        self.words, self.popcounts, self.shape = words, popcounts, shape


def _batched(x: Any, axis: int, batch_shape: tuple[int, ...]) -> Any:
    """Return an operand with one batch axis, or none if one matrix serves the whole batch.

    An operand that is broadcast along only some of several batch axes is copied out.
    """
    own = x.shape[:-2]
    matrix = x.shape[-2:]
    count = math.prod(batch_shape)
    if math.prod(own) == 1 and count > 1:
        if is_cupy(x):
            return x.reshape(matrix)
        return _Batch(x.words, x.popcounts, matrix)
    if is_cupy(x):
        if own != batch_shape:
            import cupy

            x = cupy.broadcast_to(x, (*batch_shape, *matrix))
        return x if x.ndim == 3 else x.reshape(count, *matrix)
    words, popcounts = x.words, x.popcounts
    if own != batch_shape:
        import cupy

        lines = matrix[0] if axis == -1 else matrix[1]
        words = words.reshape(*own, -1)
        words = cupy.ascontiguousarray(cupy.broadcast_to(words, (*batch_shape, words.shape[-1])))
        popcounts = cupy.ascontiguousarray(
            cupy.broadcast_to(popcounts.reshape(*own, lines), (*batch_shape, lines))
        )
    return _Batch(words, popcounts, (count, *matrix))


def _scale(x: Any, batch_shape: tuple[int, ...], length: int) -> tuple[Any, int, int]:
    """Return a scale or bias as `length` float32 per product, with its address and batch stride."""
    if x is None:
        return None, 0, 0
    import cupy

    varies = math.prod(x.shape[:-2]) > 1
    if varies:  # (*batch, M, 1) or (*batch, 1, N)
        x = cupy.broadcast_to(x.reshape(*x.shape[:-2], -1), (*batch_shape, length))
    else:
        x = cupy.broadcast_to(x.reshape(-1), (length,))
    x = cupy.ascontiguousarray(x, dtype=np.float32)
    return x, x.data.ptr, length if varies else 0


def _gemm_through_copy(a: Any, b: Any, out: Any, epilogue: Epilogue | None) -> None:
    """Multiply into an array that the kernels can write, then convert."""
    import cupy

    native = out.dtype.char in OUTPUTS
    result = cupy.empty(out.shape, out.dtype if native else np.int32)
    gemm(a, b, result, epilogue if native else None)
    if epilogue is not None and not native:
        # Wider than float32: the same steps in that precision.
        result = result.astype(np.result_type(out.dtype, np.float32))
        for scale in (epilogue.row_scale, epilogue.col_scale):
            if scale is not None:
                result *= scale
        if epilogue.bias is not None:
            result += epilogue.bias
    out[...] = result


def gemm_packed(a: Any, b: Any, threshold: Any, flip: Any) -> tuple[Any, Any]:
    """Multiply, compare with a threshold per column, and return the packed signs.

    Parameters
    ----------
    a, b : cupy.ndarray or PackedMatrix
        As for `gemm`.
    threshold : cupy.ndarray of int32, shape (N,), contiguous, or None
        A result's bit is 1 where it is at least this (None: 0), unless flipped.
    flip : cupy.ndarray of bool, shape (N,), contiguous, or None

    Returns
    -------
    words, popcounts : cupy.ndarray
        Of the (*batch, M, N) result, packed along its last axis.

    Raises
    ------
    ValueError
        If K is 2**30 or more.
    """
    import cupy

    (m, k), n = a.shape[-2:], b.shape[-1]
    batch_shape = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    if k >= 2**30:
        raise ValueError(
            f"A product with a packed result must have K below 2**30, because its distance from "
            f"the threshold must fit an int32; got K = {k}. Use xnor_gemm and pack its signs."
        )
    # Words outside all tiles, and padding lines, must be zeros.
    covered = n % 1024 == 0 and m % 16 == 0 and n
    words = (cupy.empty if covered else cupy.zeros)(
        words_shape(math.prod(batch_shape), m, n), np.uint32
    )
    popcounts = cupy.zeros((*batch_shape, m), np.int32)
    if popcounts.size == 0 or n == 0:
        return words, popcounts
    if batch_shape:
        a, b = _batched(a, -1, batch_shape), _batched(b, -2, batch_shape)
        batch_shape = (math.prod(batch_shape),)
    launch = _launch_for(a, b, batch_shape, (0, 0, 0), _PACKED, False, words.data.device_id)
    columns = [0 if x is None else x.data.ptr for x in (threshold, flip)]
    launch(a, b, out=(words.data.ptr, popcounts.data.ptr), columns=(0, 0, 0, *columns))
    return words, popcounts


def prepare_packed(
    a: Any, b: Any, threshold: Any, flip: Any, words: Any, popcounts: Any
) -> FastLaunch:
    """Return the launch of a `gemm_packed` of two packed matrices, for results in given memory.

    Parameters
    ----------
    a, b : PackedMatrix
        (M, K) and (K, N), none of them 0.
    threshold, flip : cupy.ndarray
    words, popcounts : cupy.ndarray
        What it returns; zeros before the launch. The caller keeps all arrays.
    """
    launch = _launch_for(a, b, (), (0, 0, 0), _PACKED, False, words.data.device_id)
    columns = (0, 0, 0, threshold.data.ptr, flip.data.ptr)
    return launch.prepared(a, b, (words.data.ptr, popcounts.data.ptr), columns)


def prepare(a: Any, b: Any, out: Any) -> FastLaunch:
    """Return the launch of a `gemm` of two packed matrices without an epilogue.

    Parameters
    ----------
    a, b : PackedMatrix
        (M, K) and (K, N), none of them 0.
    out : cupy.ndarray, shape (M, N), C-contiguous
        The caller keeps all arrays.
    """
    steps = out.strides[0] // out.itemsize, 1, 0
    launch = _launch_for(a, b, (), steps, OUTPUTS[out.dtype.char], False, out.data.device_id)
    return launch.prepared(a, b, (out.data.ptr, 0))

"""Launch of a product: packs operands that are not packed, then runs one kernel for any result.

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
from cupybnn.backends.devices import is_cupy
from cupybnn.backends.epilogue import Epilogue
from cupybnn.backends.levels import SIGNS, Levels

__all__ = [
    "OUTPUTS",
    "PRODUCT",
    "ProductLaunch",
    "forget_launches",
    "gemm",
    "gemm_packed",
    "matmul",
    "prepare",
    "prepare_packed",
    "prepare_scaled",
]

# OUTPUT_* of product.cuh, by the dtype's character, which is faster to look up than its name.
OUTPUTS = {np.dtype(np.int32).char: 0, "f": 1, "e": 2, "E": 3, "h": 5}
_PACKED = 4

PRODUCT = Struct(
    "Product",
    "ptr a, b, pop_a, pop_b, out, out_pop, row_scale, col_scale, bias, threshold, flip, sums;"
    "i64 m, n, k, chunks, batch, a_step, b_step, out_row, out_col, out_batch;"
    "i64 row_scale_batch, col_scale_batch, bias_batch, swapped, group, parts",
)
_ADDRESSES = PRODUCT.section("a", "sums")
_SCALES = PRODUCT.section("row_scale_batch", "bias_batch")
_NO_COLUMNS: tuple[int, ...] = (0,) * 5


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
        packed = output == _PACKED
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
        self, a: Any, b: Any, *, out: tuple[int, int], columns: tuple[int, ...] = _NO_COLUMNS,
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
        self._go(stream, *self._operands(*sides), *out, *_NO_COLUMNS, sums)

    def prepared(
        self, a: Any, b: Any, out: tuple[int, int], columns: tuple[int, ...] = _NO_COLUMNS
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


_launches = launching.Plans()
_tables = 0  # counts tuned tables: launches of an earlier one are not used


def forget_launches() -> None:
    """Prepare all launches anew, because the tuned table has changed."""
    global _tables
    _tables += 1


def _kind(x: Any) -> Any:
    """Return the properties of an operand that a launch depends on."""
    if isinstance(x, sys.modules["cupy"].ndarray):
        return x.shape, x.strides, x.dtype, x.data.ptr & 15
    return x.shape if x.levels is SIGNS else (x.shape, x.levels)


def _launch_for(
    a: Any, b: Any, batch_shape: tuple[int, ...], strides: tuple[int, int, int],
    output: int, scaled: bool, device: int,
) -> ProductLaunch:  # fmt: skip
    key = (
        _kind(a), _kind(b), batch_shape, strides, output, scaled, device, dispatch.forced(), _tables
    )  # fmt: skip
    launch = _launches.get(key)
    if launch is None:
        launch = ProductLaunch(
            a, b, batch_shape=batch_shape, strides=strides, output=output, scaled=scaled,
            device=device,
        )  # fmt: skip
        _launches.keep(key, launch)
    found: ProductLaunch = launch
    return found


def matmul(a: Any, b: Any, dtype: np.dtype, device: int) -> Any:
    """Return the product of the signs of two matrices in a new array.

    The same as `gemm` into a new array, with less of the host's time.

    Parameters
    ----------
    a, b : cupy.ndarray or PackedMatrix
        (M, K) and (K, N), on the current device; a PackedMatrix is packed along K.
    dtype : dtype
        Any valid result dtype.
    device : int
        The current device.

    Returns
    -------
    cupy.ndarray, shape (M, N)
    """
    key = (_kind(a), _kind(b), dtype, device, dispatch.forced(), _tables)
    found = _launches.get(key)
    if found is None:
        n = b.shape[1]
        shape = (a.shape[0], n)
        output = OUTPUTS.get(dtype.char)
        if output is None or 0 in shape:
            out = launching.empty(shape, dtype)
            gemm(a, b, out, None)
            return out
        launch = _launch_for(a, b, (), (n, 1, 0), output, False, device)
        found = _launches.keep(key, (launch, shape))
    launch, shape = found
    out = launching.empty(shape, dtype)
    launch(a, b, out=(out.data.ptr, 0))
    return out


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

    __slots__ = ("levels", "popcounts", "shape", "words")

    def __init__(self, words: Any, popcounts: Any, shape: tuple[int, ...], levels: Levels) -> None:
        self.words, self.popcounts, self.shape, self.levels = words, popcounts, shape, levels


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
        return _Batch(x.words, x.popcounts, matrix, x.levels)
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
    return _Batch(words, popcounts, (count, *matrix), x.levels)


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
    (m, k), n = a.shape[-2:], b.shape[-1]
    batch_shape: tuple[int, ...] = ()
    if len(a.shape) > 2 or len(b.shape) > 2:
        batch_shape = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    top = max(getattr(x, "levels", SIGNS).top for x in (a, b))
    if k * top >= 2**30:
        most = "K" if top == 1 else f"{top}·K"
        raise ValueError(
            f"A product with a packed result must have {most} below 2**30, because its distance "
            f"from the threshold must fit an int32; got K = {k}. Use xnor_gemm and pack its signs."
        )
    batch = math.prod(batch_shape)
    shape = words_shape(batch, m, n)
    if batch * m * n == 0:
        import cupy

        return cupy.zeros(shape, np.uint32), cupy.zeros((*batch_shape, m), np.int32)
    words = launching.empty(shape, np.uint32)
    device, stream = words.data.device_id, launching.current_stream()
    # The kernels add up to these.
    popcounts = launching.empty(
        (*batch_shape, m), np.int32, launching.zeros(4 * batch * m, device, stream)
    )
    if batch_shape:
        a, b = _batched(a, -1, batch_shape), _batched(b, -2, batch_shape)
        batch_shape = (batch,)
    launch = _launch_for(a, b, batch_shape, (0, 0, 0), _PACKED, False, device)
    columns = _NO_COLUMNS
    if threshold is not None or flip is not None:
        columns = (0, 0, 0, *(0 if x is None else x.data.ptr for x in (threshold, flip)))
    launch(a, b, out=(words.data.ptr, popcounts.data.ptr), columns=columns, stream=stream)
    return words, popcounts


def prepare_packed(
    a: Any, b: Any, threshold: Any, flip: Any, words: Any, popcounts: Any
) -> Callable[[int], None]:
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


def prepare(a: Any, b: Any, out: Any) -> Callable[[int], None]:
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


def prepare_scaled(
    a: Any, b: Any, out: Any, *, rows: Any = None, columns: Any = None
) -> Callable[[int], None]:
    """Return the launch of a `gemm` of two packed matrices with scales.

    Parameters
    ----------
    a, b : PackedMatrix
        (M, K) and (K, N), none of them 0.
    out : cupy.ndarray, shape (M, N), C-contiguous
        float32, or uint16 for bfloat16. The caller keeps all arrays.
    rows, columns : cupy.ndarray of float32, shapes (M,) and (N,), optional
        The scales of the product's rows and columns.
    """
    steps = out.strides[0] // out.itemsize, 1, 0
    output = OUTPUTS["E" if out.dtype.char == "H" else out.dtype.char]
    launch = _launch_for(a, b, (), steps, output, True, out.data.device_id)
    scales = [0 if x is None else x.data.ptr for x in (rows, columns)]
    if launch.swap:
        scales.reverse()
    return launch.prepared(a, b, (out.data.ptr, 0), (*scales, 0, 0, 0))

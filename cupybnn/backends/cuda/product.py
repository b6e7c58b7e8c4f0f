"""Launching a product: operands packed where they are not, one kernel, whatever its result."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from cupybnn.backends.cuda import dispatch, tuning
from cupybnn.backends.cuda.compiler import architecture, by_value, load_kernel
from cupybnn.backends.cuda.packing import (
    chunk_count,
    geometry,
    pack_into,
    words_shape,
)
from cupybnn.backends.epilogue import Epilogue

__all__ = ["gemm", "gemm_packed"]

# OUTPUT_* of product.cuh, by dtype name.
_OUTPUTS = {"int32": 0, "float32": 1, "float16": 2, "bfloat16": 3}
_PACKED = 4
_PRODUCT = np.dtype((np.void, 8 * 26))  # struct Product of product.cuh


class Plan(NamedTuple):
    """All of a launch that the shape decides."""

    kernel: Any
    grid: tuple[int]
    block: tuple[int]
    shared: int
    swap: bool
    group: int


_plans: dict[tuple[Any, ...], Plan] = {}


def forget_plans() -> None:
    """Look everything up anew: the tuned table has changed."""
    _plans.clear()


def plan_for(device: int, m: int, n: int, k: int, batch: int, output: int, scaled: bool) -> Plan:
    """Return the kernel and its launch for a shape on a device; looked up once a shape."""
    key = (device, m, n, k, batch, output, scaled, dispatch.forced())
    plan = _plans.get(key)
    if plan is None:
        import cupy

        packed = output == _PACKED
        config = dispatch.choose(
            architecture(device), m, n, k, batch, packed, scaled, tuning.winners(device)
        )
        if packed and config.swap:
            raise ValueError(f"The configuration {config} cannot write packed results.")
        kernel = load_kernel(
            f"{config.kernel}_xnor_gemm",
            "xnor_gemm",
            (*config.defines, ("OUTPUT", output), ("SCALED", int(scaled))),
            device,
            config.shared_bytes(scaled),
        )
        rows, columns = (n, m) if config.swap else (m, n)
        multiprocessors = cupy.cuda.Device(device).attributes["MultiProcessorCount"]
        blocks = config.blocks(rows, columns, batch, multiprocessors)
        if blocks >= 2**31:
            raise ValueError(
                f"A product of {batch} times ({m}, {k}) by ({k}, {n}) has more tiles than a launch "
                f"can have blocks; multiply it in parts."
            )
        threads, shared = (config.threads,), config.shared_bytes(scaled)
        plan = Plan(kernel, (blocks,), threads, shared, config.swap, config.group)
        _plans[key] = plan
    return plan


class _Side(NamedTuple):
    """An operand in packed form: addresses, and 1, or 0 if one matrix serves a whole batch."""

    words: int
    popcounts: int
    step: int


def _sides(a: Any, b: Any, batch_shape: tuple[int, ...], device: int) -> tuple[_Side, _Side, Any]:
    """Return both operands packed; those that are arrays in one launch, into one allocation.

    The third is what must stay referenced until the product is launched.
    """
    sides: list[_Side | None] = []
    pending: list[tuple[Any, int, int, int, int]] = []
    keep: list[Any] = []
    total = 0
    for x, axis in ((a, -1), (b, -2)):
        own = x.shape[:-2]
        step = 1 if own == batch_shape else 0
        if not step and math.prod(own) > 1:
            # A batch that is repeated along some axes only: spelled out.
            x = _repeated(x, axis, batch_shape)
            step = 1
        if hasattr(x, "popcounts"):
            sides.append(_Side(x.words.data.ptr, x.popcounts.data.ptr, step))
            keep.append(x)
            continue
        batch, lines, k = geometry(x.shape, axis)
        if x.ndim > 3:
            x = x.reshape(batch, *x.shape[-2:])
        words = 4 * math.prod(words_shape(batch, lines, k))
        pending.append((x, axis, total, total + words, step))
        sides.append(None)
        # The next operand starts at a multiple of 256 bytes, as memory from a pool does.
        total += (words + 4 * batch * lines + 255) & ~255
    if pending:
        import cupy

        workspace = cupy.cuda.alloc(total)
        base = workspace.ptr
        keep.append(workspace)
        pack_into([(x, axis, base + w, base + p) for x, axis, w, p, _ in pending], device)
        fill = iter(pending)
        for i, side in enumerate(sides):
            if side is None:
                _, _, w, p, step = next(fill)
                sides[i] = _Side(base + w, base + p, step)
    left, right = sides
    assert left is not None
    assert right is not None
    return left, right, keep


class _Repeated(NamedTuple):
    words: Any
    popcounts: Any
    shape: tuple[int, ...]


def _repeated(x: Any, axis: int, batch_shape: tuple[int, ...]) -> Any:
    import cupy

    if not hasattr(x, "popcounts"):
        return cupy.broadcast_to(x, (*batch_shape, *x.shape[-2:]))
    own = x.shape[:-2]
    words = x.words.reshape(*own, *x.words.shape[1:])
    return _Repeated(
        cupy.ascontiguousarray(cupy.broadcast_to(words, (*batch_shape, *words.shape[len(own) :]))),
        cupy.ascontiguousarray(
            cupy.broadcast_to(x.popcounts, (*batch_shape, x.popcounts.shape[-1]))
        ),
        (*batch_shape, *x.shape[-2:]),
    )


def gemm(a: Any, b: Any, out: Any, epilogue: Epilogue | None) -> None:
    """Fill `out` with the product of the signs of `a` and `b`.

    Parameters
    ----------
    a, b : cupy.ndarray or PackedMatrix
        (*batch_a, M, K) and (*batch_b, K, N), on the current device; a PackedMatrix is packed along
        K. The batch shapes broadcast to that of `out`.
    out : cupy.ndarray, shape (*batch, M, N)
        Of any strides, and of any dtype that a result may have.
    epilogue : Epilogue or None
        Scale and bias, or None for the integers.
    """
    if out.size == 0:
        return
    output = _OUTPUTS.get(out.dtype.name)
    if output is None or (out.ndim > 3 and not out.flags.c_contiguous):
        _by_way_of_a_copy(a, b, out, epilogue)
        return
    shape, strides, itemsize = out.shape, out.strides, out.itemsize
    if len(shape) == 2:
        batch, batch_stride = 1, 0
    else:
        batch = math.prod(shape[:-2])
        batch_stride = strides[-3] // itemsize
    m, n = shape[-2:]
    k = a.shape[-1]
    device = out.data.device_id
    scaled = epilogue is not None
    plan = plan_for(device, m, n, k, batch, output, scaled)
    left, right, keep = _sides(a, b, shape[:-2], device)
    row_scale = col_scale = bias = _NO_SCALE
    if epilogue is not None:
        row_scale = _scale(epilogue.row_scale, shape[:-2], m, keep)
        col_scale = _scale(epilogue.col_scale, shape[:-2], n, keep)
        bias = _scale(epilogue.bias, shape[:-2], n, keep)
    row_stride, col_stride = strides[-2] // itemsize, strides[-1] // itemsize
    if plan.swap:
        left, right, m, n = right, left, n, m
        row_scale, col_scale = col_scale, row_scale
        row_stride, col_stride = col_stride, row_stride
    fields = [
        left.words, right.words, left.popcounts, right.popcounts, out.data.ptr, 0,
        row_scale[0], col_scale[0], bias[0], 0, 0,
        m, n, k, chunk_count(k), batch, left.step, right.step,
        row_stride, col_stride, batch_stride, row_scale[1], col_scale[1], bias[1],
        plan.swap, plan.group,
    ]  # fmt: skip
    plan.kernel(plan.grid, plan.block, (by_value(fields, _PRODUCT),), shared_mem=plan.shared)


_NO_SCALE = (0, 0)


def _scale(x: Any, batch_shape: tuple[int, ...], length: int, keep: Any) -> tuple[int, int]:
    """Return address and batch stride of a scale or bias as `length` float32 a product."""
    if x is None:
        return _NO_SCALE
    import cupy

    varies = math.prod(x.shape[:-2]) > 1
    x = x.reshape((*x.shape[:-2], -1))  # (..., M, 1) or (..., 1, N)
    shape = (*batch_shape, length) if varies else (length,)
    if not varies:
        x = x.reshape(-1)
    x = cupy.ascontiguousarray(cupy.broadcast_to(x, shape), dtype=np.float32)
    keep.append(x)
    return x.data.ptr, length if varies else 0


def _by_way_of_a_copy(a: Any, b: Any, out: Any, epilogue: Epilogue | None) -> None:
    """Multiply into memory that the kernels can write, and convert from there."""
    import cupy

    native = out.dtype.name in _OUTPUTS
    result = cupy.empty(out.shape, out.dtype if native else np.int32)
    gemm(a, b, result, epilogue if native else None)
    if epilogue is not None and not native:
        # Wider than float32: the same steps, in that precision.
        wide = result.astype(np.result_type(out.dtype, np.float32))
        for scale in (epilogue.row_scale, epilogue.col_scale):
            if scale is not None:
                wide *= scale
        if epilogue.bias is not None:
            wide += epilogue.bias
        result = wide
    out[...] = result


def gemm_packed(a: Any, b: Any, threshold: Any, flip: Any) -> tuple[Any, Any]:
    """Multiply and keep the signs of the results against a threshold a column, packed.

    Parameters
    ----------
    a, b : cupy.ndarray or PackedMatrix
        As for `gemm`.
    threshold : cupy.ndarray of int32, shape (N,), or None
        A result's bit is 1 where it is at least this (None: 0), unless flipped.
    flip : cupy.ndarray of bool, shape (N,), or None

    Returns
    -------
    words, popcounts : cupy.ndarray
        Of the (*batch, M, N) result, packed along its last axis.
    """
    import cupy

    batch_shape = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    batch = math.prod(batch_shape)
    m, k = a.shape[-2:]
    n = b.shape[-1]
    if k >= 2**30:
        raise ValueError(
            f"A product with a packed result must have K below 2**30, for its distance from the "
            f"threshold must fit an int32; got K = {k}. Use xnor_gemm and pack its signs."
        )
    shape = words_shape(batch, m, n)
    # Words that no tile covers, and lines that make up the last eight, are zeros.
    covered = n % 1024 == 0 and m % 8 == 0
    words = (cupy.empty if covered and k else cupy.zeros)(shape, np.uint32)
    popcounts = cupy.zeros((*batch_shape, m), np.int32)
    if popcounts.size == 0 or n == 0:
        return words, popcounts
    device = words.data.device_id
    plan = plan_for(device, m, n, k, batch, _PACKED, False)
    left, right, keep = _sides(a, b, batch_shape, device)
    columns = []
    for x, dtype in ((threshold, np.int32), (flip, np.bool_)):
        if x is not None:
            x = cupy.ascontiguousarray(x, dtype=dtype)
            keep.append(x)
        columns.append(0 if x is None else x.data.ptr)
    fields = [
        left.words, right.words, left.popcounts, right.popcounts, words.data.ptr,
        popcounts.data.ptr, 0, 0, 0, *columns,
        m, n, k, chunk_count(k), batch, left.step, right.step,
        0, 0, 0, 0, 0, 0, 0, plan.group,
    ]  # fmt: skip
    plan.kernel(plan.grid, plan.block, (by_value(fields, _PRODUCT),), shared_mem=plan.shared)
    return words, popcounts

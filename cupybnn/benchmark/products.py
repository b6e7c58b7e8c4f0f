"""Time one product with every method, and check the timed results."""

from __future__ import annotations

import contextlib
import gc
import math
from typing import Any

from cupybnn.backends.devices import Device
from cupybnn.benchmark.clock import Clock
from cupybnn.benchmark.methods import BASELINE, Method, Prepared, Unsupported, record_error
from cupybnn.benchmark.shapes import Shape
from cupybnn.packed import PackedMatrix

__all__ = ["Limits", "measure", "memory", "peak_operations", "release", "rotation", "wrong_element"]

#: 1-bit operations per second and multiprocessor, for the architectures where it was measured:
#: `wgmma` b1 on an H200, 15.5e15 with 132 multiprocessors.
PEAK_PER_MULTIPROCESSOR = {"sm_90": 15.5e15 / 132}

MOST_SETS = 1024


class Limits:
    """The limits a product is compared with: peak arithmetic and copy bandwidth of a device."""

    def __init__(self, peak: float | None, bandwidth: float | None) -> None:
        self.peak = peak
        self.bandwidth = bandwidth

    def shares(self, operations: int, nbytes: int, seconds: float) -> dict[str, float | None]:
        """Return the fractions of peak arithmetic and of copy bandwidth that a time achieves."""
        return {
            "of_peak": operations / self.peak / seconds if self.peak else None,
            "of_memory": nbytes / self.bandwidth / seconds if self.bandwidth else None,
        }


def peak_operations(facts: dict[str, Any]) -> float | None:
    """Return the peak 1-bit operations per second of a device; None if it was not measured."""
    rate = PEAK_PER_MULTIPROCESSOR.get(facts["arch"])
    return rate * facts["multiprocessors"] if rate else None


def rotation(set_bytes: int, cache_bytes: int, free_bytes: int) -> int:
    """Return how many sets of operands to rotate: twice the size of the cache, if they fit.

    Parameters
    ----------
    set_bytes : int
        Size of one set of operands and its result.
    cache_bytes : int
        Size of the last-level cache.
    free_bytes : int
        Free memory; at most half of it is used.
    """
    wanted = max(2, math.ceil(2 * cache_bytes / max(set_bytes, 1)))
    return max(1, min(wanted, MOST_SETS, free_bytes // 2 // max(set_bytes, 1)))


def wrong_element(prepared: Prepared, device: Device, rows: int = 16) -> str:
    """Compare rows of the first timed result with an exact product.

    Parameters
    ----------
    prepared : Prepared
        After timing.
    device : Device
    rows : int
        Number of rows to compare, spread over the matrix.

    Returns
    -------
    str
        A description of the first difference; "" if there is none.
    """
    xp = device.xp
    a, b, got = prepared.a0, prepared.b0, prepared.results[0]
    m, k = a.shape
    if k > 1 << 24:
        raise ValueError(
            f"The 'prepared' product must have K <= 2**24, because float32 sums of ±1 are exact "
            f"only up to there; got K = {k}."
        )
    count = min(rows, m)
    # The first, the last and some in between, at irregular positions in their tiles.
    index = sorted({0, m - 1, *(min(m - 1, i * m // count + (7 * i) % 61) for i in range(count))})
    at = xp.asarray(index)
    one = xp.float32(1)
    a_signs = xp.where(a[at] >= 0, one, -one)
    b_signs = xp.where(b >= 0, one, -one)
    want = a_signs @ b_signs
    if isinstance(got, PackedMatrix):
        got = got.unpack("float32")[at]
        want = xp.where(want >= 0, one, -one)
    else:
        got = got[at].astype(xp.float32)
        if prepared.results[0].dtype.itemsize == 2:
            want = want.astype(prepared.results[0].dtype).astype(xp.float32)
    wrong = got != want
    if not bool(wrong.any()):
        return ""
    i, j = (int(v) for v in xp.argwhere(wrong)[0])
    return (
        f"wrong result at [{index[i]}, {j}]: {float(got[i, j]):g} instead of {float(want[i, j]):g}"
    )


def memory(device: Device) -> tuple[int, int]:
    """Return the size of the last-level cache and of free memory, in bytes."""
    if device.kind == "cpu":
        return 32 << 20, 2 << 30
    cupy = device.xp
    free = cupy.cuda.runtime.memGetInfo()[0]
    return int(cupy.cuda.runtime.getDeviceProperties(device.index)["l2CacheSize"]), int(free)


def release(device: Device) -> None:
    """Return unused memory to the device, so that other libraries can allocate it."""
    gc.collect()
    if device.kind == "cpu":
        return
    with contextlib.suppress(Exception):
        device.xp.get_default_memory_pool().free_all_blocks()
    with contextlib.suppress(Exception):
        import torch

        torch.cuda.empty_cache()


def measure(
    shape: Shape,
    methods: tuple[Method, ...],
    device: Device,
    clock: Clock,
    limits: Limits,
    *,
    budget: float,
) -> dict[str, Any]:
    """Time one product with each method.

    The error of a method that fails is stored in its row; the others are still measured.

    Parameters
    ----------
    shape : Shape
    methods : tuple of Method
    device : Device
        The current device.
    clock : Clock
    limits : Limits
    budget : float
        Timing per method, in seconds; there are at least seven runs.

    Returns
    -------
    dict
        The shape and a row for each method, as JSON values.
    """
    rows = []
    for method in methods:
        if shape.m * shape.n * shape.k > method.largest:
            continue
        row: dict[str, Any] = {"method": method.name, "ours": method.ours}
        with record_error(row):
            row |= _measure_method(method, shape, device, clock, limits, budget)
        release(device)
        rows.append(row)
    baseline = {r["method"]: r for r in rows}.get(BASELINE[device.kind], {})
    for row in rows:
        for key in ("throughput", "issued"):
            if key in row and key in baseline:
                row[f"speedup_{key}"] = baseline[key]["median"] / row[key]["median"]
    return {
        "group": shape.group,
        "m": shape.m,
        "n": shape.n,
        "k": shape.k,
        "note": shape.note,
        "rows": rows,
    }


def _measure_method(
    method: Method, shape: Shape, device: Device, clock: Clock, limits: Limits, budget: float
) -> dict[str, Any]:
    cache, free = memory(device)
    nbytes = method.set_bytes(shape)
    # While a set is made, its operands also exist as float32.
    peak = nbytes + 8 * (shape.m + shape.n) * shape.k
    if peak > free:
        raise Unsupported(f"needs about {peak / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free")
    sets = rotation(nbytes, cache, free - peak)
    with method.scope():
        prepared = method.prepare(shape, device, sets)
        throughput = clock.throughput(prepared.calls, budget)
        # For a longer call, the host's time is hidden.
        issued = clock.issued(prepared.calls) if throughput.median < 1e-3 else throughput
    moved = prepared.bytes_moved()
    row: dict[str, Any] = {
        "throughput": throughput.as_dict(),
        "issued": issued.as_dict(),
        "tops": shape.operations / throughput.median / 1e12,
        "bytes": moved,
        "sets": sets,
    }
    if method.ours:
        row |= limits.shares(shape.operations, moved, throughput.median)
        row["configuration"] = _configuration(shape, device, method.result_bits == 1)
        problem = wrong_element(prepared, device)
        row["checked"] = not problem
        if problem:
            row["error"] = problem
    return row


def _configuration(shape: Shape, device: Device, packed: bool) -> str:
    """Return the kernel and tile that the dispatch chooses for a product."""
    if device.kind == "cpu":
        return "numpy"
    from cupybnn.backends.cuda import dispatch, tuning

    problem = dispatch.problem_on(device.index, shape.m, shape.n, shape.k, packed=packed)
    return str(dispatch.choose(problem, tuning.winners(device.index)))

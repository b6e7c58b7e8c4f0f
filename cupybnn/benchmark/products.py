"""Time one product by every method, and check the results that were timed."""

from __future__ import annotations

import contextlib
import gc
import math
from typing import Any

from cupybnn.backends.devices import Device
from cupybnn.benchmark.clock import Clock
from cupybnn.benchmark.methods import BASELINE, Method, Prepared, Unsupported, reason_in
from cupybnn.benchmark.shapes import Shape
from cupybnn.packed import PackedMatrix

__all__ = ["Limits", "measure", "peak_operations", "rotation", "wrong_element"]

#: 1-bit operations a second and multiprocessor that were measured with `wgmma` b1 on an H200:
#: 15.5e15 by 132 multiprocessors. Only architectures where this was measured stand here.
PEAK_A_MULTIPROCESSOR = {"sm_90": 15.5e15 / 132}

MOST_SETS = 1024


class Limits:
    """What a product is compared with: peak arithmetic and copy bandwidth of a device."""

    def __init__(self, peak: float | None, bandwidth: float | None) -> None:
        self.peak = peak
        self.bandwidth = bandwidth

    def shares(self, operations: int, nbytes: int, seconds: float) -> dict[str, float | None]:
        """Return the parts of the peak and of the memory floor that a time reaches."""
        return {
            "of_peak": operations / self.peak / seconds if self.peak else None,
            "of_memory": nbytes / self.bandwidth / seconds if self.bandwidth else None,
        }


def peak_operations(facts: dict[str, Any]) -> float | None:
    """Return the 1-bit operations a second of a device, where they were measured, else None."""
    rate = PEAK_A_MULTIPROCESSOR.get(facts["arch"])
    return rate * facts["multiprocessors"] if rate else None


def rotation(set_bytes: int, cache_bytes: int, free_bytes: int) -> int:
    """Return how many sets of operands to rotate: together twice the last cache, if they fit.

    Parameters
    ----------
    set_bytes : int
        Of one set of operands and its result.
    cache_bytes : int
        Of the last cache before memory.
    free_bytes : int
        Of memory; half of it is used.
    """
    wanted = max(2, math.ceil(2 * cache_bytes / max(set_bytes, 1)))
    return max(1, min(wanted, MOST_SETS, free_bytes // 2 // max(set_bytes, 1)))


def wrong_element(prepared: Prepared, device: Device, rows: int = 16) -> str:
    """Compare rows of the first timed result with an exact product.

    Parameters
    ----------
    prepared : Prepared
        After its calls were timed.
    device : Device
    rows : int
        How many rows are compared; each from another part of the matrix.

    Returns
    -------
    str
        Empty if all is equal, else the first difference.
    """
    xp = device.xp
    a, b, got = prepared.a0, prepared.b0, prepared.results[0]
    m, k = a.shape
    if k > 1 << 24:
        raise ValueError(
            f"The 'prepared' product must have K <= 2**24, up to which float32 adds ±1 exactly; "
            f"got K = {k}."
        )
    count = min(rows, m)
    # The first, the last and some between, at odd places in their tiles.
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


def _memory(device: Device) -> tuple[int, int]:
    """Return bytes of the last cache and of free memory."""
    if device.kind == "cpu":
        return 32 << 20, 2 << 30
    cupy = device.xp
    free = cupy.cuda.runtime.memGetInfo()[0]
    return int(cupy.cuda.runtime.getDeviceProperties(device.index)["l2CacheSize"]), int(free)


def release(device: Device) -> None:
    """Give unused memory back to the device, so that the next library finds it free."""
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
    """Time one product by each method.

    A method that fails leaves its error in its row; the others are measured all the same.

    Parameters
    ----------
    shape : Shape
    methods : tuple of Method
    device : Device
        The current device.
    clock : Clock
    limits : Limits
    budget : float
        Seconds of timing for each method; at least seven runs are made.

    Returns
    -------
    dict
        The shape and a row for each method, as plain JSON values.
    """
    rows = []
    for method in methods:
        if shape.m * shape.n * shape.k > method.largest:
            continue
        row: dict[str, Any] = {"method": method.name, "ours": method.ours}
        with reason_in(row):
            row |= _one(method, shape, device, clock, limits, budget)
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


def _one(
    method: Method, shape: Shape, device: Device, clock: Clock, limits: Limits, budget: float
) -> dict[str, Any]:
    cache, free = _memory(device)
    nbytes = method.set_bytes(shape)
    # While a set is made, its operands are there as float32, too.
    peak = nbytes + 8 * (shape.m + shape.n) * shape.k
    if peak > free:
        raise Unsupported(f"needs about {peak / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free")
    sets = rotation(nbytes, cache, free - peak)
    with method.scope():
        prepared = method.prepare(shape, device, sets)
        throughput = clock.throughput(prepared.calls, budget)
        # Where the device takes this long, the host's time is hidden behind it.
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
    """Return what the dispatch chooses for a product: the kernel and its tile, for the record."""
    if device.kind == "cpu":
        return "numpy"
    from cupybnn.backends.cuda import dispatch, tuning
    from cupybnn.backends.cuda.compiler import architecture

    capability = architecture(device.index)
    tuned = tuning.winners(device.index)
    return str(dispatch.choose(capability, shape.m, shape.n, shape.k, 1, packed, False, tuned))

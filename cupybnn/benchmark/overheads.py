"""What surrounds the product: copying, packing, the host's part of a call, the first call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import cupybnn
from cupybnn.backends.devices import Device
from cupybnn.benchmark.clock import Clock
from cupybnn.benchmark.methods import printable, random_floats, record_error
from cupybnn.benchmark.products import release, rotation
from cupybnn.gemm import xnor_gemm, xnor_gemm_packed
from cupybnn.packed import pack

__all__ = ["copy_bandwidth", "first_call", "host_time", "packing"]

PACKED_DTYPES = ("float32", "float16", "bfloat16", "float64", "int8", "bool")


def copy_bandwidth(device: Device, clock: Clock) -> dict[str, Any]:
    """Measure the bandwidth, read plus written, of copying a large float32 array."""
    xp = device.xp
    count = (1 << 28) if device.kind == "cuda" else (1 << 25)
    if device.kind == "cuda":
        count = min(count, xp.cuda.runtime.memGetInfo()[0] // 16)
    source = xp.ones(count, dtype=xp.float32)
    target = xp.empty_like(source)
    copy = partial(xp.copyto, target, source)
    timing = clock.throughput([copy], 0.1)
    nbytes = 2 * source.nbytes
    del source, target, copy
    release(device)
    return {"bytes": nbytes, **timing.as_dict(), "bytes_per_second": nbytes / timing.median}


def packing(
    device: Device, clock: Clock, bandwidth: float | None, *, size: int, quick: bool
) -> list[dict[str, Any]]:
    """Time `cupybnn.pack` along rows and columns, for each dtype.

    Parameters
    ----------
    device : Device
        The current device.
    clock : Clock
    bandwidth : float or None
        Bandwidth of a copy, in bytes a second, for comparison.
    size : int
        Size of the square matrix.
    quick : bool
        Whether to time only float32.
    """
    xp = device.xp
    cache = 32 << 20
    if device.kind == "cuda":
        cache = int(xp.cuda.runtime.getDeviceProperties(device.index)["l2CacheSize"])
    rows = []
    for name in PACKED_DTYPES[:1] if quick else PACKED_DTYPES:
        for axis, along in ((-1, "rows"), (-2, "columns")):
            row: dict[str, Any] = {"dtype": name, "packed_along": along, "size": size}
            with record_error(row):  # for example, bfloat16 needs ml_dtypes
                row |= _pack_one(device, clock, name, axis, size, cache)
                if bandwidth:
                    row["of_copy"] = row["bytes_per_second"] / bandwidth
            release(device)
            rows.append(row)
    return rows


def _pack_one(
    device: Device, clock: Clock, name: str, axis: int, size: int, cache: int
) -> dict[str, Any]:
    if name == "bfloat16":
        import ml_dtypes  # noqa: F401  (registers the name with NumPy)
    dtype = np.dtype(name)
    sets = rotation(size * size * dtype.itemsize, cache, 8 << 30)
    arrays = []
    for _ in range(sets):
        x = random_floats(device, (size, size))
        if name == "int8":
            x *= 127
        arrays.append(x >= 0 if name == "bool" else x.astype(dtype))
    results: list[Any] = [None] * sets

    def call(i: int) -> Callable[[], None]:
        def pack_it() -> None:
            results[i] = pack(arrays[i], axis=axis)

        return pack_it

    timing = clock.throughput([call(i) for i in range(sets)], 0.1)
    nbytes = arrays[0].nbytes + results[0].nbytes
    return {
        **timing.as_dict(),
        "bytes": nbytes,
        "sets": sets,
        "bytes_per_second": nbytes / timing.median,
    }


def host_time(device: Device, clock: Clock) -> list[dict[str, Any]]:
    """Time the host's part of a call, with operands so small that the device is never behind."""
    xp = device.xp
    a = random_floats(device, (64, 64))
    b = random_floats(device, (64, 64))
    pa, pb = pack(a, axis=-1), pack(b, axis=-2)
    calls: dict[str, Callable[[], Any]] = {
        "xnor_gemm, packed": lambda: xnor_gemm(pa, pb),
        "xnor_gemm, arrays": lambda: xnor_gemm(a, b),
        "xnor_gemm_packed, packed": lambda: xnor_gemm_packed(pa, pb),
        "pack": lambda: pack(a),
        f"{xp.__name__}.matmul": lambda: xp.matmul(a, b),
        f"{xp.__name__}.add": lambda: a + b,
    }
    rows = []
    for name, call in calls.items():
        row: dict[str, Any] = {"call": name}
        with record_error(row):
            row |= clock.host(call).as_dict()
        rows.append(row)
    return rows


_FIRST_CALL = """
import sys, time, json
sys.path.insert(0, sys.argv[1])
start = time.perf_counter()
import numpy
if sys.argv[2] == "cpu":
    xp, wait = numpy, lambda: None
else:
    import cupy as xp
    wait = lambda: xp.cuda.get_current_stream().synchronize()
imported = time.perf_counter()
signs = numpy.random.default_rng(0).random((2, 1024, 1024), dtype=numpy.float32) - 0.5
if sys.argv[2] != "cpu":
    xp.cuda.Device(int(sys.argv[2])).use()
a, b = xp.asarray(signs[0]), xp.asarray(signs[1])
wait()
ready = time.perf_counter()
import cupybnn
cupybnn.xnor_gemm(a, b)
wait()
first = time.perf_counter()
cupybnn.xnor_gemm(a, b)
wait()
second = time.perf_counter()
print(json.dumps({"import_array_library": imported - start, "device_and_arrays": ready - imported,
                  "first_call": first - ready, "second_call": second - first}))
"""


def first_call(device: Device) -> list[dict[str, Any]]:
    """Time the first product in a new process, first with empty caches, then with warm ones.

    ``first_call``, in seconds, includes ``import cupybnn``, but not the import of CuPy and the
    transfer of the operands.
    """
    package_parent = str(Path(cupybnn.__file__).resolve().parent.parent)
    which = "cpu" if device.kind == "cpu" else str(device.index)
    rows = []
    with tempfile.TemporaryDirectory(prefix="cupybnn-bench-") as folder:
        environment = {
            **os.environ,
            "CUPYBNN_CACHE_DIR": str(Path(folder) / "cupybnn"),
            "CUPY_CACHE_DIR": str(Path(folder) / "cupy"),
        }
        for cache in ("cold", "warm", "warm"):
            done = subprocess.run(
                [sys.executable, "-c", _FIRST_CALL, package_parent, which],
                capture_output=True,
                text=True,
                env=environment,
                timeout=120,
                check=False,
            )
            row: dict[str, Any] = {"cache": cache}
            if done.returncode == 0:
                row |= json.loads(done.stdout.splitlines()[-1])
            else:
                lines = done.stderr.strip().splitlines() or ["no message"]
                row["error"] = printable(lines[-1])
            rows.append(row)
    return rows

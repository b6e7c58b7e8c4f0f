"""Measuring configurations on the user's GPU, and keeping the winners.

The winners are a JSON file in the cache folder, one for each model of GPU and each state of the
kernels' sources: a table that was measured with other kernels is never read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cupybnn import settings
from cupybnn.backends.cuda import dispatch
from cupybnn.backends.cuda.compiler import architecture
from cupybnn.backends.cuda.dispatch import Config
from cupybnn.backends.cuda.sources import kernels_dir

__all__ = ["SHAPES", "Trial", "table_path", "tune", "winners"]

# (m, n, k, packed result) that are tuned unless others are asked for: squares, skinny products and
# the layers of a multilayer perceptron.
_SQUARES = [(n, n, n) for n in (512, 1024, 2048, 4096, 8192, 16384)]
SHAPES = (
    *((*square, packed) for square in _SQUARES for packed in (False, True)),
    (1, 16384, 16384, False),
    (16, 16384, 16384, False),
    (64, 4096, 4096, False),
    (128, 512, 512, False),
    (8192, 512, 512, False),
    (256, 256, 65536, False),
)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One configuration measured on one shape: median seconds, or None where it failed."""

    shape: tuple[int, int, int, bool]
    config: Config
    seconds: float | None
    shipped: bool


@lru_cache(maxsize=1)
def sources_digest() -> str:
    """Digest of everything that decides what a configuration compiles to."""
    digest = hashlib.sha256()
    for path in [*sorted(kernels_dir().rglob("*.cu*")), Path(dispatch.__file__)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def table_path(device: int) -> Path:
    """File of the winners for the model of CUDA device number `device`."""
    import cupy

    name = cupy.cuda.runtime.getDeviceProperties(device)["name"].decode()
    model = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()
    return settings.cache_dir() / f"tuned-{model}-{sources_digest()}.json"


@cache
def winners(device: int) -> dict[str, Config]:
    """Return the measured winners by `dispatch.shape_key`; empty where nothing was tuned."""
    try:
        entries = json.loads(table_path(device).read_text(encoding="utf-8"))
        return {key: _config(fields) for key, fields in entries.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        # A damaged table costs its speed-up, not the product: `--tune` writes it anew.
        return {}


def _config(fields: dict[str, Any]) -> Config:
    defines = tuple((str(name), int(value)) for name, value in fields.pop("defines"))
    config = Config(defines=defines, **fields)
    if config.kernel not in dispatch.KERNELS:
        raise ValueError(config.kernel)
    return config


def _save(device: int, found: dict[str, Config]) -> Path:
    path = table_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {key: dataclasses.asdict(config) for key, config in sorted(found.items())}
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(entries, file, indent=1)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def tune(
    device: int, shapes: Iterable[tuple[int, int, int, bool]] = SHAPES, *, least_gain: float = 0.02
) -> Iterator[Trial]:
    """Measure the candidates for each shape and keep those that beat the shipped table.

    Parameters
    ----------
    device : int
        Number of the CUDA device.
    shapes : iterable of (m, n, k, packed)
    least_gain : float
        A candidate must be faster than the shipped configuration by this part to be kept.

    Yields
    ------
    Trial
        After each measurement. The table is written after each shape.
    """
    import cupy

    with cupy.cuda.Device(device):
        capability = architecture(device)
        found = dict(winners(device))
        for shape in shapes:
            m, n, k, packed = shape
            kernel = dispatch.kernels_for(capability)[0]
            kernel = "sm80" if kernel == "sm75" else kernel
            shipped = dispatch.shipped(kernel, capability, m, n, k, 1, packed, False)
            configs = dispatch.candidates(kernel, capability, m, n, k, packed)
            run = _Runner(m, n, k, packed)
            times: dict[Config, float] = {}
            for config in [shipped, *(c for c in configs if c != shipped)]:
                seconds = run(config)
                if seconds is not None:
                    times[config] = seconds
                yield Trial(shape, config, seconds, config == shipped)
            key = dispatch.shape_key(m, n, k, 1, packed)
            found.pop(key, None)
            if times:
                best = min(times, key=lambda c: times[c])
                if times[best] < times.get(shipped, np.inf) * (1 - least_gain):
                    found[key] = best
            _save(device, found)
        winners.cache_clear()
        from cupybnn.backends.cuda import product

        product.forget_plans()


class _Runner:
    """Times one shape: random operands, checked against the shipped configuration's result."""

    def __init__(self, m: int, n: int, k: int, packed: bool) -> None:
        import cupy

        from cupybnn.packed import PackedMatrix, pack

        random = cupy.random.default_rng(0)
        self.packed = packed
        self.out = cupy.empty((m, n), np.int32)

        def operand(shape: tuple[int, int], axis: int) -> PackedMatrix:
            return pack(random.standard_normal(shape, dtype=np.float32), axis)

        # Several pairs, so that the operands of one call are not in the cache from the last.
        pairs = max(1, min(16, 2 * 60_000_000 // (-(-k // 1024) * 128 * (m + n))))
        self.pairs = [(operand((m, k), -1), operand((k, n), -2)) for _ in range(pairs)]
        self.expected: Any = None

    def _multiply(self, a: Any, b: Any) -> Any:
        from cupybnn.backends.cuda import product

        if self.packed:
            return product.gemm_packed(a, b, None, None)[0]
        product.gemm(a, b, self.out, None)
        return self.out

    def __call__(self, config: Config) -> float | None:
        import cupy

        try:
            with dispatch.force_kernel(config):
                self.out.fill(-(2**31))
                result = self._multiply(*self.pairs[0])
                if self.expected is None:
                    self.expected = result.copy()
                elif not bool((result == self.expected).all()):
                    return None
                start, stop = cupy.cuda.Event(), cupy.cuda.Event()
                times = []
                for repeat in range(25):
                    a, b = self.pairs[repeat % len(self.pairs)]
                    start.record()
                    self._multiply(a, b)
                    stop.record()
                    stop.synchronize()
                    times.append(cupy.cuda.get_elapsed_time(start, stop) / 1e3)
                return statistics.median(times[5:])
        except (cupy.cuda.driver.CUDADriverError, cupy.cuda.runtime.CUDARuntimeError):
            return None

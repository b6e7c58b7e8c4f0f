"""Measuring the kernels' configurations on the user's GPU, and storing the fastest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from cupybnn.backends.cuda import dispatch, product, tuning
from cupybnn.backends.cuda.architectures import default_kernel
from cupybnn.backends.cuda.compiler import architecture
from cupybnn.backends.cuda.configs import Config
from cupybnn.benchmark.clock import CudaClock
from cupybnn.packed import PackedMatrix, pack

__all__ = ["SHAPES", "Trial", "tune"]

# (m, n, k, packed result) tuned by default: square and skinny products, and the layers of a
# multilayer perceptron.
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
#: A candidate is kept if it is faster than the built-in configuration by this fraction.
_LEAST_GAIN = 0.02


@dataclasses.dataclass(frozen=True)
class Trial:
    """One configuration measured on one shape: median seconds, or None if it failed."""

    shape: tuple[int, int, int, bool]
    config: Config
    seconds: float | None
    builtin: bool


def tune(device: int, shapes: Iterable[tuple[int, int, int, bool]] = SHAPES) -> Iterator[Trial]:
    """Measure the candidates for each shape and keep those that beat the built-in ones.

    Parameters
    ----------
    device : int
        Index of the CUDA device.
    shapes : iterable of (m, n, k, packed)

    Yields
    ------
    Trial
        After each measurement. The table is written after each shape.
    """
    import cupy

    with cupy.cuda.Device(device):
        kernel = default_kernel(architecture(device))
        found = dict(tuning.winners(device))
        clock = CudaClock(cupy)
        for shape in shapes:
            m, n, k, packed = shape
            problem = dispatch.problem_on(device, m, n, k, packed=packed)
            builtin = dispatch.builtin_config(kernel, problem)
            configs = dispatch.candidates(kernel, problem)
            contest = _Contest(clock, shape)
            times: dict[Config, float] = {}
            for config in dict.fromkeys([builtin, *configs]):
                seconds = contest.seconds(config)
                if seconds is not None:
                    times[config] = seconds
                yield Trial(shape, config, seconds, config == builtin)
            found.pop(problem.key, None)
            if times:
                best = min(times, key=lambda c: times[c])
                if times[best] < times.get(builtin, np.inf) * (1 - _LEAST_GAIN):
                    found[problem.key] = best
            tuning.save(device, found)
            product.forget_launches()


class _Contest:
    """One shape's random operands; a configuration fails if its result differs from the first."""

    def __init__(self, clock: CudaClock, shape: tuple[int, int, int, bool]) -> None:
        import cupy

        m, n, k, self._packed = shape
        self._clock = clock
        self._out = cupy.empty((m, n), np.int32)
        self._expected: Any = None
        random = cupy.random.default_rng(0)

        def operand(shape: tuple[int, int], axis: int) -> PackedMatrix:
            return pack(random.standard_normal(shape, dtype=np.float32), axis)

        # Several pairs, so that the previous call does not leave the operands in the cache.
        pairs = max(1, min(16, 2 * 60_000_000 // (-(-k // 1024) * 128 * (m + n))))
        self._pairs = [(operand((m, k), -1), operand((k, n), -2)) for _ in range(pairs)]

    def _multiply(self, a: PackedMatrix, b: PackedMatrix) -> Any:
        if self._packed:
            return product.gemm_packed(a, b, None, None)[0]
        product.gemm(a, b, self._out, None)
        return self._out

    def seconds(self, config: Config) -> float | None:
        """Return the median time of a call, or None if the configuration fails."""
        import cupy

        try:
            with dispatch.force_kernel(config):
                self._out.fill(np.iinfo(np.int32).min)
                result = self._multiply(*self._pairs[0])
                if self._expected is None:
                    self._expected = result.copy()
                elif not bool((result == self._expected).all()):
                    return None
                calls = [lambda pair=pair: self._multiply(*pair) for pair in self._pairs]
                return self._clock.throughput(calls, 0.02).median
        except (cupy.cuda.driver.CUDADriverError, cupy.cuda.runtime.CUDARuntimeError):
            return None

"""Time of each training step, measured on the device."""

from __future__ import annotations

import statistics
import time
from typing import Any

from cupybnn.backends.devices import Device

__all__ = ["StepTimer"]


class StepTimer:
    """Stopwatch for steps: CUDA events on a GPU, `time.perf_counter` on the CPU.

    Reading a CUDA event waits for it, so events are read late: when many are pending, or when a
    result is requested.

    Parameters
    ----------
    device : Device
    batch_size : int
        Examples in a step.
    """

    _PENDING = 512

    def __init__(self, device: Device, batch_size: int) -> None:
        self._batch_size = batch_size
        self._seconds: list[float] = []
        self._mark = 0  # steps before the current interval
        self._pending: list[tuple[Any, Any]] = []
        self._device = device
        self._begin: Any = None

    def start(self) -> None:
        """Begin a step."""
        self._begin = self._now()

    def stop(self) -> None:
        """End the step that `start` began."""
        if self._device.kind == "cpu":
            self._seconds.append(time.perf_counter() - self._begin)
            return
        self._pending.append((self._begin, self._now()))
        if len(self._pending) >= self._PENDING:
            self._read(self._PENDING // 2)

    def _now(self) -> Any:
        if self._device.kind == "cpu":
            return time.perf_counter()
        event = self._device.xp.cuda.Event()
        event.record()
        return event

    def _read(self, count: int) -> None:
        if not count:
            return
        self._pending[count - 1][1].synchronize()
        elapsed = self._device.xp.cuda.get_elapsed_time  # milliseconds
        self._seconds += [elapsed(begin, end) / 1e3 for begin, end in self._pending[:count]]
        del self._pending[:count]

    def interval(self) -> float:
        """Return examples a second over the steps since the last call (NaN if there were none)."""
        self._read(len(self._pending))
        seconds = self._seconds[self._mark :]
        self._mark = len(self._seconds)
        return self._rate(sum(seconds) / len(seconds)) if seconds else float("nan")

    def _counted(self) -> list[float]:
        """Seconds of each step, without the first, which compiles and warms up."""
        self._read(len(self._pending))
        return self._seconds[1:] or self._seconds

    def average(self) -> float:
        """Return examples a second over all steps except the first (NaN before any step)."""
        seconds = self._counted()
        return self._rate(statistics.fmean(seconds)) if seconds else float("nan")

    def median(self) -> float:
        """Return examples a second in the median step (NaN before any step)."""
        seconds = self._counted()
        return self._rate(statistics.median(seconds)) if seconds else float("nan")

    def _rate(self, seconds: float) -> float:
        return self._batch_size / seconds if seconds > 0 else float("inf")

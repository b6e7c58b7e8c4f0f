"""Two clocks with the same methods: CUDA events for a GPU, `time.perf_counter` for NumPy."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from cupybnn.backends.devices import Device

__all__ = ["Clock", "CudaClock", "HostClock", "Timing", "make_clock"]

Call = Callable[[], Any]

#: Calls shorter than this are timed in groups: an event costs about a microsecond of GPU time.
GROUP_SECONDS = 100e-6
#: Minimum time between two events of `Clock.steady`, so that most groups include what a training
#: step does only occasionally, such as writing tables for the next steps.
STEADY_SECONDS = 20e-3
#: Calls enqueued at a time. CUDA's queue holds about a thousand launches and then blocks the host.
BURST_CALLS = 150


@dataclass(frozen=True)
class Timing:
    """Seconds per call, over `runs` runs of `calls` calls each."""

    median: float
    min: float
    p10: float
    p90: float
    mean: float
    std: float
    runs: int
    calls: int

    @classmethod
    def of(cls, seconds: Sequence[float], calls: int = 1) -> Timing:
        """Summarise the seconds per call of each run."""
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return cls(
            median=statistics.median(ordered),
            min=ordered[0],
            p10=ordered[round(0.1 * last)],
            p90=ordered[round(0.9 * last)],
            mean=statistics.fmean(ordered),
            std=statistics.stdev(ordered) if last else 0.0,
            runs=len(ordered),
            calls=calls,
        )

    def as_dict(self) -> dict[str, float | int]:
        """Return the fields, for JSON."""
        return asdict(self)


class Clock(Protocol):
    """What the benchmark needs from a clock; `calls` are made in turn, repeatedly."""

    def throughput(self, calls: Sequence[Call], budget: float) -> Timing:
        """Time of a call on the device when calls follow each other without gaps."""
        ...

    def issued(self, calls: Sequence[Call]) -> Timing:
        """Time of a call when the host issues them in a loop, including host time."""
        ...

    def steady(self, call: Call, budget: float) -> Timing:
        """Time of a call in a long run of calls, issued without waiting for the device."""
        ...

    def latency(self, calls: Sequence[Call], runs: int) -> Timing:
        """Time of a single call on an idle device."""
        ...

    def host(self, call: Call) -> Timing:
        """Time that the host spends on a call, without waiting for the device."""
        ...

    def wait(self) -> None:
        """Wait for all work issued so far."""
        ...


def make_clock(device: Device) -> Clock:
    """Return the clock of `device`, which must be the current device."""
    return CudaClock(device.xp) if device.kind == "cuda" else HostClock()


def _runs(seconds_a_run: float, budget: float) -> int:
    return max(7, min(100, int(budget / max(seconds_a_run, 1e-9))))


def _round(calls: Sequence[Call], first: int, count: int) -> Call:
    """Return a function that makes `count` calls in turn, beginning with number `first`."""

    def make() -> None:
        for i in range(first, first + count):
            calls[i % len(calls)]()

    return make


class HostClock:
    """Clock for NumPy, whose work is done when a call returns."""

    def wait(self) -> None:
        """Do nothing: NumPy has finished when it returns."""

    def throughput(self, calls: Sequence[Call], budget: float) -> Timing:
        """Time runs of one or more calls, after a warm-up."""
        for call in calls[:3]:
            call()
        once = self._run(calls, 0, 1)
        group = max(1, math.ceil(GROUP_SECONDS / once))
        runs = _runs(once * group, budget)
        return Timing.of([self._run(calls, i * group, group) for i in range(runs)], group)

    def issued(self, calls: Sequence[Call]) -> Timing:
        """Return the same as `throughput`, because nothing runs asynchronously."""
        return self.throughput(calls, 0.05)

    def steady(self, call: Call, budget: float) -> Timing:
        """Return the same as `throughput`."""
        return self.throughput([call], budget)

    def latency(self, calls: Sequence[Call], runs: int) -> Timing:
        """Time single calls."""
        calls[0]()
        return Timing.of([self._run(calls, i, 1) for i in range(runs)])

    def host(self, call: Call) -> Timing:
        """Return the same as `throughput`."""
        return self.throughput([call], 0.05)

    @staticmethod
    def _run(calls: Sequence[Call], first: int, count: int) -> float:
        start = time.perf_counter()
        _round(calls, first, count)()
        return (time.perf_counter() - start) / count


class CudaClock:
    """Clock for the current CUDA device and stream.

    Short calls would be timed with the gaps in which the device waits for the host. So `throughput`
    first keeps the device busy with memory fills and enqueues the calls behind them. The fills also
    flush the L2 cache.
    """

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._ballast = cupy.cuda.alloc(1 << 28)
        self._stream = cupy.cuda.get_current_stream()
        self._fill(3)
        self.wait()
        _, seconds = self._timed(lambda: self._fill(20))
        self._fill_seconds = max(seconds / 20, 1e-6)

    def _event(self) -> Any:
        return self._cupy.cuda.Event()

    def _between(self, start: Any, end: Any) -> float:
        end.synchronize()
        return self._cupy.cuda.get_elapsed_time(start, end) * 1e-3

    def _timed(self, work: Call) -> tuple[float, float]:
        """Return the seconds that the host takes to issue `work`, and the device to run it."""
        start, end = self._event(), self._event()
        start.record()
        began = time.perf_counter()
        work()
        host = time.perf_counter() - began
        end.record()
        return host, self._between(start, end)

    def _fill(self, times: int) -> None:
        for _ in range(times):
            self._ballast.memset_async(0, 1 << 28, self._stream)

    def wait(self) -> None:
        """Wait for the stream."""
        self._stream.synchronize()

    def throughput(self, calls: Sequence[Call], budget: float) -> Timing:
        """Time groups of calls between two events, with the queue never empty."""
        # Warm up every call, so that its kernels are compiled and its memory is allocated.
        for call in calls:
            call()
        self.wait()
        host, device = self._estimate(calls)
        group = max(1, min(BURST_CALLS, math.ceil(GROUP_SECONDS / device)))
        runs = _runs(device * group, budget)
        runs_a_burst = max(1, min(runs, BURST_CALLS // group))
        backlog = 0 if device > 2 * host else 1.5 * runs_a_burst * group * host + 100e-6
        fills = 1 + math.ceil(backlog / self._fill_seconds)
        seconds: list[float] = []
        at = 0
        while len(seconds) < runs:
            self._fill(min(fills, 500))
            events = [self._event() for _ in range(runs_a_burst + 1)]
            events[0].record()
            for event in events[1:]:
                for _ in range(group):
                    calls[at % len(calls)]()
                    at += 1
                event.record()
            events[-1].synchronize()
            pairs = itertools.pairwise(events)
            seconds += [self._between(first, second) / group for first, second in pairs]
        return Timing.of(seconds, group)

    def _estimate(self, calls: Sequence[Call]) -> tuple[float, float]:
        """Estimate seconds per call on the host and, as an upper bound, on the device."""
        host, device = self._timed(calls[0])
        if device > 10 * GROUP_SECONDS:
            return host, device
        # A short time may be mostly the host's. Measure again with the calls queued.
        self._fill(1 + math.ceil(20 * host / self._fill_seconds))
        host, device = self._timed(_round(calls, 0, 10))
        return host / 10, max(device / 10, 1e-6)

    def issued(self, calls: Sequence[Call]) -> Timing:
        """Time bursts of calls issued on an idle device, by events."""
        for call in calls[:3]:
            call()
        host, device = self._estimate(calls)
        count = max(1, min(50, int(0.01 / max(host, device))))
        seconds = []
        for run in range(9):
            self.wait()
            seconds.append(self._timed(_round(calls, run * count, count))[1] / count)
        return Timing.of(seconds, count)

    def steady(self, call: Call, budget: float) -> Timing:
        """Time groups of calls between events; includes host time if the host is slower."""
        for _ in range(3):
            call()
        self.wait()
        once = self._timed(_round([call], 0, 3))[1] / 3
        group = max(1, math.ceil(STEADY_SECONDS / once))
        for _ in range(group):  # from here on the host's lead is constant
            call()
        events = [self._event() for _ in range(_runs(once * group, budget) + 1)]
        events[0].record()
        for event in events[1:]:
            for _ in range(group):
                call()
            event.record()
        seconds = [self._between(a, b) / group for a, b in itertools.pairwise(events)]
        return Timing.of(seconds, group)

    def backlog(self, seconds: float) -> None:
        """Keep the device busy for `seconds`, so that work enqueued meanwhile runs without gaps."""
        self._fill(min(1 + math.ceil(seconds / self._fill_seconds), 500))

    def latency(self, calls: Sequence[Call], runs: int) -> Timing:
        """Time single calls on an idle device, by events."""
        for call in calls:
            call()
        seconds = []
        for i in range(runs):
            self.wait()
            seconds.append(self._timed(calls[i % len(calls)])[1])
        return Timing.of(seconds)

    def host(self, call: Call) -> Timing:
        """Time bursts of 50 calls on the host; the device's queue never fills."""
        for _ in range(10):
            call()
        seconds = []
        for _ in range(50):
            self.wait()
            start = time.perf_counter()
            for _ in range(50):
                call()
            seconds.append((time.perf_counter() - start) / 50)
        self.wait()
        return Timing.of(seconds, 50)

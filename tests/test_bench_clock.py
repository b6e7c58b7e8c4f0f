"""The benchmark's clocks: what they would measure on a device whose times are known."""

import time
from types import SimpleNamespace

import pytest

from cupybnn.benchmark import clock as clocks
from cupybnn.benchmark.clock import CudaClock, HostClock, Timing


class FakeDevice:
    """A GPU in simulated time: the host issues, the device works through its queue in order."""

    FILL_SECONDS = 75e-6
    EVENT_SECONDS = 1e-6

    def __init__(self):
        self.host = 0.0  # the host's time of day
        self.idle_at = 0.0  # when the device will have done all that was issued

    def issue(self, host_seconds: float, device_seconds: float) -> None:
        self.host += host_seconds
        self.idle_at = max(self.idle_at, self.host) + device_seconds

    def cupy(self):
        device = self

        class Event:
            def record(self):
                device.issue(0.5e-6, device.EVENT_SECONDS)
                self.time = device.idle_at

            def synchronize(self):
                device.host = max(device.host, self.time)

        class Stream:
            def synchronize(self):
                device.host = max(device.host, device.idle_at)

        class Memory:
            def memset_async(self, value, size, stream):
                device.issue(3e-6, device.FILL_SECONDS)

        cuda = SimpleNamespace(
            Event=Event,
            alloc=lambda size: Memory(),
            get_current_stream=Stream,
            get_elapsed_time=lambda start, end: (end.time - start.time) * 1e3,
        )
        return SimpleNamespace(cuda=cuda)


@pytest.fixture
def device(monkeypatch):
    device = FakeDevice()
    fake_time = SimpleNamespace(perf_counter=lambda: device.host)
    monkeypatch.setattr(clocks, "time", fake_time)
    return device


@pytest.mark.parametrize("host", [1e-6, 5e-6, 40e-6])
@pytest.mark.parametrize("seconds", [2e-6, 20e-6, 90e-6, 1e-3, 0.2])
def test_throughput_is_the_devices_time_however_slow_the_host(device, host, seconds):
    clock = CudaClock(device.cupy())
    timing = clock.throughput([lambda: device.issue(host, seconds)] * 3, budget=0.1)
    # An event of a microsecond stands between groups, nothing else.
    assert timing.median == pytest.approx(seconds, rel=0.02)
    assert timing.p90 == pytest.approx(seconds, rel=0.02)
    assert timing.runs >= 7


@pytest.mark.parametrize(("host", "seconds"), [(40e-6, 5e-6), (5e-6, 40e-6)])
def test_issued_is_the_slower_of_host_and_device(device, host, seconds):
    clock = CudaClock(device.cupy())
    timing = clock.issued([lambda: device.issue(host, seconds)] * 3)
    assert timing.median == pytest.approx(max(host, seconds), rel=0.15)


@pytest.mark.parametrize(
    ("host", "seconds"), [(40e-6, 5e-6), (2e-3, 100e-6), (5e-6, 90e-6), (1e-3, 0.1)]
)
def test_steady_is_the_slower_of_host_and_device(device, host, seconds):
    clock = CudaClock(device.cupy())
    timing = clock.steady(lambda: device.issue(host, seconds), budget=0.1)
    assert timing.median == pytest.approx(max(host, seconds), rel=0.01)
    assert timing.runs >= 7
    assert timing.calls * timing.median >= clocks.STEADY_SECONDS * 0.8


def test_a_backlog_keeps_the_device_busy_for_that_long(device):
    clock = CudaClock(device.cupy())
    clock.wait()
    clock.backlog(2e-3)
    assert device.idle_at - device.host == pytest.approx(2e-3, rel=0.15)


def test_latency_counts_host_and_device(device):
    clock = CudaClock(device.cupy())
    timing = clock.latency([lambda: device.issue(40e-6, 100e-6)] * 2, runs=10)
    assert timing.median == pytest.approx(140e-6, rel=0.05)
    assert timing.runs == 10


def test_host_is_the_hosts_time(device):
    clock = CudaClock(device.cupy())
    timing = clock.host(lambda: device.issue(12e-6, 5e-6))
    assert timing.median == pytest.approx(12e-6, rel=0.01)


def test_the_queue_never_holds_more_than_it_can(device):
    clock = CudaClock(device.cupy())
    waiting = []
    issue = device.issue

    def counted(host, seconds):
        issue(host, seconds)
        waiting.append(device.idle_at - device.host)

    clock.throughput([lambda: counted(30e-6, 5e-6)], budget=0.1)
    # The filling ahead of a burst is milliseconds, not seconds.
    assert max(waiting) < 0.05


def test_calls_are_taken_in_turn(device):
    clock = CudaClock(device.cupy())
    counts = [0] * 5

    def call(i):
        def run():
            counts[i] += 1
            device.issue(5e-6, 300e-6)

        return run

    clock.throughput([call(i) for i in range(5)], budget=0.1)
    assert min(counts) > 10
    assert max(counts) - min(counts) <= 12  # the warm-up looks at the first ones only


def test_host_clock_times_groups_of_short_calls():
    calls = []
    timing = HostClock().throughput([lambda: calls.append(1)], budget=0.01)
    assert timing.calls > 1
    assert 0 < timing.min <= timing.median <= timing.p90 < 1e-3


def test_host_clock_takes_long_calls_one_by_one():
    timing = HostClock().throughput([lambda: time.sleep(0.002)], budget=0.01)
    assert timing.calls == 1
    assert timing.median >= 0.002


def test_timing_of_known_numbers():
    timing = Timing.of([5.0, 1.0, 2.0, 4.0, 3.0], calls=10)
    assert (timing.median, timing.min, timing.mean) == (3.0, 1.0, 3.0)
    assert (timing.p10, timing.p90) == (1.0, 5.0)
    assert timing.std == pytest.approx(2.5**0.5)
    assert (timing.runs, timing.calls) == (5, 10)
    assert Timing.of([2.0]).std == 0

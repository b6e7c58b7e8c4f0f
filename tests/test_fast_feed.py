"""What each fused step reads from tables: the images of the plain step, and its learning rates."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from kernels_by_numpy import Emulator

from cupybnn import nn, optim
from cupybnn.backends.devices import CPU, Device
from cupybnn.data import BatchOrder
from cupybnn.optim import schedules
from cupybnn.training.fast import feed as module
from cupybnn.training.fast.feed import Feed

#: Across rounds of the tables, with jumps as after a restored checkpoint, one of them to a row
#: that an earlier round has written.
STEPS = (*range(14), 30, 31, 4, *range(5, 9), 8)


def expected_rates(optimizer, done: int) -> list[float]:
    group = optimizer.groups[0]
    b1, b2 = group["betas"]
    lr, root = group["lr"] * optimizer.schedule(done), np.sqrt(1 - b2 ** (done + 1))
    return [lr, lr * root / (1 - b1 ** (done + 1)), group["eps"] * root, 0]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch) -> Device:
    if request.param == "cpu":
        Emulator(monkeypatch)
        return CPU
    pytest.importorskip("cupy")
    return Device("cuda")


@pytest.mark.parametrize(("first", "count"), [(0, 8), (3, 2), (6, 3), (8, 0)])
def test_tables_follow_the_steps(device, monkeypatch, first, count):
    monkeypatch.setattr(module, "_STEPS", 3)
    monkeypatch.setattr(module, "_RATES", 5)
    weights = np.arange(100) % 4 / 2
    order = BatchOrder(100, 8, 3, device, weights)
    parameter = nn.Parameter(device.xp.zeros(4, np.float32))
    optimizer = optim.Adam([parameter], 0.1, schedule=schedules.cosine(40, 0.1))
    feed = Feed(order, optimizer, first, count)
    on_host = BatchOrder(100, 8, 3, CPU, weights)
    for step in STEPS:
        if step == 7:
            optimizer.groups[0]["lr"] = 0.5  # as a callback may
        feed.prepare(step)
        assert int(feed.step[0]) == step
        images = feed.images[step % len(feed.images)].get()
        np.testing.assert_array_equal(images, on_host.indices(step, first, count))
        rates = feed.rates[step % len(feed.rates)].get()
        np.testing.assert_allclose(rates, expected_rates(optimizer, optimizer.steps), rtol=1e-6)
        feed.step += 1  # as the update does
        optimizer.steps += 1


def test_the_host_writes_a_table_once_in_a_round(monkeypatch):
    Emulator(monkeypatch)
    monkeypatch.setattr(module, "_RATES", 10)
    written: list[tuple[int, int, int]] = []
    order = SimpleNamespace(write=lambda out, *where: written.append((len(out), *where)))
    asked: list[int] = []
    schedule = lambda done: asked.append(done) or 1.0  # noqa: E731
    optimizer = optim.Adam([nn.Parameter(np.zeros(4, np.float32))], schedule=schedule)
    feed = Feed(order, optimizer, 512, 1 << 16)
    for step in range(13, 30):
        feed.prepare(step)
        optimizer.steps += 1
    assert written == [(4, first, 512) for first in (12, 16, 20, 24, 28)]
    assert asked == list(range(17))

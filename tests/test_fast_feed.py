"""What each fused step is fed: the images of the plain step, in its order."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from cupybnn import nn, optim
from cupybnn.backends.devices import Device
from cupybnn.data import BatchOrder
from cupybnn.training.fast import feed as module
from cupybnn.training.fast.feed import Feed


@pytest.mark.parametrize("pool", [ThreadPoolExecutor(3), None])
def test_the_order_of_images_is_drawn_ahead_and_is_the_same(pool):
    feed = object.__new__(Feed)  # without what it keeps on a device
    feed._order, feed.ring = BatchOrder(100, 8, seed=3, device=Device("cpu")), 7
    waited: list[int] = []
    feed._staging = [np.empty((feed.ring, 8), np.int32) for _ in range(2)]
    feed._copied = [
        SimpleNamespace(synchronize=lambda side=side: waited.append(side)) for side in range(2)
    ]
    feed._thread, feed._ahead = ThreadPoolExecutor(1), {}
    feed._drawers, feed._orders = pool, {}  # None where the interpreter is shutting down
    expected = BatchOrder(100, 8, seed=3, device=Device("cpu"))
    for first in (0, 7, 14, 70, 77, 7, 14):  # with two jumps, as after a restored checkpoint
        drawn = feed._drawn(first)
        assert any(drawn is staging for staging in feed._staging)
        for number, images in enumerate(drawn):
            np.testing.assert_array_equal(images, expected.indices(first + number))
        assert list(feed._ahead) == [first + feed.ring]
    feed._thread.shutdown()
    # Each array only once the device has read it: both in turn, and anew after a jump.
    assert waited == [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]


@pytest.mark.gpu
def test_tables_on_the_device_follow_the_steps(monkeypatch):
    import cupy

    monkeypatch.setattr(module, "_STEPS", 3)
    order = BatchOrder(100, 8, seed=3, device=Device("cpu"))
    feed = Feed(order, optim.Adam([nn.Parameter(cupy.zeros(4, np.float32))]))
    assert feed.ring == 3
    for step in (*range(14), 30, 31, 4, *range(5, 9)):
        feed.prepare(step)
        assert int(feed.step[0]) == step
        images = feed.images[step % feed.ring].get()
        np.testing.assert_array_equal(images, order.indices(step))
        feed.step += 1  # as the update does

"""What differs from step to step: the indices of a step's images, and its learning rates."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupybnn import optim
from cupybnn.data import BatchOrder

__all__ = ["Feed"]

#: Limits on the table of images: its entries, and its rows (steps).
_IMAGES, _STEPS = 1 << 18, 1024
#: Rows of the table of rates. The host computes them, in a microsecond or two each: with many more
#: at a time, the device would wait.
_RATES = 64


class Feed:
    """Tables on the device with one row per step, written ahead for many steps at once.

    Step s reads row ``s % rows`` of a table; a captured graph finds it from the step counter, which
    the device increments itself. Whenever a step begins a new round of a table, the host writes the
    rates, and a kernel the images: where there are several ranks, this rank's alone.

    Parameters
    ----------
    order : BatchOrder
    optimizer : Adam
    first, count : int
        Place in the batch of the first image that is needed, and how many; see
        `BatchOrder.indices`.

    Attributes
    ----------
    images : cupy.ndarray of int32, shape (steps, count)
        Indices of the images of each step.
    rates : cupy.ndarray of float32, shape (steps, 4)
        ``lr``, ``lr * root / (1 - b1**t)`` and ``eps * root``, where ``root = sqrt(1 - b2**t)``, of
        each step's update, with the schedule's factor in ``lr``; see `cupybnn.optim.Adam`.
    step : cupy.ndarray of int64, shape (1,)
        The next step.
    """

    def __init__(self, order: BatchOrder, optimizer: optim.Adam, first: int, count: int) -> None:
        import cupy

        self._order, self._optimizer, self._first = order, optimizer, first
        steps = max(1, min(_STEPS, _IMAGES // max(count, 1)))
        self.images = cupy.empty((steps, count), np.int32)
        self.rates = cupy.empty((_RATES, 4), np.float32)
        self.step = cupy.zeros(1, np.int64)
        self._next: int | None = None
        self._updates: int | None = None
        self._options: tuple[Any, ...] = ()

    def prepare(self, step: int) -> None:
        """Make sure that the tables on the device cover `step`."""
        optimizer = self._optimizer
        jump = step != self._next
        if jump:
            self.step.fill(step)
        if jump or step % len(self.images) == 0:
            self.write_images(step)
        group = optimizer.groups[0]
        options = (group["lr"], group["betas"], group["eps"], optimizer.schedule)
        stale = optimizer.steps != self._updates or options != self._options
        if jump or stale or step % len(self.rates) == 0:
            self._options = options
            self._write_rates(step)
        self._next, self._updates = step + 1, optimizer.steps + 1

    def write_images(self, step: int) -> None:
        """Write the images of the round of `step`."""
        self._order.write(self.images, step - step % len(self.images), self._first)

    def _write_rates(self, step: int) -> None:
        """Write the rates from `step` to the end of its round."""
        import cupy

        optimizer = self._optimizer
        group = optimizer.groups[0]
        b1, b2 = group["betas"]
        first = step % len(self.rates)
        rows = []
        for done in range(optimizer.steps, optimizer.steps + len(self.rates) - first):
            lr = group["lr"] * (1.0 if optimizer.schedule is None else optimizer.schedule(done))
            root = (1 - b2 ** (done + 1)) ** 0.5
            rows.append((lr, lr * root / (1 - b1 ** (done + 1)), group["eps"] * root, 0.0))
        self.rates[first:] = cupy.asarray(np.array(rows, np.float32))

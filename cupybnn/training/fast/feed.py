"""What each step needs from the host: the indices of its images and its learning rates."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np

from cupybnn import optim, settings
from cupybnn.data import BatchOrder

__all__ = ["Feed"]

#: Limits on the table of image indices on the device: entries, and rows (steps).
_IMAGES, _STEPS = 1 << 18, 1024
_DRAWERS = 4  # threads at most


class Feed:
    """Tables on the device with one row per step, written ahead for many steps at once.

    Step s reads row ``s % ring``; a captured graph finds it from the step counter, which the device
    increments itself. The host writes the tables whenever a step begins a new round of the ring.
    Meanwhile another thread draws the image order for the following round, because that takes
    milliseconds, for which the device would have to wait. Several epochs are drawn at a time: ranks
    that each take a part of a large batch draw all of it, and their steps are short.

    Parameters
    ----------
    order : BatchOrder
    optimizer : Adam

    Attributes
    ----------
    ring : int
        Rows.
    images : cupy.ndarray of int32, shape (ring, batch)
        Indices of the images of each step.
    rates : cupy.ndarray of float32, shape (ring, 4)
        ``lr``, ``lr * root / (1 - b1**t)`` and ``eps * root``, where ``root = sqrt(1 - b2**t)``, of
        each step's update, with the schedule's factor in ``lr``; see `cupybnn.optim.Adam`.
    step : cupy.ndarray of int64, shape (1,)
        The next step.
    """

    def __init__(self, order: BatchOrder, optimizer: optim.Adam) -> None:
        import cupy

        self._order = order
        self._optimizer = optimizer
        self.ring = max(1, min(_STEPS, _IMAGES // order.batch_size))
        self.images = cupy.empty((self.ring, order.batch_size), np.int32)
        self.rates = cupy.empty((self.ring, 4), np.float32)
        self.step = cupy.zeros(1, np.int64)
        # Pinned memory, so that the host need not wait for the copy, for the current round and the
        # next; and events that mark the end of each copy.
        self._staging = [
            np.ndarray(
                self.images.shape,
                np.int32,
                cupy.cuda.alloc_pinned_memory(self.images.nbytes),  # type: ignore[attr-defined]
            )
            for _ in range(2)
        ]
        self._copied = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]
        # A new thread starts on device 0, not on the current device.
        self._thread = _threads(1, cupy.cuda.Device().use)
        self._drawers = _threads(max(1, min(_DRAWERS, settings.cpu_threads() - 1)))
        self._orders: dict[int, np.ndarray] = {}  # by epoch
        self._ahead: dict[int, Future[np.ndarray]] = {}  # by the first step of the round
        self._next: int | None = None
        self._updates: int | None = None
        self._options: tuple[Any, ...] = ()

    def prepare(self, step: int) -> None:
        """Make sure that the tables on the device cover `step`."""
        optimizer = self._optimizer
        jump = step != self._next
        if jump:
            self.step.fill(step)
        group = optimizer.groups[0]
        options = (group["lr"], group["betas"], group["eps"], optimizer.schedule)
        if jump or step % self.ring == 0:
            self._write_images(step - step % self.ring)
        stale = optimizer.steps != self._updates or options != self._options
        if jump or stale or step % self.ring == 0:
            self._options = options
            self._write_rates(step)
        self._next, self._updates = step + 1, optimizer.steps + 1

    def _write_images(self, first: int) -> None:
        """Write the image indices of `ring` steps from `first` on."""
        import cupy

        stream = cupy.cuda.get_current_stream()
        self.images.set(self._drawn(first), stream=stream)
        self._copied[self._side(first)].record(stream)

    def _side(self, first: int) -> int:
        """Which of the two staging arrays the round that begins at step `first` uses."""
        return first // self.ring % 2

    def _drawn(self, first: int) -> np.ndarray:
        """Return the indices for the round from step `first` on; start drawing the next round."""
        images = self._ahead.get(first) or self._begin(first)
        following = first + self.ring
        self._ahead = {following: self._begin(following)}
        return images.result()

    def _begin(self, first: int) -> Future[np.ndarray]:
        """Draw a round in the thread, or here if the interpreter is shutting down."""
        try:
            if self._thread is not None:
                return self._thread.submit(self._draw, first)  # type: ignore[no-any-return]
        except RuntimeError:
            for begun in self._ahead.values():  # wait: they use the same memory
                begun.exception()
        drawn: Future[np.ndarray] = Future()
        drawn.set_result(self._draw(first))
        return drawn

    def _draw(self, first: int) -> np.ndarray:
        side = self._side(first)
        self._copied[side].synchronize()  # the previous copy from it may still be pending
        images = self._staging[side]
        flat = images.reshape(-1)
        size = self._order.images
        epoch, start = divmod(first * self._order.batch_size, size)
        self._draw_epochs(range(epoch, epoch + -(-(start + flat.size) // size)))
        done = 0
        while done < flat.size:
            part = self._orders[epoch][start : start + flat.size - done]
            flat[done : done + len(part)] = part
            done += len(part)
            epoch, start = epoch + 1, 0
        return images

    def _draw_epochs(self, epochs: range) -> None:
        """Draw the orders of epochs, but for those that the round before has left."""
        missing = [epoch for epoch in epochs if epoch not in self._orders]
        try:
            many = map if self._drawers is None else self._drawers.map
            drawn = list(many(self._order.draw, missing))
        except RuntimeError:  # the interpreter is shutting down
            drawn = list(map(self._order.draw, missing))
        orders = {**self._orders, **dict(zip(missing, drawn, strict=True))}
        self._orders = {epoch: orders[epoch] for epoch in epochs}

    def _write_rates(self, step: int) -> None:
        """Write the rates from `step` to the end of its round."""
        import cupy

        optimizer = self._optimizer
        group = optimizer.groups[0]
        b1, b2 = group["betas"]
        first = step % self.ring
        rows = np.zeros((self.ring - first, 4))
        for i, row in enumerate(rows):
            done = optimizer.steps + i
            lr = group["lr"] * (1.0 if optimizer.schedule is None else optimizer.schedule(done))
            root = (1 - b2 ** (done + 1)) ** 0.5
            row[:3] = lr, lr * root / (1 - b1 ** (done + 1)), group["eps"] * root
        self.rates[first:] = cupy.asarray(rows.astype(np.float32))


def _threads(count: int, initializer: Any = None) -> Any:
    """Return a pool of threads, or None if the interpreter is shutting down."""
    try:
        from concurrent.futures import ThreadPoolExecutor
    except RuntimeError:
        return None
    return ThreadPoolExecutor(count, "cupybnn-feed", initializer)

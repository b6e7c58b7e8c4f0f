"""What each step needs from the host: which images, and how far to go."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np

from cupybnn import optim
from cupybnn.data import BatchOrder

__all__ = ["Feed"]

#: Images and steps whose numbers lie on the device at a time.
_IMAGES, _STEPS = 1 << 18, 1024


class Feed:
    """Tables on the device with a row a step, written ahead for many steps at once.

    Row ``s % ring`` is that of step s: a captured graph looks there by the number of the step,
    which the device counts itself. The host writes when a step begins another round of the ring; it
    draws the order of images for the round after it meanwhile, in another thread, since that takes
    milliseconds and the device would wait.

    Parameters
    ----------
    order : BatchOrder
    optimizer : Adam

    Attributes
    ----------
    ring : int
        Rows.
    images : cupy.ndarray of int32, shape (ring, batch)
        Numbers of the images of each step.
    rates : cupy.ndarray of float32, shape (ring, 4)
        ``lr``, ``lr * root / (1 - b1**t)`` and ``eps * root``, where ``root = sqrt(1 - b2**t)``, of
        each step's update, with the schedule's factor in ``lr``; see `cupybnn.optim.Adam`.
    step : cupy.ndarray of int64, shape (1,)
        The step that comes next.
    """

    def __init__(self, order: BatchOrder, optimizer: optim.Adam) -> None:
        import cupy

        self._order = order
        self._optimizer = optimizer
        self.ring = max(1, min(_STEPS, _IMAGES // order.batch_size))
        self.images = cupy.empty((self.ring, order.batch_size), np.int32)
        self.rates = cupy.empty((self.ring, 4), np.float32)
        self.step = cupy.zeros(1, np.int64)
        # Memory that the device reads by itself, so that the host need not wait until it does, for
        # one round and the next; and what tells that the device has read it.
        self._staging = [
            np.ndarray(
                self.images.shape,
                np.int32,
                cupy.cuda.alloc_pinned_memory(self.images.nbytes),  # type: ignore[attr-defined]
            )
            for _ in range(2)
        ]
        self._copied = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]
        # A thread begins on device 0, whichever this is.
        self._thread = _one_thread(cupy.cuda.Device().use)
        self._ahead: dict[int, Future[np.ndarray]] = {}  # by the first step of the round
        self._next: int | None = None
        self._updates: int | None = None
        self._options: tuple[Any, ...] = ()

    def prepare(self, step: int) -> None:
        """Make sure that the device finds what `step` needs."""
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
        """Write the numbers of the images of `ring` steps from `first` on."""
        import cupy

        stream = cupy.cuda.get_current_stream()
        self.images.set(self._drawn(first), stream=stream)
        self._copied[self._side(first)].record(stream)

    def _side(self, first: int) -> int:
        """Which of the two staging arrays a round from step `first` on has."""
        return first // self.ring % 2

    def _drawn(self, first: int) -> np.ndarray:
        """Return the numbers for a round from step `first` on, and have the next ones drawn."""
        images = self._ahead.get(first) or self._begin(first)
        following = first + self.ring
        self._ahead = {following: self._begin(following)}
        return images.result()

    def _begin(self, first: int) -> Future[np.ndarray]:
        """Have the thread draw a round; without one, which no ending interpreter has, draw it."""
        try:
            if self._thread is not None:
                return self._thread.submit(self._draw, first)  # type: ignore[no-any-return]
        except RuntimeError:
            for begun in self._ahead.values():  # in the same memory
                begun.exception()
        drawn: Future[np.ndarray] = Future()
        drawn.set_result(self._draw(first))
        return drawn

    def _draw(self, first: int) -> np.ndarray:
        side = self._side(first)
        self._copied[side].synchronize()  # what stands there may still wait to be read
        images = self._staging[side]
        flat = images.reshape(-1)
        size = self._order.images
        epoch, start = divmod(first * self._order.batch_size, size)
        done = 0
        while done < flat.size:
            part = self._order.host_permutation(epoch)[start : start + flat.size - done]
            flat[done : done + len(part)] = part
            done += len(part)
            epoch, start = epoch + 1, 0
        return images

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


def _one_thread(initializer: Any) -> Any:
    """Return a pool of one thread, or None where the interpreter is ending."""
    try:
        from concurrent.futures import ThreadPoolExecutor
    except RuntimeError:
        return None
    return ThreadPoolExecutor(1, "cupybnn-feed", initializer)

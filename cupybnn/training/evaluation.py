"""Loss and accuracy over the test set, for the current or the averaged weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from cupybnn import nn, optim
from cupybnn.autograd import Tensor, no_grad
from cupybnn.backends.devices import CPU, to_device
from cupybnn.data import BatchOrder, DeviceData
from cupybnn.parallel import Ranks
from cupybnn.training.config import TrainConfig
from cupybnn.training.images import TrainingImages
from cupybnn.training.step import Objective

__all__ = ["Averaging", "evaluate", "right_answers", "right_by_class"]

#: Training examples for the batch norm statistics of averaged weights: of all batches, about, and
#: of each, at least.
_EXAMPLES, _BATCH = 10_000, 1000
#: Limit on the inputs of one evaluation batch, in bytes.
_BATCH_BYTES = 1 << 28


def evaluate(
    model: nn.Module, objective: Objective, data: DeviceData, ranks: Ranks
) -> tuple[float, float]:
    """Return loss (with the penalty) and accuracy over the whole test set, a part on each rank.

    Both are NaN if the test set is empty.
    """
    if len(data.test_labels) == 0:
        return float("nan"), float("nan")
    size = _batch_size(data)
    count = len(data.test_labels)
    first, last = (r * count // ranks.size for r in (ranks.rank, ranks.rank + 1))
    loss: Any = 0.0
    right = 0
    model.eval()
    with no_grad():
        for inputs, labels in data.test_batches(size, first, last):
            logits = model(Tensor(inputs))
            loss = loss + objective.loss(logits, labels).data * len(labels)
            right += right_answers(logits.data, labels)
        penalty = objective.penalty()
    total = float(loss)
    if ranks.size > 1:
        sums = ranks.sums([total, right])
        total, right = float(sums[0]), int(sums[1])
    return total / count + (0.0 if penalty is None else penalty.item()), right / count


def _batch_size(data: DeviceData) -> int:
    """Return how many images are evaluated at a time."""
    # On the CPU a batch's activations should fit into the cache; on a GPU, fewer launches matter.
    # Inputs with many features must still fit into memory.
    size = 10_000 if data.device.kind == "cuda" else 1_000
    return min(size, max(1, _BATCH_BYTES // (data.features * data.dtype.itemsize)))


def right_answers(logits: Any, labels: Any) -> int:
    """Return for how many rows of `logits` the greatest one is that of the label."""
    # Counted on the host: for a sum over a whole array CuPy compiles for three seconds.
    return int(np.count_nonzero(to_device(logits.argmax(axis=1) == labels, CPU)))


def right_by_class(model: nn.Module, data: DeviceData) -> tuple[np.ndarray, np.ndarray]:
    """Return how many test images of each class a model is right about, and how many there are.

    Both int64, of shape (classes,).
    """
    right = np.zeros(data.classes, np.int64)
    count = np.zeros_like(right)
    model.eval()
    with no_grad():
        for inputs, labels in data.test_batches(_batch_size(data)):
            found = to_device(model(Tensor(inputs)).data.argmax(axis=1), CPU)
            true = to_device(labels, CPU)
            right += np.bincount(true[found == true], minlength=len(right))
            count += np.bincount(true, minlength=len(count))
    return right, count


class Averaging:
    """The average of a model's weights over training, if the configuration asks for one.

    Parameters
    ----------
    model : Module
    data : DeviceData
    order : BatchOrder
        Batch norm's statistics are computed from the images of the first steps.
    config : TrainConfig
        Its fields `average`, `average_decay` and `average_from`, and those of `TrainingImages`:
        these images are what training makes of them, but not moved against the network.
    """

    def __init__(
        self, model: nn.Module, data: DeviceData, order: BatchOrder, config: TrainConfig
    ) -> None:
        self._model, self._data, self._order = model, data, order
        self._images = TrainingImages(data, order, config)
        self._from = config.average_from
        self._average: optim.WeightAverage | None = None
        self._before: list[Any] = []  # within `applied`: the statistics that training left
        # Number of updates of the average, and the statistics computed after them.
        self._cached: tuple[int, list[Any]] = (0, [])
        if config.average != "none":
            decay = config.average_decay if config.average == "ema" else None
            self._average = optim.WeightAverage(model.parameters(), decay)

    @property
    def exists(self) -> bool:
        """Whether there is an average for `applied` to put into the model."""
        return self._average is not None and self._average.updates > 0

    def statistics(self) -> dict[str, np.ndarray]:
        """Return batch norm's statistics for the averaged weights by name; {} if no average."""
        if self._average is None or self._average.updates == 0:
            return {}
        updates, cached = self._cached
        if updates != self._average.updates:
            with self.suspended(), self.applied():
                _, cached = self._cached
        names = [name for name, _ in self._model.named_buffers()]
        return {n: np.array(to_device(a, CPU)) for n, a in zip(names, cached, strict=True)}

    def wants(self, step: int) -> bool:
        """Whether `update` will read the weights after step number `step`."""
        return self._average is not None and step >= self._from

    def update(self, step: int) -> None:
        """Add the weights after step number `step` to the average."""
        if self._average is not None and step >= self._from:
            self._average.update()

    @property
    def is_applied(self) -> bool:
        """Whether the model currently has averaged weights, that is, within `applied`."""
        return self._average is not None and self._average.is_applied

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the model has averaged weights and matching batch norm statistics.

        Does nothing if there is no average yet, or if nested. Weights and statistics are restored
        at the end, also after an error.
        """
        if self._average is None or self._average.updates == 0 or self._average.is_applied:
            yield
            return
        before = self._statistics()
        with self._average.applied():
            try:
                self._before = before
                nn.refresh_statistics(self._model, self._batches())
                self._cached = (self._average.updates, self._statistics())
                yield
            finally:
                self._set_statistics(before)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Context within `applied` in which the model temporarily is as training left it."""
        if self._average is None or not self._average.is_applied:
            yield
            return
        averaged = self._statistics()
        with self._average.suspended():
            try:
                self._set_statistics(self._before)
                yield
            finally:
                self._set_statistics(averaged)

    def _statistics(self) -> list[Any]:
        return [array.copy() for _, array in self._model.named_buffers()]

    def _set_statistics(self, values: list[Any]) -> None:
        for (_, array), value in zip(self._model.named_buffers(), values, strict=True):
            array[...] = value

    def _batches(self) -> Iterator[Tensor]:
        """Yield the first steps' images as training makes them, those of several at a time."""
        order, xp = self._order, self._data.device.xp
        steps = -(-_BATCH // order.batch_size)  # of a batch
        for number in range(max(min(_EXAMPLES, order.images) // (steps * order.batch_size), 1)):
            first = number * steps
            indices = xp.concatenate([order.indices(first + i) for i in range(steps)])
            yield Tensor(self._images.of(indices, number)[0])

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the average's state; empty if there is none."""
        return {} if self._average is None else self._average.state_dict()

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from what `state_dict` returned; ValueError if it does not fit."""
        if self._average is not None:
            self._average.load_state_dict(state)
            self._cached = (0, [])

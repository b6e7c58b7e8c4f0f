"""The images of a training step: moved among their neighbors, deformed, mixed."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from cupybnn.backends.random import from_row
from cupybnn.data import Augmentation, BatchOrder, DeviceData, Mixing, NeighborNoise
from cupybnn.training.config import TrainConfig

__all__ = [
    "DIRECTIONS",
    "MIXING",
    "NEIGHBOR_NOISE",
    "TrainingImages",
    "augmentation",
    "augmentation_seed",
    "stream_seed",
]

#: What the random numbers of a step other than deformations are for; see `stream_seed`.
MIXING, DIRECTIONS, NEIGHBOR_NOISE = 0x313, 0x7A7, 0x4E1


def augmentation(config: TrainConfig) -> Augmentation:
    """Return the deformations that `config` describes."""
    names = [field.name for field in fields(Augmentation)]
    return Augmentation(**{name: getattr(config, f"augment_{name}") for name in names})


def augmentation_seed(config: TrainConfig) -> int:
    """Return the seed that, with the step, determines each deformation; no checkpoint stores it."""
    return stream_seed(config, 0xA6)


def stream_seed(config: TrainConfig, purpose: int) -> int:
    """Return the seed that, with the step, determines random numbers for one purpose."""
    return int(np.random.default_rng([config.seed, purpose]).integers(2**63))


class TrainingImages:
    """The images that a network learns in each step, and what it is to learn of them.

    They are moved among their neighbors, then deformed, then mixed.

    Parameters
    ----------
    data : DeviceData
    order : BatchOrder
    config : TrainConfig
        Its fields `neighbor_noise`, `neighbors`, `augment_...`, `mix` and `seed`.
    rows : slice, optional
        The part of each batch that is wanted, which `cupybnn.backends.random.from_row` must know;
        by default all.
    """

    def __init__(
        self, data: DeviceData, order: BatchOrder, config: TrainConfig, rows: slice | None = None
    ) -> None:
        self._data, self._order = data, order
        rows = slice(0, order.batch_size) if rows is None else rows
        self._first, self._count = rows.start, rows.stop - rows.start
        self._noise, self._neighbors = NeighborNoise(config.neighbor_noise), config.neighbors
        self._augment, self._mixing = augmentation(config), Mixing(config.mix)
        self._noise_seed = stream_seed(config, NEIGHBOR_NOISE)
        self._augment_seed = augmentation_seed(config)
        self._mixing_seed = stream_seed(config, MIXING)
        # The last image of a part is mixed with the first one of the next.
        self._further = int(bool(self._mixing) and self._count < order.batch_size)

    def __call__(self, step: int) -> tuple[Any, Any, Any]:
        """Return the images of a step.

        Returns
        -------
        inputs : array, shape (rows, features)
        labels : array of int64, shape (rows,)
            Of mixed images, those of which they have most.
        targets : array
            The labels; where images are mixed, the classes' shares, shape (rows, classes).
        """
        indices = self._order.indices(step, self._first, self._count + self._further)
        return self.of(indices[: self._count], step, indices[self._count :])

    def of(self, indices: Any, number: int, following: Any = None) -> tuple[Any, Any, Any]:
        """Return images as those of step `number`, whichever they are; see `__call__`.

        `following` is the index of the image after the last, if that is another part's.
        """
        inputs, labels = self._unmixed(indices, number)
        if not self._mixing:
            return inputs, labels, labels
        xp = self._data.device.xp
        shares = self._mixing.shares(len(inputs), self._mixing_seed, number, xp)
        one_hot, next_input, next_one_hot = self._one_hot(labels, inputs.dtype), None, None
        if self._further:
            with from_row((self._first + self._count) % self._order.batch_size):
                next_input, next_label = self._unmixed(following, number)
            next_one_hot = self._one_hot(next_label, inputs.dtype)
        inputs = self._mixing.mix(inputs, shares, next_input)
        return inputs, labels, self._mixing.mix(one_hot, shares, next_one_hot)

    def _unmixed(self, indices: Any, number: int) -> tuple[Any, Any]:
        data = self._data
        if self._noise:
            pixels = {} if data.pixel_scale is None else {"brightest": data.brightest}
            table = data.nearest_neighbors(self._neighbors)
            images = self._noise(
                data.train_images, table, indices, seed=self._noise_seed, number=number, **pixels
            )
            inputs, labels = data.scale(images), data.train_labels[indices]
        else:
            inputs, labels = data.batch(indices)
        return self._augment(inputs, data.image_shape, self._augment_seed, number), labels

    def _one_hot(self, labels: Any, dtype: Any) -> Any:
        return (labels[:, None] == self._data.device.xp.arange(self._data.classes)).astype(dtype)

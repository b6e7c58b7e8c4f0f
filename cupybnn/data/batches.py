"""Batches: the examples of each training step, and gathering them on the device."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np

from cupybnn import backends
from cupybnn.backends.devices import Device, to_device
from cupybnn.backends.order import MOST_IMAGES, Order
from cupybnn.data.arrays import check_finite
from cupybnn.data.dataset import Dataset
from cupybnn.data.neighbors import nearest_neighbors

__all__ = ["BatchOrder", "DeviceData", "epoch_length"]

#: Greatest length of an epoch, in examples of positive weight.
_MOST_REPEATS = 16
#: Images that `BatchOrder.indices` computes at a time, at most.
_AHEAD = 1 << 14


def epoch_length(weights: np.ndarray) -> int:
    """Return the number of examples that an epoch draws from weighted ones: the sum of the weights.

    That is rounded, and scaled where it would be less than the number of examples of positive
    weight, or more than 16 times as many.

    Parameters
    ----------
    weights : ndarray, shape (examples,)
        Finite, at least 0, not all 0.
    """
    positive = int(np.count_nonzero(weights))
    total = float(weights.sum(dtype=np.float64))
    return round(min(max(total, positive), _MOST_REPEATS * positive))


class BatchOrder:
    """The order of the training images: a new permutation in every epoch.

    The stream of images is epoch 0's permutation, then epoch 1's, and so on; step s takes images
    ``s * batch_size`` to ``(s + 1) * batch_size`` of the stream, so a batch may span two epochs
    and every image is used equally often. A function of seed, epoch and position computes each
    image (`cupybnn.backends.order`): a batch does not depend on earlier ones, and the position to
    save in a checkpoint is the step.

    An image of weight w occurs in each epoch as often as w copies of it would: floor(w) or ceil(w)
    times, w times on average (systematic sampling), where w is scaled so that the weights sum to
    `epoch_length`. With integer weights, training is then the same, bit for bit, as with an image
    repeated instead of weighted, and the statistics of batch norm are weighted, too. Noise among
    neighbors is the exception, because copies of an image are its neighbors.

    Parameters
    ----------
    images : int
        Number of training images.
    batch_size : int
    seed : int
        Not negative.
    device : Device
        Device of the indices.
    weights : ndarray of float64, shape (images,), optional
        Weight of each image, at least 0, not all 0; by default, 1.
    shuffle : bool
        Whether to permute the images of each epoch.

    Attributes
    ----------
    images : int
        Number of images in an epoch.

    Raises
    ------
    ValueError
        If there are more than 2**31 - 1 images, or as many in an epoch.

    Examples
    --------
    >>> from cupybnn.backends.devices import CPU
    >>> from cupybnn.data import BatchOrder
    >>> order = BatchOrder(images=6, batch_size=4, seed=0, device=CPU)
    >>> len(order.indices(0)), sorted(order.permutation(1).tolist())
    (4, [0, 1, 2, 3, 4, 5])
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        seed: int,
        device: Device,
        weights: np.ndarray | None = None,
        shuffle: bool = True,
    ) -> None:
        self.images = images if weights is None else epoch_length(weights)
        if max(images, self.images) > MOST_IMAGES:
            raise ValueError(
                f"The 'images' of BatchOrder, and those of an epoch, must be at most "
                f"{MOST_IMAGES:,}; got {max(images, self.images):,}. Train on a part of them."
            )
        self.batch_size = batch_size
        self.device = device
        ends, last = None, 0
        if weights is not None:
            scale = self.images / weights.sum(dtype=np.float64)  # 1 for integer weights
            ends = to_device(np.cumsum(weights, dtype=np.float64) * scale, device)
            last = int(np.flatnonzero(weights)[-1])
        # 0xBA7C4 separates this stream from others with the same seed.
        key = int(np.random.default_rng([seed, 0xBA7C4]).integers(2**63))
        self._order = Order(self.images, key, shuffle, ends, last)
        self._ahead: tuple[int, Any, Any] = 0, None, ()  # first step, part of the batch, images

    def permutation(self, epoch: int) -> Any:
        """Return the images of an epoch in their order: int32, shape (images,), on the device."""
        out = self.device.xp.empty((1, self.images), np.int32)
        self._fill(out, epoch, self.images, 0)
        return out[0]

    def indices(self, step: int, first: int = 0, count: int | None = None) -> Any:
        """Return the images of a step: int32, shape (count,), on the device.

        Parameters
        ----------
        step : int
        first : int
            Place in the batch of the first one.
        count : int, optional
            By default, all of the batch. After its last image comes its first.
        """
        count = self.batch_size if count is None else count
        start, part, table = self._ahead
        if part != (first, count) or not start <= step < start + len(table):
            # As steps follow each other, more and more at a time: each operation of NumPy, and each
            # launch, takes a while even for one image.
            follows = part == (first, count) and step == start + len(table)
            most = max(1, _AHEAD // max(count, 1))
            steps = min(2 * len(table), most) if follows else 1
            start, table = step, self.device.xp.empty((steps, count), np.int32)
            self.write(table, step, first)
            self._ahead = start, (first, count), table
        return table[step - start]

    def write(self, out: Any, step: int, first: int = 0) -> None:
        """Write the images of the steps from `step` on into the rows of `out`; see `indices`.

        Parameters
        ----------
        out : array of int32, shape (steps, count)
            On the device.
        step, first : int
        """
        self._fill(out, step, self.batch_size, first)

    def _fill(self, out: Any, step: int, batch: int, first: int) -> None:
        backends.get(self.device).fill_order(self._order, step, batch, first, out)


class DeviceData:
    """A data set on a device: pixels stay bytes and are converted to floats one batch at a time.

    Float features are kept in the dtype of the network's input.

    Parameters
    ----------
    dataset : Dataset
    device : Device
    dtype : str or dtype
        Floating dtype of the network's input.

    Attributes
    ----------
    train_images, test_images : array of uint8 or `dtype`, shape (examples, features)
    train_labels, test_labels : array of int64, shape (examples,)
    image_shape : tuple of int or None
        (height, width), if the features are the pixels of an image.
    pixel_scale : floating or None
        Factor from pixels to the network's input; None for float features, which are used
        unchanged.

    Raises
    ------
    ValueError
        If a feature is too large for `dtype`.

    Examples
    --------
    >>> from cupybnn.backends.devices import CPU
    >>> from cupybnn.data import DeviceData, load
    >>> data = DeviceData(load("digits"), CPU)
    >>> data.scale(data.test_images[:2]).max() <= 1
    np.True_
    >>> data.image_shape
    (8, 8)
    """

    def __init__(self, dataset: Dataset, device: Device, dtype: Any = np.float32) -> None:
        self.device = device
        self.dtype = np.dtype(dtype)
        self.features = dataset.features
        self.image_shape = dataset.image_shape
        self.classes = dataset.classes
        self.train_images = self._to_device(dataset.train_images)
        self.train_labels = to_device(dataset.train_labels.astype(np.int64), device)
        self.test_images = self._to_device(dataset.test_images)
        self.test_labels = to_device(dataset.test_labels.astype(np.int64), device)
        self.pixel_scale: Any = None
        if dataset.pixel_max is not None:
            self.pixel_scale = self.dtype.type(1.0 / dataset.pixel_max)
        self._dataset = dataset
        self._neighbors: dict[int, Any] = {}

    def _to_device(self, images: np.ndarray) -> Any:
        if images.dtype.kind == "f" and images.dtype != self.dtype:
            with np.errstate(over="ignore"):  # check_finite below names the example
                images = images.astype(self.dtype)
            check_finite(f"features of a network of {self.dtype}", images)
        return to_device(images, self.device)

    def __repr__(self) -> str:
        return (
            f"DeviceData(train={len(self.train_labels)}, test={len(self.test_labels)}, "
            f"shape={self.image_shape or (self.features,)}, dtype={self.train_images.dtype}, "
            f"classes={self.classes}, device={str(self.device)!r})"
        )

    def scale(self, images: Any) -> Any:
        """Turn rows of `train_images` or `test_images` into the network's input.

        Pixels become ``images / pixel_max``, numbers from 0 to 1; floats are returned unchanged.
        """
        if self.pixel_scale is None:
            return images
        # An 8-bit pixel times the factor, in one pass and without float64.
        return self.device.xp.multiply(images, self.pixel_scale, dtype=self.dtype)

    def batch(self, indices: Any) -> tuple[Any, Any]:
        """Gather training examples by index.

        Returns
        -------
        inputs : array of `dtype`, shape (batch, features)
        labels : array of int64, shape (batch,)
        """
        return self.scale(self.train_images[indices]), self.train_labels[indices]

    @cached_property
    def brightest(self) -> int:
        """The greatest pixel: that of full brightness, or of the training images if greater."""
        if self._dataset.pixel_max is None:
            raise TypeError("Float features have no brightest pixel.")
        most = math.ceil(self._dataset.pixel_max)
        return max(min(most, 255), int(self._dataset.train_images.max()))

    def nearest_neighbors(self, count: int) -> Any:
        """Return the nearest neighbors of each training example, of those of positive weight.

        They are found at the first call, and kept. See `cupybnn.data.nearest_neighbors`.
        """
        if count not in self._neighbors:
            weights = self._dataset.train_weights
            among = None if weights is None else np.flatnonzero(weights)
            self._neighbors[count] = nearest_neighbors(self.train_images, count, among)
        return self._neighbors[count]

    def test_batches(self, size: int, first: int = 0, last: int | None = None) -> Any:
        """Yield (inputs, labels) over the test set, `size` examples at a time.

        With `first` and `last`, over the examples from the one to before the other.
        """
        last = len(self.test_labels) if last is None else last
        for start in range(first, last, size):
            stop = min(start + size, last)
            yield self.scale(self.test_images[start:stop]), self.test_labels[start:stop]

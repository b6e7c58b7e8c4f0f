"""Random deformations of images, on the device of the images."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from cupybnn.autograd.storage import module_of
from cupybnn.backends.random import uniform

__all__ = ["Augmentation", "bump_width", "count_knots", "sample"]

#: Elastic deformations are smooth over this share of an image: 4 pixels of 28.
_SMOOTH = 1 / 7


@dataclass(frozen=True)
class Augmentation:
    """Deform each image of a batch independently.

    The image is mirrored, scaled, sheared and rotated about its center, displaced elastically and
    shifted, in a single bilinear sampling; pixels outside the image are 0. An amount of 0 turns a
    deformation off.

    Attributes
    ----------
    shift : float
        Pixels: rows and columns are shifted by amounts uniform in [-shift, shift].
    rotation : float
        Degrees: the angle is uniform in [-rotation, rotation].
    scale : float
        In [0, 1): height and width are scaled by independent factors, uniform in
        [1 - scale, 1 + scale].
    shear : float
        Columns are shifted by the distance in rows to the center times a factor, uniform in
        [-shear, shear].
    elastic : float
        Pixels: standard deviation of the displacements of an elastic deformation, a smooth random
        field.
    flip : bool
        Whether half of the images are mirrored, left to right.

    Raises
    ------
    ValueError
        If a value is negative or not finite, or the scale is not below 1.

    Notes
    -----
    Simard, Steinkraus, Platt: Best practices for convolutional neural networks applied to visual
    document analysis, ICDAR 2003. Here the elastic field is a sum of Gaussian bumps on a coarse
    grid, as wide as the grid spacing (4 pixels of 28, the best width in that paper), rather than
    smoothed per-pixel noise: the same fields with a fifth of the random numbers.

    Examples
    --------
    >>> from cupybnn.data import Augmentation
    >>> Augmentation(shift=2.0, rotation=10.0)
    Augmentation(shift=2.0, rotation=10.0, scale=0.0, shear=0.0, elastic=0.0, flip=False)
    """

    shift: float = 0.0
    rotation: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    elastic: float = 0.0
    flip: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            limit = 1.0 if field.name == "scale" else math.inf
            if not 0 <= value < limit:
                rule = "in [0, 1)" if field.name == "scale" else "finite and at least 0"
                raise ValueError(
                    f"The {field.name!r} of an Augmentation must be {rule}; got {value!r}."
                )

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) > 0 for field in fields(self))

    def check(self, shape: tuple[int, ...] | None) -> None:
        """Raise ValueError if there is something to deform but `shape` is None: no images."""
        if self and shape is None:
            amounts = ", ".join(f.name for f in fields(self) if getattr(self, f.name))
            raise ValueError(
                f"An Augmentation needs images, arrays of shape (examples, height, width); got "
                f"features that are not images. Leave out the {amounts}."
            )

    def __call__(self, images: Any, shape: tuple[int, int] | None, seed: int, number: int) -> Any:
        """Return deformed images.

        Parameters
        ----------
        images : array of floating dtype, shape (batch, height * width)
        shape : tuple of int or None
            (height, width); None if the features are not an image.
        seed : int
            From 0 to 2**64 - 1.
        number : int
            Number of the batch: the same `seed` and `number` always give the same deformations.

        Returns
        -------
        array of the dtype of `images`, shape (batch, height * width)

        Raises
        ------
        ValueError
            If `shape` is None and there is something to deform.
        """
        self.check(shape)
        if not self or shape is None or not len(images):
            return images
        rows, columns = self.coordinates(len(images), shape, seed, number, module_of(images))
        return sample(images.reshape(-1, *shape), rows, columns).reshape(images.shape)

    def coordinates(
        self, batch: int, shape: tuple[int, int], seed: int, number: int, xp: Any
    ) -> tuple[Any, Any]:
        """Return the position in the original image from which each result pixel is sampled.

        Returns
        -------
        rows, columns : array of float32, shape (batch, height, width)
        """
        height, width = shape
        # Eight numbers per image, in [-1, 1), two blocks of the generator; each has a fixed use,
        # whichever deformations are on. The last has none.
        draw = 2 * uniform((batch, 8, 1, 1), seed, 2 * number, xp) - 1
        angle = draw[:, 0] * np.float32(math.radians(self.rotation))
        tall, wide = 1 + self.scale * draw[:, 1], 1 + self.scale * draw[:, 2]
        shear, down, right = self.shear * draw[:, 3], self.shift * draw[:, 4], draw[:, 5]
        right = right * self.shift
        y = xp.arange(height, dtype=np.float32)[:, None] - np.float32((height - 1) / 2) - down
        x = xp.arange(width, dtype=np.float32) - np.float32((width - 1) / 2) - right
        # Map (y, x) from the result back to the image: undo rotation, shear and scale in turn.
        cos, sin = xp.cos(angle), xp.sin(angle)
        y, x = cos * y + sin * x, cos * x - sin * y
        x = x - shear * y
        y, x = y / tall, x / wide
        if self.flip:
            x = xp.where(draw[:, 6] < 0, -x, x)
        y, x = y + np.float32((height - 1) / 2), x + np.float32((width - 1) / 2)
        if self.elastic > 0:
            field = self._field(batch, shape, seed, 2 * number + 1, xp)
            y, x = y + field[:, 0], x + field[:, 1]
        return y, x

    def _field(self, batch: int, shape: tuple[int, int], seed: int, counter: int, xp: Any) -> Any:
        """Return smooth random displacements, float32 of shape (batch, 2, height, width)."""
        down, right = (xp.asarray(_bumps(size)) for size in shape)
        knots = tuple(count_knots(size) for size in shape)
        # Uniform noise of variance 1.
        noise = (2 * uniform((batch, 2, *knots), seed, counter, xp) - 1) * np.float32(math.sqrt(3))
        return xp.matmul(xp.matmul(down * np.float32(self.elastic), noise), right.T)


def bump_width(size: int) -> float:
    """Return the width of an elastic field's bumps, and their distance, along an axis."""
    return max(size * _SMOOTH, 1.0)


def count_knots(size: int) -> int:
    """Return the number of an elastic field's bumps along an axis; two begin before the image."""
    return math.ceil(size / bump_width(size)) + 5


def _bumps(size: int) -> np.ndarray:
    """Return Gaussian bumps, shape (size, knots), each row of unit norm."""
    width = bump_width(size)
    knots = width * (np.arange(count_knots(size)) - 2)
    bumps = np.exp(-(((np.arange(size)[:, None] - knots) / width) ** 2) / 2)
    bumps /= np.sqrt((bumps**2).sum(axis=1, keepdims=True))
    return np.ascontiguousarray(bumps, np.float32)


def sample(images: Any, rows: Any, columns: Any) -> Any:
    """Sample images at fractional positions: bilinear, with 0 outside.

    Parameters
    ----------
    images : array of floating dtype, shape (batch, height, width)
    rows, columns : array of floating dtype, shape (batch, ...)
        Positions in the image of the same index; integers are pixel centers.

    Returns
    -------
    array of the dtype of `images`, shape (batch, ...)
    """
    xp = module_of(images)
    batch, height, width = images.shape
    # Pad with a border of zeros; all positions outside are clamped to it.
    framed = xp.zeros((batch, height + 3, width + 3), images.dtype)
    framed[:, 1:-2, 1:-2] = images
    flat = framed.reshape(-1)
    # NaN, from extreme settings, is clamped too: fmax returns the other operand.
    y = xp.fmin(xp.fmax(rows + 1, 0), height + 1)
    x = xp.fmin(xp.fmax(columns + 1, 0), width + 1)
    top, left = xp.floor(y), xp.floor(x)
    down, right = (y - top).astype(images.dtype), (x - left).astype(images.dtype)
    each = (batch,) + (1,) * (rows.ndim - 1)
    index = xp.arange(batch, dtype=np.int64).reshape(each) * ((height + 3) * (width + 3))
    index = index + top.astype(np.int64) * (width + 3) + left.astype(np.int64)

    def across(first: Any) -> Any:
        """Interpolate between two neighbors in a row."""
        value = flat.take(first)
        return value + right * (flat.take(first + 1) - value)

    above = across(index)
    return above + down * (across(index + (width + 3)) - above)

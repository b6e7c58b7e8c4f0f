"""Random deformations of images, on the device that the images are on."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from cupybnn.autograd.storage import module_of
from cupybnn.backends.random import uniform

__all__ = ["Augmentation", "sample"]

#: Elastic deformations are smooth over this share of an image: 4 pixels of 28.
_SMOOTH = 1 / 7


@dataclass(frozen=True)
class Augmentation:
    """Deforms each image of a batch in its own way.

    The image is scaled, sheared and rotated about its centre, displaced elastically and shifted,
    all in one bilinear sampling; pixels from outside the image are 0. An amount of 0 turns a
    deformation off.

    Attributes
    ----------
    shift : float
        Pixels: rows and columns are moved by numbers uniform in [-shift, shift].
    rotation : float
        Degrees: the angle is uniform in [-rotation, rotation].
    scale : float
        In [0, 1): height and width grow by factors of their own, uniform in
        [1 - scale, 1 + scale].
    shear : float
        Columns are moved by a share of the distance in rows to the centre, uniform in
        [-shear, shear].
    elastic : float
        Pixels: standard deviation of the displacements of an elastic deformation, a smooth random
        field.

    Raises
    ------
    ValueError
        If a number is not finite, negative, or a scale not below 1.

    Notes
    -----
    Simard, Steinkraus, Platt: Best practices for convolutional neural networks applied to visual
    document analysis, ICDAR 2003. Here the elastic field is a sum of Gaussian bumps on a coarse
    grid, as wide as the grid's spacing (4 pixels of 28, that paper's best width), and not noise at
    every pixel that is smoothed afterwards: the same fields, for a fifth of the random numbers.
    """

    shift: float = 0.0
    rotation: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    elastic: float = 0.0

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
        """Raise ValueError if features of `shape`, None for no image, would have to be deformed."""
        if self and shape is None:
            amounts = ", ".join(f.name for f in fields(self) if getattr(self, f.name))
            raise ValueError(
                f"An Augmentation must be given images, arrays of shape (examples, height, width); "
                f"got features that are no image. Leave out the {amounts}."
            )

    def __call__(self, images: Any, shape: tuple[int, int] | None, seed: int, number: int) -> Any:
        """Return deformed images.

        Parameters
        ----------
        images : array of floating dtype, shape (batch, height * width)
        shape : tuple of int or None
            (height, width); None if the features are no image.
        seed : int
            From 0 to 2**64 - 1.
        number : int
            Number of the batch: the same `seed` and `number` always deform in the same way.

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
        """Return where in the original image each pixel of the result is taken from.

        Returns
        -------
        rows, columns : array of float32, shape (batch, height, width)
        """
        height, width = shape
        # Six numbers an image, in [-1, 1); each has its use whether the others are on or not.
        draw = 2 * uniform((batch, 6, 1, 1), seed, 2 * number, xp) - 1
        angle = draw[:, 0] * np.float32(math.radians(self.rotation))
        tall, wide = 1 + self.scale * draw[:, 1], 1 + self.scale * draw[:, 2]
        shear, down, right = self.shear * draw[:, 3], self.shift * draw[:, 4], draw[:, 5]
        right = right * self.shift
        y = xp.arange(height, dtype=np.float32)[:, None] - np.float32((height - 1) / 2) - down
        x = xp.arange(width, dtype=np.float32) - np.float32((width - 1) / 2) - right
        # (y, x) back from the result to the image: rotation, shear and scale are undone in turn.
        cos, sin = xp.cos(angle), xp.sin(angle)
        y, x = cos * y + sin * x, cos * x - sin * y
        x = x - shear * y
        y, x = y / tall + np.float32((height - 1) / 2), x / wide + np.float32((width - 1) / 2)
        if self.elastic > 0:
            field = self._field(batch, shape, seed, 2 * number + 1, xp)
            y, x = y + field[:, 0], x + field[:, 1]
        return y, x

    def _field(self, batch: int, shape: tuple[int, int], seed: int, counter: int, xp: Any) -> Any:
        """Return smooth random displacements, float32 of shape (batch, 2, height, width)."""
        down, right = (xp.asarray(_bumps(size)) for size in shape)
        knots = (len(down.T), len(right.T))
        # Uniform numbers of variance 1.
        noise = (2 * uniform((batch, 2, *knots), seed, counter, xp) - 1) * np.float32(math.sqrt(3))
        return xp.matmul(xp.matmul(down * np.float32(self.elastic), noise), right.T)


def _bumps(size: int) -> np.ndarray:
    """Return the heights of Gaussian bumps, shape (size, knots), squares summing to 1 in a row."""
    width = max(size * _SMOOTH, 1.0)
    knots = width * np.arange(-2, math.ceil(size / width) + 3)
    bumps = np.exp(-(((np.arange(size)[:, None] - knots) / width) ** 2) / 2)
    bumps /= np.sqrt((bumps**2).sum(axis=1, keepdims=True))
    return np.ascontiguousarray(bumps, np.float32)


def sample(images: Any, rows: Any, columns: Any) -> Any:
    """Look images up at fractional positions: bilinear, with 0 outside.

    Parameters
    ----------
    images : array of floating dtype, shape (batch, height, width)
    rows, columns : array of floating dtype, shape (batch, ...)
        Positions in the image of the same number; whole ones are the middles of pixels.

    Returns
    -------
    array of the dtype of `images`, shape (batch, ...)
    """
    xp = module_of(images)
    batch, height, width = images.shape
    # A frame of zeros on each side, into which all positions outside are brought.
    framed = xp.zeros((batch, height + 3, width + 3), images.dtype)
    framed[:, 1:-2, 1:-2] = images
    flat = framed.reshape(-1)
    y, x = xp.clip(rows + 1, 0, height + 1), xp.clip(columns + 1, 0, width + 1)
    top, left = xp.floor(y), xp.floor(x)
    down, right = (y - top).astype(images.dtype), (x - left).astype(images.dtype)
    each = (batch,) + (1,) * (rows.ndim - 1)
    index = xp.arange(batch, dtype=np.int64).reshape(each) * ((height + 3) * (width + 3))
    index = index + top.astype(np.int64) * (width + 3) + left.astype(np.int64)

    def across(first: Any) -> Any:
        """Interpolate between two neighbours in a row."""
        value = flat.take(first)
        return value + right * (flat.take(first + 1) - value)

    above = across(index)
    return above + down * (across(index + (width + 3)) - above)

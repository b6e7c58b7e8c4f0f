"""Files with images, as a network takes them: PNG, JPEG, .npy and IDX."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import IO

import numpy as np

from cupybnn.deploy.decoding import Gray, content, name_of
from cupybnn.deploy.inputs import InputSpec
from cupybnn.deploy.pictures import INVERT, Picture, prepare
from cupybnn.errors import DataError, SettingError

__all__ = ["Images", "read_image", "read_images"]


@dataclass(frozen=True, eq=False)
class Images:
    """The images of one file.

    Attributes
    ----------
    inputs : ndarray, shape (images, ...)
        As `PackedNetwork` takes them.
    pictures : list of Picture
        What was done to each image; empty where the file has arrays that the network takes as they
        are.
    single : bool
        Whether the file holds one image rather than an array of them.
    """

    inputs: np.ndarray
    pictures: list[Picture]
    single: bool


def read_image(
    file: str | os.PathLike[str] | IO[bytes],
    shape: tuple[int, int] = (28, 28),
    *,
    pixel_max: float = 255,
    invert: str = "auto",
) -> np.ndarray:
    """Read one picture as a network wants it: gray, light ink on dark, scaled and centered.

    Parameters
    ----------
    file : path-like or binary file
        PNG or JPEG (with Pillow, the extra ``images``) or a .npy of one picture; gray or color, of
        any size. An open file is read from its beginning.
    shape : tuple of int
        (height, width) of the network's images: ``net.inputs.image_shape``.
    pixel_max : float
        Its pixel for full brightness: ``net.inputs.pixel_max``.
    invert : {"auto", "yes", "no"}
        Whether the picture is dark ink on light paper; "auto": its border decides.

    Returns
    -------
    ndarray of whole numbers, shape `shape`

    Raises
    ------
    DataError
        If the file cannot be read, is none of these, is damaged, empty, or holds several images.
    SettingError
        If Pillow is needed and missing, or `invert` is none of the three.

    Examples
    --------
    >>> import io
    >>> import numpy as np
    >>> drawn = np.full((60, 40), 255, np.uint8)  # white paper
    >>> drawn[10:50, 18:22] = 0  # a black stroke
    >>> file = io.BytesIO()
    >>> np.save(file, drawn)
    >>> image = read_image(file)
    >>> image.shape, int(image[0, 0]), int(image.max())
    ((28, 28), 0, 255)
    """
    spec = InputSpec(math.prod(shape), tuple(shape), pixel_max)
    found = read_images(file, spec, invert, as_they_are=False)
    if len(found.pictures) != 1:
        raise DataError(
            f"{name_of(file)} must hold one picture; got {len(found.pictures)}. Read all of them "
            f"with numpy.load or cupybnn.data."
        )
    return found.pictures[0].pixels


def read_images(
    file: str | os.PathLike[str] | IO[bytes],
    spec: InputSpec,
    invert: str = "auto",
    *,
    as_they_are: bool = True,
) -> Images:
    """Read all images of a file as the inputs of a network.

    Parameters
    ----------
    file : path-like or binary file
        PNG, JPEG, .npy or IDX, the last also gzipped; the content decides, not the name.
    spec : InputSpec
        What the network takes.
    invert : {"auto", "yes", "no"}
        See `read_image`.
    as_they_are : bool
        Take arrays that have the network's shape as they are, unless `invert` is "yes".

    Raises
    ------
    DataError
        If the file cannot be read, is none of these, or is damaged, or an image is empty.
    SettingError
        If Pillow is needed and missing, `invert` is none of the three, or the network does not take
        images and the file is a picture.
    """
    if invert not in INVERT:
        raise SettingError(f"The 'invert' must be one of {', '.join(INVERT)}; got {invert!r}.")
    name, found = name_of(file), content(file)
    if isinstance(found, tuple):
        return _prepared([found], _image_shape(spec, name), spec, invert, name, single=True)
    return _from_array(found, spec, invert, name, as_they_are)


def _image_shape(spec: InputSpec, name: str) -> tuple[int, int]:
    """Return (height, width) of the network's images, if pictures can be made such."""
    if spec.image_shape is None or len(spec.image_shape) != 2:
        raise SettingError(
            f"The network must take images of one height and width to read {name}; it takes "
            f"{spec.features} numbers of shape {spec.image_shape or (spec.features,)}. Give a .npy "
            f"with them, or the 'image_shape' when packing the network."
        )
    if spec.pixel_max is None:
        raise SettingError(
            f"The network must take pixels to read {name}, but it was trained on floating numbers. "
            f"Give a .npy with such numbers, or the 'pixel_max' when packing the network."
        )
    height, width = spec.image_shape
    return height, width


def _prepared(
    decoded: list[Gray],
    shape: tuple[int, int],
    spec: InputSpec,
    invert: str,
    name: str,
    single: bool,
) -> Images:
    assert spec.pixel_max is not None
    pictures = []
    for i, (gray, alpha) in enumerate(decoded):
        try:
            pictures.append(
                prepare(gray, shape, alpha=alpha, pixel_max=spec.pixel_max, invert=invert)
            )
        except DataError as error:
            which = name if single else f"{name}[{i}]"
            raise DataError(f"{which} cannot be used: {error}.") from error
    return Images(np.stack([picture.pixels for picture in pictures]), pictures, single)


def _from_array(
    array: np.ndarray, spec: InputSpec, invert: str, name: str, as_they_are: bool
) -> Images:
    if array.size == 0:
        raise DataError(f"{name} holds no image: its shape is {array.shape}.")
    if as_they_are and array.dtype.kind != "b":
        for shape in ((spec.features,), spec.image_shape):
            if shape is not None and shape in (array.shape, array.shape[1:]):
                batch = array[None] if array.shape == shape else array
                return Images(_as_it_is(batch, spec, invert, name), [], array.shape == shape)
    shape = _image_shape(spec, name)
    batch, single = _batch(array, name)
    scale = _white(batch, name)
    decoded = [_planes(image.astype(np.float32) / np.float32(scale)) for image in batch]
    return _prepared(decoded, shape, spec, invert, name, single)


def _as_it_is(batch: np.ndarray, spec: InputSpec, invert: str, name: str) -> np.ndarray:
    """Return arrays that have the network's shape, inverted only where that was asked for."""
    pixels = batch.dtype.kind in "iu"
    if pixels and spec.pixel_max is None:
        raise DataError(
            f"{name} must hold floating numbers, as the network was trained on; got {batch.dtype}."
        )
    if invert != "yes":
        return batch
    if not pixels:
        return 1 - batch
    assert spec.pixel_max is not None
    return np.rint(spec.pixel_max - batch.astype(np.float64)).astype(np.int64)


def _batch(array: np.ndarray, name: str) -> tuple[np.ndarray, bool]:
    """Return an array of pictures, gray or with their planes last, and whether it was one."""
    planes = array.ndim > 2 and array.shape[-1] in (1, 3, 4)
    dimensions = array.ndim - planes
    if dimensions not in (2, 3):
        raise DataError(
            f"{name} must hold images of shape (height, width) or (height, width, 3), or an array "
            f"of them, or inputs of the network's own shape; got shape {array.shape}."
        )
    return (array[None], True) if dimensions == 2 else (array, False)


def _white(batch: np.ndarray, name: str) -> int:
    """Return the number that is white in an array of pictures."""
    kind, low, high = batch.dtype.name, float(batch.min()), float(batch.max())
    white = {"bool": 1, "uint16": 65535}.get(kind, 1 if batch.dtype.kind == "f" else 255)
    if low < 0 or high > white:
        raise DataError(
            f"{name} must hold pixels from 0, black, to {white}, white, as {kind}; got numbers "
            f"from {low:g} to {high:g}."
        )
    return white


def _planes(image: np.ndarray) -> Gray:
    """Return gray and alpha of an image; the weights of the colors are those of ITU-R BT.601."""
    if image.ndim == 2:
        return image, None
    if image.shape[2] == 1:
        return image[..., 0], None
    gray = image[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32)
    return gray, image[..., 3] if image.shape[2] == 4 else None

"""Files with images, as a network takes them: PNG, JPEG, .npy and IDX."""

from __future__ import annotations

import contextlib
import io
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from cupybnn.data.idx import read_idx_stream
from cupybnn.deploy.inputs import InputSpec
from cupybnn.deploy.pictures import INVERT, Picture, prepare
from cupybnn.errors import DataError, SettingError
from cupybnn.paths import user_path

__all__ = ["Images", "read_image", "read_images"]

_PICTURES = {b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG"}
_NPY = b"\x93NUMPY"
_IDX = b"\x00\x00\x08"
_GZIP = b"\x1f\x8b"
#: Height and width to which larger pictures are reduced when they are opened: far more than any
#: network sees of them.
_LARGEST = 2048
_MOST_PIPED = 1 << 28  # bytes that are read from a pipe


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
    """Read one picture as a network wants it: grey, light ink on dark, scaled and centred.

    Parameters
    ----------
    file : path-like or binary file
        PNG or JPEG (with Pillow, the extra ``images``) or a .npy of one picture; grey or colour, of
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
            f"{_name(file)} must hold one picture; got {len(found.pictures)}. Read all of them "
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
    name = _name(file)
    with _opened(file, name) as stream:
        start = stream.read(8)
        stream.seek(0)
        kind = next((k for magic, k in _PICTURES.items() if start.startswith(magic)), "")
        if kind:
            shape = _image_shape(spec, name)
            grey, alpha = _decoded(stream, kind, name)
            return _prepared([(grey, alpha)], shape, spec, invert, name, single=True)
        if start.startswith(_NPY):
            array = _read_npy(stream, name)
        elif start.startswith((_IDX, _GZIP)):
            array = read_idx_stream(stream, 3, name)
        else:
            what = "is empty" if not start else "is none of these"
            raise DataError(
                f"{name} must be an image: PNG, JPEG, .npy or IDX; it {what}. Convert a picture of "
                f"another format to PNG."
            )
    return _from_array(array, spec, invert, name, as_they_are)


def _name(file: Any) -> str:
    if isinstance(file, (str, os.PathLike)):
        return str(user_path(file))
    return str(getattr(file, "name", "the image"))


@contextlib.contextmanager
def _opened(file: Any, name: str) -> Iterator[Any]:
    """Open a path, or take an open file; pipes are read to their ends, since they do not seek."""
    with contextlib.ExitStack() as stack:
        try:
            stream = file
            if isinstance(file, (str, os.PathLike)):
                stream = stack.enter_context(open(user_path(file), "rb"))
            if not stream.seekable():
                content = stream.read(_MOST_PIPED + 1)
                if len(content) > _MOST_PIPED:
                    raise DataError(
                        f"{name} is too large for a pipe, at most {_MOST_PIPED:,} bytes. Give it "
                        f"as a file."
                    )
                stream = io.BytesIO(content)
            stream.seek(0)
        except IsADirectoryError as error:
            raise DataError(f"{name} is a folder, not an image. Name the files in it.") from error
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error.strerror or error}.") from error
        yield stream


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


# Pictures ------------------------------------------------------------------------------------


def _decoded(stream: Any, kind: str, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Read a PNG or JPEG; return grey and alpha, from 0 to 1, alpha None if there is none."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise SettingError(
            "Reading PNG and JPEG needs Pillow, which is not installed: pip install pillow (or the "
            "extra cupybnn[images])."
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(stream, formats=[kind]) as picture:
                if max(picture.size) > _LARGEST:
                    picture.draft("L", (_LARGEST, _LARGEST))  # a JPEG is reduced as it is decoded
                picture.load()
                upright = picture
                with contextlib.suppress(Exception):  # of damaged EXIF data, which do not matter
                    upright = ImageOps.exif_transpose(picture)
                return _grey(upright)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(
            f"{name} has too many pixels: more than {Image.MAX_IMAGE_PIXELS or 0:,}. Make it "
            f"smaller."
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes Pillow raise a dozen kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{name} is a damaged {kind}: {reason.rstrip('.')}.") from error


def _grey(picture: Any) -> tuple[np.ndarray, np.ndarray | None]:
    if picture.mode.startswith(("I", "F")):  # 16 bits
        grey = np.asarray(picture).astype(np.float32) / 65535
        step = -(-max(grey.shape) // _LARGEST)
        return grey[::step, ::step], None
    transparent = "A" in picture.getbands() or "transparency" in picture.info
    picture = picture.convert("LA" if transparent else "L")
    picture.thumbnail((_LARGEST, _LARGEST))
    values = np.asarray(picture).astype(np.float32) / 255
    return (values[..., 0], values[..., 1]) if transparent else (values, None)


def _prepared(
    decoded: list[tuple[np.ndarray, np.ndarray | None]],
    shape: tuple[int, int],
    spec: InputSpec,
    invert: str,
    name: str,
    single: bool,
) -> Images:
    assert spec.pixel_max is not None
    pictures = []
    for i, (grey, alpha) in enumerate(decoded):
        try:
            pictures.append(
                prepare(grey, shape, alpha=alpha, pixel_max=spec.pixel_max, invert=invert)
            )
        except DataError as error:
            which = name if single else f"{name}[{i}]"
            raise DataError(f"{which} cannot be used: {error}.") from error
    return Images(np.stack([picture.pixels for picture in pictures]), pictures, single)


# Arrays --------------------------------------------------------------------------------------


def _read_npy(stream: Any, name: str) -> np.ndarray:
    """Read a .npy file: no pickle, and no memory beyond what the file holds."""
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"format {version} is not read")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        if dtype.kind not in "biuf":
            raise ValueError(f"it must hold real numbers; got {str(dtype)[:80]}")
        start = stream.tell()
        size = stream.seek(0, os.SEEK_END) - start
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size:
            raise ValueError(
                f"{dtype} of shape {str(shape)[:80]} contradicts its size of {size:,} bytes"
            )
        stream.seek(start)
        flat = np.frombuffer(stream.read(size), dtype)
    except Exception as error:  # as above
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{name} is not a usable .npy: {reason.rstrip('.')}.") from error
    array = flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)
    if array.dtype.kind != "f":
        return array.astype(dtype.newbyteorder("="), copy=False)
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise DataError(
            f"{name} must hold finite numbers; it holds NaN, infinity or beyond float32."
        )
    return array


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
    """Return an array of pictures, grey or with their planes last, and whether it was one."""
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


def _planes(image: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Return grey and alpha of an image; the weights of the colours are those of ITU-R BT.601."""
    if image.ndim == 2:
        return image, None
    if image.shape[2] == 1:
        return image[..., 0], None
    grey = image[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32)
    return grey, image[..., 3] if image.shape[2] == 4 else None

"""What is in a file with images, before it is made what a network takes."""

from __future__ import annotations

import contextlib
import io
import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from cupybnn.data.idx import read_idx_stream
from cupybnn.errors import DataError, SettingError
from cupybnn.extras import to_install
from cupybnn.paths import user_path

__all__ = ["Gray", "content", "name_of"]

#: Gray and alpha of a picture, from 0 to 1; alpha is None where all is opaque.
Gray = tuple[np.ndarray, np.ndarray | None]

_PICTURES = {b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG"}
_NPY = b"\x93NUMPY"
_IDX = b"\x00\x00\x08"
_GZIP = b"\x1f\x8b"
#: Height and width to which larger pictures are reduced when they are opened: far more than any
#: network sees of them.
_LARGEST = 2048
_MOST_PIPED = 1 << 28  # bytes that are read from a pipe


def content(file: Any) -> Gray | np.ndarray:
    """Return the picture of a PNG or JPEG, or the array of a .npy or IDX file.

    Parameters
    ----------
    file : path-like or binary file

    Raises
    ------
    DataError
        If the file cannot be read, is none of these, or is damaged.
    SettingError
        If Pillow is needed and missing.
    """
    name = name_of(file)
    with _opened(file, name) as stream:
        start = stream.read(8)
        stream.seek(0)
        for magic, kind in _PICTURES.items():
            if start.startswith(magic):
                return _decoded(stream, kind, name)
        if start.startswith(_NPY):
            return _read_npy(stream, name)
        if start.startswith((_IDX, _GZIP)):
            return read_idx_stream(stream, 3, name)
    what = "is empty" if not start else "is none of these"
    raise DataError(
        f"{name} must be an image: PNG, JPEG, .npy or IDX; it {what}. Convert a picture of another "
        f"format to PNG."
    )


def name_of(file: Any) -> str:
    """Return what a file is called in messages."""
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
                piped = stream.read(_MOST_PIPED + 1)
                if len(piped) > _MOST_PIPED:
                    raise DataError(
                        f"{name} is too large for a pipe, at most {_MOST_PIPED:,} bytes. Give it "
                        f"as a file."
                    )
                stream = io.BytesIO(piped)
            stream.seek(0)
        except IsADirectoryError as error:
            raise DataError(f"{name} is a folder, not an image. Name the files in it.") from error
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error.strerror or error}.") from error
        yield stream


def _decoded(stream: Any, kind: str, name: str) -> Gray:
    """Read a PNG or JPEG; return gray and alpha, from 0 to 1, alpha None if there is none."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise SettingError(
            f"Reading PNG and JPEG needs Pillow, which is not installed: {to_install('images')}."
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
                return _gray(upright)
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


def _gray(picture: Any) -> Gray:
    if picture.mode.startswith(("I", "F")):  # 16 bits
        gray = np.asarray(picture).astype(np.float32) / 65535
        step = -(-max(gray.shape) // _LARGEST)
        return gray[::step, ::step], None
    transparent = "A" in picture.getbands() or "transparency" in picture.info
    picture = picture.convert("LA" if transparent else "L")
    picture.thumbnail((_LARGEST, _LARGEST))
    values = np.asarray(picture).astype(np.float32) / 255
    return (values[..., 0], values[..., 1]) if transparent else (values, None)


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

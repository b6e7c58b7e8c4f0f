"""File format of packed matrices: an .npz of 64-bit words in the canonical layout, without pickle.

Its entries are ``format``, ``version``, ``shape``, ``axis``, ``words`` and ``checksum``, the CRC-32
of axis, shape and words; older files have no checksum. Files are untrusted: the size of each entry
is checked before memory is allocated, other entries are not read, and every fault raises one
ValueError.
"""

from __future__ import annotations

import math
import os
import stat
import zlib
from typing import Any

import numpy as np

from cupybnn.files import atomic_write
from cupybnn.npz import NpzFile, open_npz

__all__ = ["canonical_shape", "read", "write"]

FORMAT = "cupybnn.PackedMatrix"
VERSION = 1
SMALL = 4096  # bytes; the limit for all entries except the words
MOST_AXES = 64  # of a NumPy array
# Empty lines take no space in a file, but their popcounts take memory.
MOST_EMPTY_LINES = 1 << 24

#: Dtype kinds and numbers of axes of all entries except the words; older files have no checksum.
_SMALL_ENTRIES = {
    "format": ("U", 0),
    "version": ("iu", 0),
    "shape": ("i", 1),
    "axis": ("i", 0),
    "checksum": ("iu", 0),
}


class _RefusedError(ValueError):
    """A fault of a file, as the end of a sentence."""


def canonical_shape(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """Return the shape (..., lines, words per line) of a matrix packed along `axis`."""
    if len(shape) == 1:
        shape = (1, *shape)
    return (*shape[:-2], shape[-3 - axis], -(-shape[axis] // 64))


def _checksum(words: np.ndarray, shape: tuple[int, ...], axis: int) -> int:
    place = zlib.crc32(np.array([axis, *shape], "<i8").tobytes())
    return zlib.crc32(np.ascontiguousarray(words).reshape(-1).view(np.uint8).data, place)


def write(
    path: str | os.PathLike[str], words: np.ndarray, shape: tuple[int, ...], axis: int
) -> None:
    """Write the canonical `words` of a matrix to `path`, atomically."""
    _check_path(path, "save")
    with atomic_write(path) as file:
        np.savez(
            file,
            format=np.array(FORMAT),
            version=np.array(VERSION),
            shape=np.array(shape, dtype=np.int64),
            axis=np.array(axis),
            words=words,
            checksum=np.array(_checksum(words, shape, axis), np.uint32),
        )


def read(path: str | os.PathLike[str]) -> tuple[np.ndarray, tuple[int, ...], int]:
    """Read a file written by `write` and check that it is consistent.

    Returns
    -------
    words : ndarray of uint64, shape ``canonical_shape(shape, axis)``
    shape : tuple of int
    axis : int

    Raises
    ------
    OSError
        If the file cannot be opened.
    ValueError
        If it is truncated, of another format or version, compressed, or inconsistent.
    """
    _check_path(path, "load")
    mode = os.stat(path).st_mode
    try:
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # open() refuses a folder
            raise _RefusedError("it is not a regular file")
        return _read(os.fsdecode(path))
    except _RefusedError as error:
        raise ValueError(
            f"{os.fspath(path)!r} cannot be read as a PackedMatrix: {error}."
        ) from error


def _check_path(path: Any, function: str) -> None:
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise TypeError(
            f"The 'path' of PackedMatrix.{function} must be the path of a file; got "
            f"{type(path).__name__}."
        )
    name = os.fsdecode(path)
    if "\0" in name:
        raise ValueError(
            f"The 'path' of PackedMatrix.{function} must have no NUL character; got {name!r}."
        )


def _read(path: str) -> tuple[np.ndarray, tuple[int, ...], int]:
    try:
        with open_npz(path, compressed=False) as file:
            return _checked(file)
    except _RefusedError:
        raise
    except ValueError as error:
        raise _RefusedError(f"it is truncated, damaged or of another kind ({error})") from error


def _checked(file: NpzFile) -> tuple[np.ndarray, tuple[int, ...], int]:
    needed = [name for name in (*_SMALL_ENTRIES, "words") if name != "checksum"]
    if missing := [name for name in needed if name not in file.names]:
        raise _RefusedError(f"it has no entry {missing[0]!r}")
    entry = {name: file.read(name, SMALL) for name in _SMALL_ENTRIES if name in file.names}
    for name, array in entry.items():
        kinds, ndim = _SMALL_ENTRIES[name]
        if array.dtype.kind not in kinds or array.ndim != ndim:
            raise _RefusedError(f"its entry {name!r} is {array!r:.80}")
    if entry["format"].item() != FORMAT:
        raise _RefusedError(f"its format is {entry['format'].item()!r:.80}, not {FORMAT!r}")
    if entry["version"].item() != VERSION:
        raise _RefusedError(
            f"it is of version {entry['version']}; this cupybnn reads version {VERSION}"
        )
    shape = tuple(entry["shape"].tolist())
    axis = entry["axis"].item()
    if axis not in (-1, -2)[: len(shape)] or min(shape) < 0 or len(shape) > MOST_AXES:
        raise _RefusedError(f"a matrix of shape {shape} cannot be packed along axis {axis}")
    expected = canonical_shape(shape, axis)
    if shape[axis] == 0 and math.prod(expected[:-1]) > MOST_EMPTY_LINES:
        raise _RefusedError(f"its shape {shape} has no elements, but too many lines")

    found, dtype = file.header("words")
    if dtype != np.dtype("<u8") or found != expected:
        raise _RefusedError(
            f"shape {shape} packed along axis {axis} needs uint64 words of shape {expected}, "
            f"but it holds {dtype} of shape {found}"
        )
    words = np.ascontiguousarray(file.read("words"))
    tail = shape[axis] % 64
    if tail and (words[..., -1] >> np.uint64(tail)).any():
        raise _RefusedError("bits past the end of a line are not zero")
    if "checksum" in entry and entry["checksum"].item() != _checksum(words, shape, axis):
        raise _RefusedError("its words do not match its checksum: some bits were changed")
    return words, shape, axis

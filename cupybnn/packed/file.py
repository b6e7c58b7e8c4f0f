"""File format of packed matrices: an .npz of 64-bit words in the canonical layout, without pickle.

Its entries are ``format``, ``version``, ``shape``, ``axis``, ``words`` and ``checksum``, the CRC-32
of axis, shape and words; older files have no checksum. A matrix of levels other than signs is of
version 2, with ``levels`` in addition, its bits and whether it is signed, which its checksum also
covers. Files are untrusted: the size of each entry
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

from cupybnn.backends.levels import MOST_BITS, SIGNS, Levels, levels_of
from cupybnn.files import atomic_write
from cupybnn.npz import NpzFile, open_npz

__all__ = ["canonical_shape", "read", "write"]

FORMAT = "cupybnn.PackedMatrix"
VERSION, LEVELS_VERSION = 1, 2
SMALL = 4096  # bytes; the limit for all entries except the words
MOST_AXES = 64  # of a NumPy array
# Empty lines take no space in a file, but their popcounts take memory.
MOST_EMPTY_LINES = 1 << 24

#: Dtype kinds and numbers of axes of all entries except the words; older files have no checksum,
#: and those of signs no levels.
_SMALL_ENTRIES = {
    "format": ("U", 0),
    "version": ("iu", 0),
    "shape": ("i", 1),
    "axis": ("i", 0),
    "checksum": ("iu", 0),
    "levels": ("i", 1),
}


class _RefusedError(ValueError):
    """A fault of a file, as the end of a sentence."""


def canonical_shape(shape: tuple[int, ...], axis: int, levels: Levels = SIGNS) -> tuple[int, ...]:
    """Return the shape (..., lines, words per line) of a matrix packed along `axis`."""
    if len(shape) == 1:
        shape = (1, *shape)
    return (*shape[:-2], shape[-3 - axis], levels.bits * -(-shape[axis] // 64))


def _entry(levels: Levels) -> list[int]:
    """Return the entry of levels; none for signs."""
    return [] if levels is SIGNS else [levels.bits, int(levels.signed)]


def _checksum(words: np.ndarray, shape: tuple[int, ...], axis: int, levels: Levels) -> int:
    place = zlib.crc32(np.array([*_entry(levels), axis, *shape], "<i8").tobytes())
    return zlib.crc32(np.ascontiguousarray(words).reshape(-1).view(np.uint8).data, place)


def write(
    path: str | os.PathLike[str],
    words: np.ndarray,
    shape: tuple[int, ...],
    axis: int,
    levels: Levels = SIGNS,
) -> None:
    """Write the canonical `words` of a matrix to `path`, atomically."""
    _check_path(path, "save")
    signs = levels is SIGNS
    more: dict[str, Any] = {} if signs else {"levels": np.array(_entry(levels), np.int64)}
    with atomic_write(path) as file:
        np.savez(
            file,
            format=np.array(FORMAT),
            version=np.array(VERSION if signs else LEVELS_VERSION),
            shape=np.array(shape, dtype=np.int64),
            axis=np.array(axis),
            words=words,
            checksum=np.array(_checksum(words, shape, axis, levels), np.uint32),
            **more,
        )


def read(path: str | os.PathLike[str]) -> tuple[np.ndarray, tuple[int, ...], int, Levels]:
    """Read a file written by `write` and check that it is consistent.

    Returns
    -------
    words : ndarray of uint64, shape ``canonical_shape(shape, axis, levels)``
    shape : tuple of int
    axis : int
    levels : Levels

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


def _read(path: str) -> tuple[np.ndarray, tuple[int, ...], int, Levels]:
    try:
        with open_npz(path, compressed=False) as file:
            return _checked(file)
    except _RefusedError:
        raise
    except ValueError as error:
        raise _RefusedError(f"it is truncated, damaged or of another kind ({error})") from error


def _checked(file: NpzFile) -> tuple[np.ndarray, tuple[int, ...], int, Levels]:
    needed = [name for name in (*_SMALL_ENTRIES, "words") if name not in ("checksum", "levels")]
    if missing := [name for name in needed if name not in file.names]:
        raise _RefusedError(f"it has no entry {missing[0]!r}")
    entry = {name: file.read(name, SMALL) for name in _SMALL_ENTRIES if name in file.names}
    for name, array in entry.items():
        kinds, ndim = _SMALL_ENTRIES[name]
        if array.dtype.kind not in kinds or array.ndim != ndim:
            raise _RefusedError(f"its entry {name!r} is {array!r:.80}")
    if entry["format"].item() != FORMAT:
        raise _RefusedError(f"its format is {entry['format'].item()!r:.80}, not {FORMAT!r}")
    version = entry["version"].item()
    if version not in (VERSION, LEVELS_VERSION):
        raise _RefusedError(
            f"it is of version {version}; this cupybnn reads versions {VERSION} and "
            f"{LEVELS_VERSION}"
        )
    levels = SIGNS
    if version == LEVELS_VERSION:
        found = entry["levels"].tolist() if "levels" in entry else None
        if found is None or len(found) != 2 or found[1] not in (0, 1) or found == [1, 1]:
            raise _RefusedError(f"its entry 'levels' is {found!r:.80}")
        if not 1 <= found[0] <= MOST_BITS:
            raise _RefusedError(f"its elements have {found[0]} bits, not 1 to {MOST_BITS}")
        levels = levels_of(found[0], bool(found[1]))
    shape = tuple(entry["shape"].tolist())
    axis = entry["axis"].item()
    if axis not in (-1, -2)[: len(shape)] or min(shape) < 0 or len(shape) > MOST_AXES:
        raise _RefusedError(f"a matrix of shape {shape} cannot be packed along axis {axis}")
    expected = canonical_shape(shape, axis, levels)
    if levels is not SIGNS and shape[axis] * levels.top >= 2**31:
        raise _RefusedError(f"sums of {shape[axis]} levels of {levels} do not fit an int32")
    if shape[axis] == 0 and math.prod(expected[:-1]) > MOST_EMPTY_LINES:
        raise _RefusedError(f"its shape {shape} has no elements, but too many lines")

    stored, dtype = file.header("words")
    if dtype != np.dtype("<u8") or stored != expected:
        raise _RefusedError(
            f"shape {shape} packed along axis {axis} needs uint64 words of shape {expected}, "
            f"but it holds {dtype} of shape {stored}"
        )
    words = np.ascontiguousarray(file.read("words"))
    tail, last = shape[axis] % 64, -(-shape[axis] // 64) - 1
    if tail and (words[..., last :: last + 1] >> np.uint64(tail)).any():
        raise _RefusedError("bits past the end of a line are not zero")
    if "checksum" in entry and entry["checksum"].item() != _checksum(words, shape, axis, levels):
        raise _RefusedError("its words do not match its checksum: some bits were changed")
    return words, shape, axis, levels

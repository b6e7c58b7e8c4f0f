"""File format of packed matrices: an .npz of 64-bit words in the canonical layout, without pickle.

Its entries are ``format``, ``version``, ``shape``, ``axis``, ``words`` and ``checksum``, the CRC-32
of axis, shape and words; older files have no checksum. Files are untrusted: the size of each entry
is checked before memory is allocated, other entries are not read, and every fault raises one
ValueError.
"""

from __future__ import annotations

import io
import math
import os
import stat
import zipfile
import zlib
from typing import IO, Any

import numpy as np

from cupybnn.files import atomic_write

__all__ = ["canonical_shape", "read", "write"]

FORMAT = "cupybnn.PackedMatrix"
VERSION = 1
ENTRIES = ("format", "version", "shape", "axis", "words")  # and, in newer files, the checksum
SMALL = 4096  # bytes; the limit for all entries except the words
CHUNK = 1 << 20  # bytes read at a time
MOST_AXES = 64  # of a NumPy array
# Empty lines take no space in a file, but their popcounts take memory.
MOST_EMPTY_LINES = 1 << 24

_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
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
        with open(path, "rb") as file:
            return _read(file)
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


def _read(file: IO[bytes]) -> tuple[np.ndarray, tuple[int, ...], int]:
    try:
        magic = file.read(4)
        if magic[:2] != b"PK":
            raise ValueError(f"not an .npz file, it begins with {magic!r}")
        with zipfile.ZipFile(file) as archive:
            return _read_entries(archive, os.fstat(file.fileno()).st_size)
    except _RefusedError:
        raise
    except Exception as error:  # a flipped bit makes zipfile, zlib and NumPy raise many kinds
        why = str(error) or type(error).__name__
        raise _RefusedError(f"it is truncated, damaged or of another kind ({why})") from error


def _read_entries(archive: zipfile.ZipFile, size: int) -> tuple[np.ndarray, tuple[int, ...], int]:
    found: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name == info.filename or name not in (*ENTRIES, "checksum"):
            continue
        if name in found:
            raise _RefusedError(f"it has two entries {name!r}")
        if info.compress_type != zipfile.ZIP_STORED:
            raise _RefusedError(f"its entry {name!r} is compressed, which save never does")
        claimed = max(info.file_size, info.compress_size)  # equal in an intact file
        if claimed > (size if name == "words" else SMALL):
            raise _RefusedError(f"its entry {name!r} claims {claimed} bytes")
        found[name] = info
    if missing := [name for name in ENTRIES if name not in found]:
        raise _RefusedError(f"it has no entry {missing[0]!r}")

    entry = {name: _small(archive, found[name]) for name in found if name != "words"}
    for name, kinds, ndim in (
        ("format", "U", 0),
        ("version", "iu", 0),
        ("shape", "i", 1),
        ("axis", "i", 0),
        ("checksum", "iu", 0),
    ):
        if name in entry and (entry[name].dtype.kind not in kinds or entry[name].ndim != ndim):
            raise _RefusedError(f"its entry {name!r} is {entry[name]!r:.80}")
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

    words = _words(archive, found["words"], shape, axis, expected)
    tail = shape[axis] % 64
    if tail and (words[..., -1] >> np.uint64(tail)).any():
        raise _RefusedError("bits past the end of a line are not zero")
    if "checksum" in entry and entry["checksum"].item() != _checksum(words, shape, axis):
        raise _RefusedError("its words do not match its checksum: some bits were changed")
    return words, shape, axis


def _header(stream: IO[bytes], info: zipfile.ZipInfo) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, order and dtype of an entry's array, which must fill the rest of the entry."""
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise _RefusedError(f"its entry {info.filename!r} is of .npy version {version}")
    shape, fortran_order, dtype = _HEADERS[version](stream)
    if dtype.hasobject:
        raise _RefusedError(f"its entry {info.filename!r} holds Python objects, not numbers")
    rest = info.file_size - stream.tell()
    if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != rest:
        raise _RefusedError(
            f"its entry {info.filename!r} has {rest} bytes for {dtype} of shape {shape}"
        )
    return shape, fortran_order, dtype


def _small(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    stream = io.BytesIO(archive.read(info))
    shape, fortran_order, dtype = _header(stream, info)
    flat = np.frombuffer(stream.read(), dtype)
    return flat.reshape(shape, order="F" if fortran_order else "C")


def _words(
    archive: zipfile.ZipFile,
    info: zipfile.ZipInfo,
    shape: tuple[int, ...],
    axis: int,
    expected: tuple[int, ...],
) -> np.ndarray:
    with archive.open(info) as stream:
        found, fortran_order, dtype = _header(stream, info)
        if dtype != np.dtype("<u8") or found != expected:
            raise _RefusedError(
                f"shape {shape} packed along axis {axis} needs uint64 words of shape {expected}, "
                f"but it holds {dtype} of shape {found}"
            )
        flat = np.empty(math.prod(expected), "<u8")
        octets = flat.view(np.uint8)
        for start in range(0, len(octets), CHUNK):
            part = stream.read(min(CHUNK, len(octets) - start))
            octets[start : start + len(part)] = np.frombuffer(part, np.uint8)
            if len(part) < min(CHUNK, len(octets) - start):
                raise _RefusedError(f"it is truncated, damaged: {info.filename!r} ends early")
        stream.read()  # at the end, zipfile checks the entry's own CRC
    return np.ascontiguousarray(flat.reshape(expected, order="F" if fortran_order else "C"))

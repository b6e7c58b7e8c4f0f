"""Safe reading of .npz files: no pickle, only requested arrays, sizes checked first."""

from __future__ import annotations

import contextlib
import math
import os
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from cupybnn.paths import checked_path

__all__ = ["NpzFile", "open_npz", "read_npz"]

_KINDS = "biufcSU"  # accepted dtype kinds: numbers and fixed-length strings
_BLOCK = 1 << 22  # bytes read at a time
_HEADER = 16384  # bytes; a typical array header has a few hundred
_DEFLATE = 1100  # a deflated byte expands to at most 1,032


class NpzFile:
    """An open .npz file; `open_npz` makes one.

    Attributes
    ----------
    names : tuple of str
        Names of its arrays.
    """

    def __init__(self, archive: zipfile.ZipFile, size: int, compressed: bool) -> None:
        self._archive = archive
        self._members: dict[str, zipfile.ZipInfo] = {}
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name in self._members:
                raise ValueError(f"it has two entries {name[:80]!r}")
            self._members[name] = member
        self._size, self._compressed = size, compressed
        self.names = tuple(self._members)

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return shape and dtype of an array without reading it.

        Raises
        ------
        ValueError
            If there is no such array, or its header is damaged.
        """
        with _one_error(name), self._open(name) as stream:
            shape, _, dtype = _header(stream, self._members[name])
            return shape, dtype

    def read(self, name: str, most_bytes: int | None = None) -> np.ndarray:
        """Read an array and verify its checksum.

        Parameters
        ----------
        name : str
        most_bytes : int, optional
            Refuse a larger array before allocating memory for it.

        Raises
        ------
        ValueError
            If there is no such array, or it is damaged, too large or of Python objects.
        """
        with _one_error(name), self._open(name) as stream:
            shape, fortran, dtype = _header(stream, self._members[name])
            nbytes = math.prod(shape) * dtype.itemsize
            if most_bytes is not None and nbytes > most_bytes:
                raise ValueError(f"it has {nbytes:,} bytes, at most {most_bytes:,} are expected")
            flat = np.empty(math.prod(shape), dtype)
            target = flat.view(np.uint8) if nbytes else flat
            at = 0
            while block := stream.read(
                _BLOCK
            ):  # read to the end, where zipfile verifies the checksum
                target[at : at + len(block)] = np.frombuffer(block, np.uint8)
                at += len(block)
            if at != nbytes:
                raise ValueError(f"it ends after {at:,} of {nbytes:,} bytes")
            return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)

    def _open(self, name: str) -> Any:
        if name not in self._members:
            raise ValueError("it is missing")
        member = self._members[name]
        if member.compress_type != zipfile.ZIP_STORED and not self._compressed:
            raise ValueError("it is compressed, which such a file never is")
        most = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: _DEFLATE}.get(member.compress_type, 0)
        if member.compress_size > self._size or member.file_size > most * member.compress_size:
            raise ValueError(f"its size of {member.file_size:,} bytes contradicts the file's")
        return self._archive.open(member)


def _header(stream: Any, member: zipfile.ZipInfo) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):  # NumPy uses others for structured dtypes and for headers over 64 KiB
        raise ValueError(f"an array of format {version} is not read")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream, max_header_size=_HEADER)
    if dtype.hasobject:
        raise ValueError("Python objects are not read (allow_pickle=False)")
    if dtype.kind not in _KINDS or not dtype.itemsize or min(shape, default=0) < 0:
        raise ValueError(f"an array of {str(dtype)[:80]} and shape {str(shape)[:80]} is not read")
    if math.prod(shape) * dtype.itemsize != member.file_size - stream.tell():
        raise ValueError(
            f"{str(dtype)[:80]} of shape {str(shape)[:80]} contradicts its size of "
            f"{member.file_size:,} bytes"
        )
    return shape, fortran, dtype


@contextlib.contextmanager
def _one_error(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a flipped bit makes zipfile and NumPy raise many kinds
        text = " ".join((str(error) or type(error).__name__).split())
        raise ValueError(f"its entry {name[:80]!r}: {text[:300].rstrip('.')}") from error


@contextlib.contextmanager
def open_npz(path: str | os.PathLike[str], *, compressed: bool = True) -> Iterator[NpzFile]:
    """Open an .npz file for reading.

    Parameters
    ----------
    path : path-like
    compressed : bool
        False refuses compressed arrays, which may be very large in a small file.

    Raises
    ------
    OSError
        If the file cannot be opened.
    ValueError
        If it is not an .npz file or is damaged; the message gives only the cause, not the path.
    """
    with open(checked_path(path), "rb") as file:
        magic = file.read(4)
        if magic[:2] != b"PK":
            raise ValueError(f"not an .npz file, it begins with {magic!r}")
        try:
            archive = zipfile.ZipFile(file)
            found = NpzFile(archive, os.fstat(file.fileno()).st_size, compressed)
        except Exception as error:  # as above
            raise ValueError(str(error) or type(error).__name__) from error
        yield found


def read_npz(
    path: str | os.PathLike[str], names: tuple[str, ...] | None = None
) -> dict[str, np.ndarray]:
    """Read entries of an .npz file without pickle, verifying the checksum of each.

    Parameters
    ----------
    path : path-like
    names : tuple of str, optional
        Read only these entries, if present; by default, all.

    Raises
    ------
    FileNotFoundError, IsADirectoryError, PermissionError
        If the file cannot be opened.
    ValueError
        If it is not an .npz file or is damaged; the message gives only the cause, not the path.
    """
    with open_npz(path) as file:
        wanted = file.names if names is None else [n for n in names if n in file.names]
        return {name: file.read(name) for name in wanted}

"""The file of a packed matrix: an .npz of 64-bit words in the canonical layout, without pickle."""

from __future__ import annotations

import os

import numpy as np

from cupybnn.files import atomic_write, read_npz

__all__ = ["canonical_shape", "read", "write"]

FORMAT = "cupybnn.PackedMatrix"
VERSION = 1
ENTRIES = ("format", "version", "shape", "axis", "words")


def canonical_shape(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """Shape of the words, (..., lines, words a line), of a matrix packed along `axis`."""
    if len(shape) == 1:
        shape = (1, *shape)
    return (*shape[:-2], shape[-3 - axis], -(-shape[axis] // 64))


def write(
    path: str | os.PathLike[str], words: np.ndarray, shape: tuple[int, ...], axis: int
) -> None:
    """Write the canonical `words` of a matrix; `path` then holds all of it or what it held."""
    with atomic_write(path) as file:
        np.savez(
            file,
            format=np.array(FORMAT),
            version=np.array(VERSION),
            shape=np.array(shape, dtype=np.int64),
            axis=np.array(axis),
            words=words,
        )


def read(path: str | os.PathLike[str]) -> tuple[np.ndarray, tuple[int, ...], int]:
    """Read a file that `write` made and check that it does not contradict itself.

    Returns
    -------
    words : ndarray of uint64, shape ``canonical_shape(shape, axis)``
    shape : tuple of int
    axis : int

    Raises
    ------
    ValueError
        If the file is truncated, of another format or version, or contradicts itself.
    """

    def refuse(why: str) -> ValueError:
        return ValueError(f"{os.fspath(path)!r} cannot be read as a PackedMatrix: {why}.")

    try:
        entry = read_npz(path)
    except ValueError as error:
        raise refuse(f"it is truncated, damaged or of another kind ({error})") from error
    if missing := [name for name in ENTRIES if name not in entry]:
        raise refuse(f"it has no entry {missing[0]!r}")
    if str(entry["format"]) != FORMAT:
        raise refuse(f"its format is {str(entry['format'])!r}, not {FORMAT!r}")
    if str(entry["version"]) != str(VERSION):
        raise refuse(f"it is of version {entry['version']}; this cupybnn reads version {VERSION}")
    for name, ndim in (("shape", 1), ("axis", 0)):
        if entry[name].dtype.kind != "i" or entry[name].ndim != ndim:
            raise refuse(f"its entry {name!r} is {entry[name]!r}")
    shape = tuple(int(n) for n in entry["shape"])
    axis = int(entry["axis"])
    axes = (-1, -2)[: len(shape)]
    if axis not in axes or min(shape) < 0:
        raise refuse(f"a matrix of shape {shape} cannot be packed along axis {axis}")
    words, expected = entry["words"], canonical_shape(shape, axis)
    if words.dtype != np.dtype("<u8") or words.shape != expected:
        raise refuse(
            f"shape {shape} packed along axis {axis} needs uint64 words of shape {expected}, "
            f"but it holds {words.dtype} of shape {words.shape}"
        )
    tail = shape[axis] % 64
    if tail and (words[..., -1] >> np.uint64(tail)).any():
        raise refuse("there are bits beyond the end of a line, where only zeros may be")
    return words, shape, axis

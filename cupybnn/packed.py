"""Signs, and matrices of them stored one bit an element.

A stored bit is 1 for +1 and 0 for -1. Bits lie along one of the last two axes of the matrix, the
packed axis; the vectors along it are its lines. In the canonical layout, which is that of the NumPy
backend and of saved files, element 64·j + i of a line is bit i of the line's 64-bit word j, and the
bits beyond the end of a line are 0.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np

from cupybnn import backends
from cupybnn.backends.devices import CPU, Device, device_of, resolve
from cupybnn.operands import as_dtype, as_operand, check_cuda_dtype, dtype_has_sign

__all__ = ["PackedMatrix", "pack", "sign", "unpack"]


def sign(x: Any) -> Any:
    """Return +1 where x >= 0 and -1 elsewhere.

    Zero of either sign gives +1 and NaN gives -1, so that a sign is never 0: this is the one
    definition of every product and layer here, and differs from `numpy.sign`.

    Parameters
    ----------
    x : array_like, any shape
        Real floating, signed integer or bool (True is +1, False is -1).

    Returns
    -------
    ndarray, shape of `x`
        A NumPy or CuPy array of the dtype of `x`; int8 for bool.

    Raises
    ------
    TypeError
        If the elements of `x` have no sign (unsigned integers, complex numbers, objects).
    """
    x = as_operand(x, "'x' of sign")
    dtype = np.dtype(np.int8) if x.dtype.kind == "b" else x.dtype
    with device_of(x).scope():
        return backends.get(x).sign(x, dtype)


class PackedMatrix:
    """A matrix of +1 and -1, or a batch of them, stored one bit an element.

    Made by `pack`, `load` or `cupybnn.xnor_gemm_packed`. Not to be changed afterwards. How the
    words lie in memory is the device's affair: use `save`, `to_numpy` or `unpack` to read them.

    Attributes
    ----------
    shape : tuple of int
        The logical shape, (..., M, K) or (K,).
    axis : int
        The packed axis: -1 or -2.
    words : ndarray
        The bits, in the device's own layout.
    popcounts : ndarray of int32, shape (..., lines)
        Number of +1 in each line; shape (1,) for a 1-D vector.
    device : Device
        Where `words` is.
    """

    __slots__ = ("axis", "device", "ndim", "popcounts", "shape", "words")

    def __init__(
        self, words: Any, popcounts: Any, shape: tuple[int, ...], axis: int, device: Device
    ) -> None:
        self.words = words
        self.popcounts = popcounts
        self.shape = shape
        self.axis = axis
        self.device = device
        self.ndim = len(shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def k(self) -> int:
        """Number of elements in a line: the length of the packed axis."""
        return self.shape[self.axis]

    @property
    def lines(self) -> int:
        """Number of lines in a matrix: the length of the other of the last two axes."""
        return self.shape[-3 - self.axis] if self.ndim > 1 else 1

    @property
    def nbytes(self) -> int:
        """Bytes of `words`, padding included."""
        return self.words.nbytes

    @property
    def T(self) -> PackedMatrix:
        """The matrix with its last two axes swapped; shares the words."""
        if self.ndim < 2:
            return self
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2])
        return PackedMatrix(self.words, self.popcounts, shape, -3 - self.axis, self.device)

    def unpack(self, dtype: Any = None) -> Any:
        """Return the array of +1 and -1; see `cupybnn.unpack`."""
        return unpack(self, dtype)

    def to_numpy(self) -> PackedMatrix:
        """Return this matrix in the host's memory; itself if it is there already."""
        return self if self.device.kind == "cpu" else self._moved(CPU)

    def to_cupy(self) -> PackedMatrix:
        """Return this matrix on the current CUDA device; itself if it is there already."""
        device = resolve("cuda")
        return self if self.device == device else self._moved(device)

    def _moved(self, device: Device) -> PackedMatrix:
        return _from_canonical(self._canonical(), self.shape, self.axis, device)

    def _canonical(self) -> np.ndarray:
        with self.device.scope():
            return backends.get(self.device).to_canonical(
                self.words, _as_matrix(self.shape), self.axis
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the matrix to `path` as an .npz file, without pickle and atomically.

        Parameters
        ----------
        path : path-like
            Used as given: no ending is added.
        """
        from cupybnn import packed_io

        packed_io.write(path, self._canonical(), self.shape, self.axis)

    @staticmethod
    def load(path: str | os.PathLike[str], device: str | Device = "cpu") -> PackedMatrix:
        """Read a matrix that `save` wrote.

        Parameters
        ----------
        path : path-like
        device : str or Device
            Where to put it: "cpu", "cuda", "cuda:1", "auto".

        Raises
        ------
        ValueError
            If the file is truncated, of another format or version, or contradicts itself.
        FileNotFoundError
            If there is no such file.
        """
        from cupybnn import packed_io

        canonical, shape, axis = packed_io.read(path)
        return _from_canonical(canonical, shape, axis, resolve(device))

    def __repr__(self) -> str:
        return (
            f"PackedMatrix(shape={self.shape}, axis={self.axis}, 1 bit an element, "
            f"{self.nbytes:,} bytes on {self.device})"
        )

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise TypeError(
            "A PackedMatrix is not an array: one bit stands for an element. "
            "Unpack it first: p.unpack(dtype)."
        )


def pack(x: Any, axis: int = -1) -> PackedMatrix:
    """Store the signs of a matrix one bit an element.

    A left operand (..., M, K) of `cupybnn.xnor_gemm` is to be packed along its last axis, a right
    operand (..., K, N) along the last but one: ``pack(a)`` and ``pack(b, axis=-2)``.

    Parameters
    ----------
    x : array_like, shape (K,), (M, K) or (..., M, K)
        Real floating, signed integer or bool; any strides. The sign is that of `cupybnn.sign`.
    axis : int
        The axis along which the bits are packed: one of the last two.

    Returns
    -------
    PackedMatrix
        On the device of `x`.

    Raises
    ------
    TypeError
        If the elements of `x` have no sign.
    ValueError
        If `x` is a scalar, or `axis` is none of its last two.
    """
    x = as_operand(x, "'x' of pack")
    ndim = x.ndim
    if ndim == 0:
        raise ValueError("The 'x' of pack must have at least one axis; got a scalar.")
    if not isinstance(axis, (int, np.integer)) or not -ndim <= axis < ndim:
        raise ValueError(
            f"The 'axis' of pack must be an axis of 'x', which has shape {x.shape}; got {axis!r}."
        )
    axis = int(axis) - ndim if axis >= 0 else int(axis)
    if axis < -2:
        raise ValueError(
            f"The 'axis' of pack must be one of the last two axes of 'x', -1 or -2; got {axis} for "
            f"shape {x.shape}. Move it first: numpy.moveaxis(x, {axis}, -1)."
        )
    device = device_of(x)
    with device.scope():
        matrix = x if ndim > 1 else x[None, :]
        words, popcounts = backends.get(device).pack(matrix, axis)
    return PackedMatrix(words, popcounts, x.shape, axis, device)


def unpack(p: PackedMatrix, dtype: Any = None) -> Any:
    """Return the array of +1 and -1 that a `PackedMatrix` stands for.

    Parameters
    ----------
    p : PackedMatrix
    dtype : dtype, optional
        Real floating, signed integer, or bool (True for +1); int8 by default.

    Returns
    -------
    ndarray, shape ``p.shape``
        A NumPy or CuPy array on the device of `p`.

    Raises
    ------
    TypeError
        If `p` is no PackedMatrix, or +1 and -1 are not both values of `dtype`.
    """
    if not isinstance(p, PackedMatrix):
        raise TypeError(f"The 'p' of unpack must be a PackedMatrix; got {type(p).__name__}.")
    target = as_dtype(np.int8 if dtype is None else dtype, "'dtype' of unpack")
    if not dtype_has_sign(target):
        raise TypeError(
            f"The 'dtype' of unpack must be real floating, signed integer or bool; got {target}."
        )
    if p.device != CPU:
        check_cuda_dtype(target, "'dtype' of unpack")
    with p.device.scope():
        matrix = backends.get(p.device).unpack(p.words, _as_matrix(p.shape), p.axis, target)
    return matrix if p.ndim > 1 else matrix[0]


def _from_canonical(
    canonical: np.ndarray, shape: tuple[int, ...], axis: int, device: Device
) -> PackedMatrix:
    popcounts = np.bitwise_count(canonical).sum(axis=-1, dtype=np.int32)
    with device.scope():
        words = backends.get(device).from_canonical(canonical, _as_matrix(shape), axis)
        return PackedMatrix(words, device.xp.asarray(popcounts), shape, axis, device)


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that a backend sees: a vector is the one line of a matrix."""
    return shape if len(shape) > 1 else (1, *shape)

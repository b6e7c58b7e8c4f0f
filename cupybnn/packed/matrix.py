"""A matrix of signs, or of a few levels, stored with one bit or a few bits per element."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from cupybnn import backends
from cupybnn.backends.devices import CPU, Device, array_module, resolve
from cupybnn.backends.interop import as_native, type_name
from cupybnn.backends.levels import SIGNS, Levels, levels_of, stored_k

__all__ = ["PackedMatrix", "as_matrix", "from_canonical", "stored_shape"]


class PackedMatrix:
    """A matrix of +1 and -1, or a batch of them, stored with one bit per element.

    Or one of a few levels, stored with up to eight bits per element: see `bits` and `pack`. Made by
    `pack`, `from_packbits`, `load` or `cupybnn.xnor_gemm_packed`, never by calling the
    class. Immutable. The memory layout of the words depends on the device: use `unpack`,
    `to_packbits` or `save` to read them.

    ``p @ q`` is ``xnor_gemm(p, q)``, and either side may be an array. ``p[index]`` takes integers,
    slices and an array of integers along all axes but the packed one. ``p == q`` is one bool:
    whether both have the same shape and elements, whatever their packed axes and devices; it waits
    for the GPU. Because they compare by content, packed matrices are not hashable, like arrays.

    Attributes
    ----------
    shape : tuple of int
        The logical shape, (..., M, K) or (K,).
    axis : int
        The packed axis: -1 or -2.
    words : ndarray
        The bits, in the device's own layout.
    popcounts : ndarray of int32, shape (..., lines)
        Number of +1 in each line; shape (1,) for a 1-D vector. Of levels, the sum of their numbers,
        counted from 0.
    levels : Levels
        `bits` and `signed`.
    device : Device
        Where `words` is.

    Examples
    --------
    >>> import numpy as np
    >>> import cupybnn
    >>> p = cupybnn.pack(np.array([[1.5, -2.0, 0.0], [-1.0, -1.0, 3.0]]))
    >>> p.unpack("int8")
    array([[ 1, -1,  1],
           [-1, -1,  1]], dtype=int8)
    >>> p @ np.ones((3, 1))
    array([[ 1.],
           [-1.]])
    """

    __slots__ = ("axis", "device", "levels", "ndim", "popcounts", "shape", "words")

    # Makes NumPy and CuPy arrays defer to the packed matrix in arithmetic.
    __array_ufunc__ = None
    __hash__ = None  # type: ignore[assignment]

    words: Any
    popcounts: Any
    shape: tuple[int, ...]
    axis: int
    device: Device
    levels: Levels
    ndim: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(
            "A PackedMatrix is not made by calling the class. Use cupybnn.pack(x) for numbers, "
            "PackedMatrix.from_packbits(octets, k) for bits, or PackedMatrix.load(path) for a file."
        )

    @classmethod
    def _of(
        cls, words: Any, popcounts: Any, shape: tuple[int, ...], axis: int, device: Device,
        levels: Levels = SIGNS,
    ) -> PackedMatrix:  # fmt: skip
        """Make one from consistent parts; unchecked, because every packed product passes here."""
        self = object.__new__(cls)
        self.words = words
        self.popcounts = popcounts
        self.shape = shape
        self.axis = axis
        self.device = device
        self.levels = levels
        self.ndim = len(shape)
        return self

    @property
    def dtype(self) -> np.dtype:
        """The dtype of an element when unpacked, unless `unpack` gets another one.

        The smallest that holds all levels: int8 for signs.
        """
        return self.levels.dtype

    @property
    def bits(self) -> int:
        """Number of bits of an element: 1 for signs."""
        return self.levels.bits

    @property
    def signed(self) -> bool:
        """Whether elements are odd integers, as signs are, or 0 to ``2**bits - 1``."""
        return self.levels.signed

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
        """Bytes of `words`, including padding."""
        return int(self.words.nbytes)

    @property
    def T(self) -> PackedMatrix:
        """The matrix with its last two axes swapped; shares the words."""
        if self.ndim < 2:
            return self
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2])
        return PackedMatrix._of(
            self.words, self.popcounts, shape, -3 - self.axis, self.device, self.levels
        )

    def unpack(self, dtype: Any = None) -> Any:
        """Return the array of +1 and -1, or of levels; see `cupybnn.unpack`."""
        from cupybnn.packed import signs

        return signs.unpack(self, dtype)

    @staticmethod
    def from_packbits(octets: Any, k: int, axis: int = -1, bitorder: str = "big") -> PackedMatrix:
        """Make a packed matrix from the bytes that `numpy.packbits` returns.

        Parameters
        ----------
        octets : array_like of uint8, shape (B,), (M, B) or (..., M, B) with B = ceil(k / 8)
            Eight elements in each byte: 1 for +1 and 0 for -1. NumPy or CuPy.
        k : int
            Number of elements along the packed axis; the remaining bits of the last byte are
            ignored.
        axis : int
            The packed axis: one of the last two.
        bitorder : {"big", "little"}
            Whether the first of eight elements is the highest bit, the default of
            `numpy.packbits`, or the lowest.

        Returns
        -------
        PackedMatrix
            The same as ``pack(numpy.unpackbits(octets, axis, k, bitorder).astype(bool), axis)``,
            on the device of `octets`.

        Raises
        ------
        TypeError
            If `octets` is not of dtype uint8 or `k` is not an integer.
        ValueError
            If the length of `octets` along `axis` is not ceil(k / 8), `axis` is not one of the last
            two, or `bitorder` is invalid.

        Examples
        --------
        >>> import numpy as np
        >>> from cupybnn import PackedMatrix
        >>> x = np.array([[1, 0, 1], [0, 0, 1]])
        >>> p = PackedMatrix.from_packbits(np.packbits(x, axis=1), k=3)
        >>> p.unpack().tolist()
        [[1, -1, 1], [-1, -1, 1]]
        """
        from cupybnn.packed import octets as bytewise

        return bytewise.from_packbits(octets, k, axis, bitorder)

    def to_packbits(self, bitorder: str = "big") -> Any:
        """Return the bits as `numpy.packbits` packs them along the packed axis.

        Parameters
        ----------
        bitorder : {"big", "little"}
            Whether the first of eight elements is the highest or the lowest bit of a byte.

        Returns
        -------
        ndarray of uint8, of the shape of the matrix but ceil(k / 8) long along the packed axis
            The remaining bits of the last byte are 0. On the device of the matrix.

        Examples
        --------
        >>> import numpy as np
        >>> from cupybnn import pack
        >>> pack(np.array([1.0, -1.0, 1.0])).to_packbits()
        array([160], dtype=uint8)
        """
        from cupybnn.packed import octets as bytewise

        return bytewise.to_packbits(self, bitorder)

    def copy(self) -> PackedMatrix:
        """Return a copy that shares no memory with this matrix."""
        with self.device.scope():
            return PackedMatrix._of(
                self.words.copy(), self.popcounts.copy(), self.shape, self.axis, self.device,
                self.levels,
            )  # fmt: skip

    def to_numpy(self) -> PackedMatrix:
        """Return this matrix in host memory; itself if already there."""
        return self if self.device.kind == "cpu" else self._moved(CPU)

    def to_cupy(self) -> PackedMatrix:
        """Return this matrix on the current CUDA device; itself if already there."""
        device = resolve("cuda")
        return self if self.device == device else self._moved(device)

    def _moved(self, device: Device) -> PackedMatrix:
        return from_canonical(self._canonical(), self.shape, self.axis, device, self.levels)

    def _canonical(self) -> np.ndarray:
        with self.device.scope():
            lines = backends.get(self.device).to_canonical(
                self.words, stored_shape(self.shape, self.axis, self.levels, self.device), self.axis
            )
        if self.levels is SIGNS or self.device == CPU:
            return lines  # type: ignore[no-any-return]
        planes = lines.reshape(*lines.shape[:-1], self.bits, -1)[..., : -(-self.k // 64)]
        return np.ascontiguousarray(planes).reshape(*lines.shape[:-1], -1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the matrix to `path` as an .npz file, without pickle and atomically.

        Parameters
        ----------
        path : path-like
            Used as is: no extension is added.
        """
        from cupybnn.packed import file

        file.write(path, self._canonical(), self.shape, self.axis, self.levels)

    @staticmethod
    def load(path: str | os.PathLike[str], device: str | Device = "cpu") -> PackedMatrix:
        """Read a matrix written by `save`.

        Parameters
        ----------
        path : path-like
        device : str or Device
            Where to put it: "cpu", "cuda", "cuda:1", "auto".

        Raises
        ------
        ValueError
            If the file is truncated, of another format or version, or inconsistent.
        FileNotFoundError
            If there is no such file.
        """
        from cupybnn.packed import file

        place = resolve(device)
        canonical, shape, axis, levels = file.read(path)
        return from_canonical(canonical, shape, axis, place, levels)

    def __repr__(self) -> str:
        return (
            f"PackedMatrix(shape={self.shape}, axis={self.axis}, {self.levels} per element, "
            f"{self.nbytes:,} bytes on {self.device})"
        )

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> PackedMatrix:
        from cupybnn.packed import lines

        return lines.index(self, key)

    def __iter__(self) -> Iterator[PackedMatrix]:
        from cupybnn.packed import lines

        return lines.iterate(self)

    def __contains__(self, x: object) -> bool:
        raise TypeError(f"'in' is not defined for a PackedMatrix. {_UNPACK}")

    def __eq__(self, other: object) -> bool:
        from cupybnn.packed import lines

        if isinstance(other, PackedMatrix):
            return lines.equal(self, other)
        if hasattr(other, "__array__") or hasattr(other, "__dlpack__"):
            raise TypeError(
                f"A PackedMatrix can only be compared with a PackedMatrix; got {type_name(other)}. "
                f"{_UNPACK}"
            )
        return NotImplemented

    def __matmul__(self, other: Any) -> Any:
        from cupybnn.gemm import xnor_gemm

        return xnor_gemm(self, other)

    def __rmatmul__(self, other: Any) -> Any:
        from cupybnn.gemm import xnor_gemm

        return xnor_gemm(other, self)

    def __copy__(self) -> PackedMatrix:
        return self.copy()

    def __deepcopy__(self, memo: Any) -> PackedMatrix:
        return self.copy()

    def __reduce__(self) -> tuple[Any, ...]:
        # Like a CuPy array, one from a GPU is restored on the current GPU.
        place = self._canonical(), self.shape, self.axis, self.device.kind
        more = () if self.levels is SIGNS else (self.bits, self.signed)
        return _unpickled, (*place, *more)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise TypeError(f"A PackedMatrix is not an array: it stores one bit per element. {_UNPACK}")

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        # numpy.array_equal, for example, would turn the error of __array__ into "not equal".
        from cupybnn.packed import lines

        if func is np.array_equal:
            return _array_equal(*args, **kwargs)
        if func is np.concatenate:
            return lines.concatenate(*args, **kwargs)
        if func in (np.shape, np.ndim, np.size, np.copy) and len(args) == 1 and not kwargs:
            value = getattr(self, func.__name__)
            return value() if func is np.copy else value
        raise TypeError(
            f"{func.__module__}.{func.__name__} does not take a PackedMatrix. {_UNPACK}"
        )


_UNPACK = "Unpack it first: p.unpack(dtype)."


def _array_equal(a: Any, b: Any, equal_nan: bool = False) -> bool:
    a, b = (
        x if isinstance(x, PackedMatrix) else as_native(x, "argument of array_equal")
        for x in (a, b)
    )
    if isinstance(a, PackedMatrix) and isinstance(b, PackedMatrix):
        return a == b
    a, b = (x.unpack() if isinstance(x, PackedMatrix) else x for x in (a, b))
    return bool(array_module(a, b).array_equal(a, b))


def _unpickled(
    canonical: np.ndarray, shape: tuple[int, ...], axis: int, kind: str, bits: int = 1,
    signed: bool = True,
) -> PackedMatrix:  # fmt: skip
    return from_canonical(canonical, shape, axis, resolve(kind), levels_of(bits, signed))


def from_canonical(
    canonical: np.ndarray, shape: tuple[int, ...], axis: int, device: Device,
    levels: Levels = SIGNS,
) -> PackedMatrix:  # fmt: skip
    """Make a packed matrix on `device` from canonical words on the host."""
    lines, bits = canonical.shape[:-1], levels.bits
    planes = canonical.reshape(*lines, bits, canonical.shape[-1] // bits)
    ones = np.bitwise_count(planes).sum(axis=-1, dtype=np.int32)
    popcounts = (ones << np.arange(bits - 1, -1, -1, dtype=np.int32)).sum(axis=-1, dtype=np.int32)
    stored = stored_shape(shape, axis, levels, device)
    if levels is not SIGNS and device != CPU:
        # The planes begin at multiples of more words.
        whole = np.zeros((*lines, bits, stored[axis] // bits // 64), canonical.dtype)
        whole[..., : planes.shape[-1]] = planes
        canonical = whole.reshape(*lines, -1)
    with device.scope():
        words = backends.get(device).from_canonical(canonical, stored, axis)
        return PackedMatrix._of(words, device.xp.asarray(popcounts), shape, axis, device, levels)


def stored_shape(
    shape: tuple[int, ...], axis: int, levels: Levels, device: Device
) -> tuple[int, ...]:
    """Return the shape of the matrix of bits that a backend stores, with at least two axes."""
    stored = list(as_matrix(shape))
    stored[axis] = stored_k(stored[axis], levels, device.kind)
    return tuple(stored)


def as_matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that a backend sees: a vector becomes a matrix of one line."""
    return shape if len(shape) > 1 else (1, *shape)

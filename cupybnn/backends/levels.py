"""The values that an element of a packed matrix can have, and the bit planes that hold them.

An element is one of ``2**bits`` equally spaced levels, numbered from 0. The bits of its number, the
highest first, are in the planes of the matrix: a plane is a matrix of single bits, and all planes
of a line follow each other, as if the line were `bits` times as long. Each plane begins at a
multiple of `Levels.unit` bits, which depends on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

__all__ = ["MOST_BITS", "SIGNS", "Levels", "levels_of", "numbers_of", "stored_k"]

#: Bits of an element, at most.
MOST_BITS = 8
#: Bits at a multiple of which a plane begins, in host memory and on a GPU: a word, and a chunk.
_UNITS = {"cpu": 64, "cuda": 1024}


@dataclass(frozen=True)
class Levels:
    """The levels of an element of so many bits.

    Attributes
    ----------
    bits : int
        From 1 to `MOST_BITS`.
    signed : bool
        Signed levels are the odd integers from ``-(2**bits - 1)`` to ``2**bits - 1``, so +1 and -1
        for one bit; unsigned ones are 0 to ``2**bits - 1``.
    """

    bits: int
    signed: bool

    @property
    def top(self) -> int:
        """The greatest level's value and, of unsigned levels, its number."""
        return (1 << self.bits) - 1

    @property
    def step(self) -> int:
        """Difference between neighboring levels."""
        return 2 if self.signed else 1

    @property
    def low(self) -> int:
        """The least level's value."""
        return -self.top if self.signed else 0

    @property
    def dtype(self) -> np.dtype:
        """The smallest integer dtype that holds all levels, unsigned for unsigned ones."""
        if not self.signed:
            return np.dtype(np.uint8)
        return np.dtype(np.int8 if self.bits < 8 else np.int16)

    def __str__(self) -> str:
        return f"{self.bits}{'' if self.signed else ' unsigned'} bit{'s' * (self.bits > 1)}"


@cache
def levels_of(bits: int, signed: bool) -> Levels:
    """Return the levels of so many bits: the same object each time."""
    return Levels(bits, signed)


#: The levels of a matrix of signs.
SIGNS = levels_of(1, True)


def stored_k(k: int, levels: Levels, kind: str) -> int:
    """Return the bits of a line of `k` elements in memory of a device's kind, planes aligned."""
    if levels is SIGNS:
        return k
    unit = _UNITS[kind]
    chunks = -(-k // unit) or (kind == "cuda")  # an empty line has one chunk of zeros there
    return levels.bits * unit * int(chunks)


def numbers_of(x: np.ndarray, levels: Levels) -> np.ndarray:
    """Return the numbers of the levels nearest to the elements of `x`.

    Of two levels as near, the greater is taken; NaN gives the least. So signed levels of one bit
    are those of `cupybnn.sign`.

    Parameters
    ----------
    x : ndarray
        Real; bool stands for the greatest and the least of signed levels of one bit, for +1 and -1
        of more, and for 1 and 0 of unsigned ones.

    Returns
    -------
    ndarray of uint8, shape of `x`
    """
    if x.dtype.kind == "b":
        if not levels.signed:
            return x.astype(np.uint8)
        x = np.where(x, np.int8(1), np.int8(-1))
    if x.dtype.kind not in "iu" and x.dtype.itemsize < 4:
        x = x.astype(np.float32)
    if x.dtype.kind in "iu" and x.dtype.itemsize == 1:
        x = x.astype(np.int16)
    whole = x
    # Signed level number n is nearest from 2 n - 2**bits on; halves are exact, as floor is.
    least, most = (-(1 << levels.bits), levels.top) if levels.signed else (0, levels.top)
    with np.errstate(all="ignore"):
        if x.dtype.kind not in "iu":
            whole = np.floor(x)
            if not levels.signed:
                whole = whole + (x - whole >= 0.5)
            whole = np.where(whole >= least, whole, x.dtype.type(least))  # NaN, too
        elif x.dtype.kind == "i":
            whole = np.maximum(whole, x.dtype.type(least))
        whole = np.minimum(whole, whole.dtype.type(most)).astype(np.int16)
    if levels.signed:
        whole = (whole >> np.int16(1)) + np.int16(1 << (levels.bits - 1))
    return whole.astype(np.uint8)

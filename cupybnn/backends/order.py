"""The order of training images: keyed permutations, computed element by element.

The permutation of an epoch is not stored. A function computes the image at each position, so each
rank and each kernel computes what it needs, of any epoch, and the backends agree bit for bit.

The function is a Feistel network on numbers of b bits, where 2**b is the smallest power of two
that is not less than the number of images. In each of twelve rounds, a keyed function of one half
changes the other; the halves take turns. If b is odd, one half has a bit more. A result that is not
less than the number of images is put in again, until one is less (cycle walking: Black and Rogaway,
Ciphers with arbitrary finite domains, CT-RSA 2002). Mitchell, Stokes, Frank and Holmes
(Bandwidth-optimal random shuffling for GPUs, ACM Transactions on Parallel Computing 9, 2022)
shuffle on GPUs by such networks. Two rules are for few images, where permutations can be counted:
b is at least 5, and each pass begins by adding a key. Without that key, all permutations of 2**b
numbers would be even.

The keys of an epoch are words of `cupybnn.backends.random` with the epoch as the counter: words 0
to 11 are the keys of the rounds, 12 is the key that is added, and 13 and 14 make the offset of
systematic sampling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["LEAST_BITS", "MOST_IMAGES", "ROUNDS", "Order"]

ROUNDS = 12
#: Bits of the smallest network.
LEAST_BITS = 5
#: Greatest number of images in an epoch, and in the data set: their indices are int32.
MOST_IMAGES = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Order:
    """What decides the image at each position.

    A backend's ``fill_order(order, step, batch, first, out)`` writes images into `out`, an int32
    array of shape (steps, images), a row for each step from `step` on. A row begins at place
    `first` of the step's batch; the last place of a batch is followed by its first.

    Attributes
    ----------
    images : int
        Number of images in an epoch.
    seed : int
        From 0 to 2**64 - 1.
    shuffle : bool
        Whether epochs are permuted.
    ends : array of float64, shape (images in the data set,), or None
        On the backend's device. For systematic sampling: image i covers the interval from the
        previous end to its own, and occurs once for each of the points ``offset``, ``offset + 1``,
        ... in it. These points are permuted. None: image i is point i.
    last : int
        The last image of positive weight. Points beyond all ends, which rounding can cause, get it.
    """

    images: int
    seed: int
    shuffle: bool
    ends: Any = None
    last: int = 0

    @property
    def bits(self) -> int:
        """Bits of the network; 0 if epochs are not permuted."""
        return max(LEAST_BITS, (self.images - 1).bit_length()) if self.shuffle else 0

    @property
    def offset_bits(self) -> int:
        """Bits of an offset: as many as leave every sum of it and a position exact in float64."""
        return 53 - self.images.bit_length()

"""Operands of a CPU product as lines of bits, and their conversion to floats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cupybnn.backends.numpy_bits import write_bits
from cupybnn.backends.numpy_threads import parallel_for

__all__ = ["BLOCK", "PAIR", "Lines", "bits_to_signs", "blocks"]

PAIR = 4096
# Elements converted at a time, so that they, their bits and floats stay in a core's L2 cache.
BLOCK = 1 << 17

BYTE_ONE = np.array(1, np.int8)
ALL_BITS = np.array(0xFF, "<u2")
PAIR_BITS = np.array(2 * (1 + PAIR), "<u2")
PAIR_STEP = np.array(2 * PAIR, np.int16)
PAIR_MIDDLE = np.array(1 + PAIR, np.int16)


class Lines:
    """An operand as lines over K, packed or not: the rows of `a`, the columns of `b`.

    Parameters
    ----------
    x : ndarray, shape (..., lines, K), of numbers, or (..., lines, words) of packed words
    k : int
    packed : bool
    """

    __slots__ = ("k", "packed", "x")

    def __init__(self, x: np.ndarray, k: int, packed: bool) -> None:
        self.x = x
        self.k = k
        self.packed = packed

    @classmethod
    def of(cls, operand: Any, k_axis: int) -> Lines:
        """Return the lines of an array or PackedMatrix with K along `k_axis`, -1 or -2."""
        if isinstance(operand, np.ndarray):
            x = operand if k_axis == -1 else operand.swapaxes(-1, -2)
            return cls(x, x.shape[-1], False)
        return cls(operand.words, operand.k, True)

    @property
    def count(self) -> int:
        """Number of lines in a matrix."""
        return self.x.shape[-2]

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.x.size // max(1, self.x.shape[-1]) * self.k

    @property
    def adjacent(self) -> bool:
        """Whether neighbors in memory belong to neighboring lines rather than to one line."""
        return not self.packed and abs(self.x.strides[-2]) < abs(self.x.strides[-1])

    def broadcast(self, batch: tuple[int, ...]) -> Lines:
        """Broadcast the matrices, without a copy, to leading axes `batch`."""
        return Lines(np.broadcast_to(self.x, batch + self.x.shape[-2:]), self.k, self.packed)

    def flat(self) -> Lines:
        """Return all matrices of a batch as one; a view if possible."""
        return Lines(self.x.reshape(-1, self.x.shape[-1]), self.k, self.packed)

    def at(self, index: tuple[Any, ...]) -> Lines:
        """Return one or some matrices of a batch."""
        return Lines(self.x[index], self.k, self.packed)

    def signs(self) -> np.ndarray:
        """Return all elements as float32 +1 and -1, shape (..., lines, K)."""
        if self.packed:
            octets = np.ascontiguousarray(self.x).view(np.uint8)
            bits = np.unpackbits(octets, axis=-1, count=self.k, bitorder="little")
        else:
            bits = write_bits(self.x)
        return bits_to_signs(bits).astype(np.float32)

    def words(self, lines: slice) -> np.ndarray:
        """Return packed words of some lines, as stored by `PackedMatrix`."""
        if self.packed:
            return self.x[lines]
        count = len(range(*lines.indices(self.count)))
        words = np.zeros((count, -(-self.k // 64)), "<u8")
        bits = np.empty((count, self.k), bool)
        self.write_bits(lines, slice(0, self.k), bits)
        octets = np.packbits(bits, axis=1, bitorder="little")
        words.view(np.uint8)[:, : octets.shape[1]] = octets
        return words

    def write_bits(self, lines: slice, ks: slice, out: np.ndarray) -> None:
        """Write True for +1 and False for -1 into `out`, shape (lines, ks).

        Parameters
        ----------
        lines, ks : slice
            With explicit start and stop; for packed lines, `ks` starts at a multiple of 8.
        out : ndarray of bool
        """
        if self.packed:
            octets = self.x[lines].view(np.uint8)[:, ks.start // 8 : -(-ks.stop // 8)]
            bits = np.unpackbits(octets, axis=1, count=ks.stop - ks.start, bitorder="little")
            out[...] = bits.view(bool)
        else:
            write_bits(self.x[lines, ks], out)

    def panel(self, lines: slice, ks: slice, memory: np.ndarray) -> np.ndarray:
        """Return +1.0 and -1.0 for some lines and K, shape (lines, ks), stored in `memory`."""
        n, k = lines.stop - lines.start, ks.stop - ks.start
        floats = memory[: n * k].reshape((k, n) if self.adjacent else (n, k))

        def fill(start: int, stop: int) -> None:
            bits = np.empty((_step(floats.shape[1], stop - start), floats.shape[1]), bool)
            for here in blocks(start, stop, len(bits)):
                part = bits[: here.stop - here.start]
                if self.adjacent:
                    self.write_bits(lines, _within(ks, here), part.T)
                else:
                    self.write_bits(_within(lines, here), ks, part)
                floats[here] = bits_to_signs(part)

        parallel_for(len(floats), n * k, fill)
        return floats.T if self.adjacent else floats

    def pair_panel(self, lines: slice, ks: slice, memory: np.ndarray) -> np.ndarray:
        """Return two lines per float, lo + 4096 * hi, stored in `memory`.

        Returns
        -------
        ndarray of float32, shape (ceil(lines / 2), ks)
            If lines are adjacent in memory, pair j holds lines 2j (lo) and 2j + 1 (hi); otherwise
            lines j (lo) and ceil(lines / 2) + j (hi). A missing hi is -1.
        """
        if self.adjacent:
            return self._adjacent_pairs(lines, ks, memory)
        return self._distant_pairs(lines, ks, memory)

    def _adjacent_pairs(self, lines: slice, ks: slice, memory: np.ndarray) -> np.ndarray:
        # Two neighboring bools are the bytes of one 16-bit number, so one pass over these numbers
        # weights both lines, without floats for each line.
        n, k = lines.stop - lines.start, ks.stop - ks.start
        half = -(-n // 2)
        floats = memory[: half * k].reshape(k, half)

        def fill(start: int, stop: int) -> None:
            bits = np.zeros((_step(2 * half, stop - start), 2 * half), bool)
            for here in blocks(start, stop, len(bits)):
                part = bits[: here.stop - here.start]
                part[:, n:] = False
                self.write_bits(lines, _within(ks, here), part[:, :n].T)
                pairs = part.view("<u2")  # 0x0001 and 0x0100 for lo and hi
                pairs *= ALL_BITS  # 0x00ff and 0xff00
                pairs &= PAIR_BITS  # 2 and 2 * 4096
                weights = part.view("<i2")
                weights -= PAIR_MIDDLE  # ±1 ± 4096
                floats[here] = weights

        parallel_for(k, n * k, fill)
        return floats.T

    def _distant_pairs(self, lines: slice, ks: slice, memory: np.ndarray) -> np.ndarray:
        n, k = lines.stop - lines.start, ks.stop - ks.start
        half = -(-n // 2)
        floats = memory[: half * k].reshape(half, k)

        def fill(start: int, stop: int) -> None:
            bits = np.empty((2, _step(2 * k, stop - start), k), bool)
            weights = np.empty(bits.shape, np.int16)
            for here in blocks(start, stop, bits.shape[1]):
                rows = here.stop - here.start
                low, high = bits[:, :rows]
                highs = min(rows, n - half - here.start)  # the last line may have no partner
                self.write_bits(_within(lines, here), ks, low)
                there = slice(half + here.start, half + here.start + highs)
                self.write_bits(_within(lines, there), ks, high[:highs])
                high[highs:] = False
                w, w_high = weights[:, :rows]
                w[...] = low.view(np.int8)
                w_high[...] = high.view(np.int8)
                w += w
                w_high *= PAIR_STEP
                w += w_high
                w -= PAIR_MIDDLE
                floats[here] = w

        parallel_for(half, n * k, fill)
        return floats


def bits_to_signs(bits: np.ndarray) -> np.ndarray:
    """Convert the bytes 0 and 1 to -1 and 1, in place."""
    signs = bits.view(np.int8)
    signs -= BYTE_ONE  # -1 and 0
    signs |= BYTE_ONE  # -1 and 1
    return signs


def _step(width: int, rows: int) -> int:
    """Return the number of rows of `width` elements in a block."""
    return max(1, min(rows, BLOCK // width))


def blocks(start: int, stop: int, step: int) -> Iterator[slice]:
    """Split ``range(start, stop)`` into slices of length `step`."""
    for i in range(start, stop, step):
        yield slice(i, min(i + step, stop))


def _within(outer: slice, inner: slice) -> slice:
    """Return the subrange `inner`, which is relative to `outer`, as an absolute range."""
    return slice(outer.start + inner.start, outer.start + inner.stop)

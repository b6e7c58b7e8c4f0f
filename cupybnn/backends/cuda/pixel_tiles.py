"""What a block of the launch for pixels has of each layer, laid out as its lanes take it.

See ``kernels/sm90_pixel_network.cu``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["BitLayer", "PixelLayer", "RealEnd", "bit_tiles", "end_tiles", "pixel_tiles"]

_TILE = 32  # units of a block
_BYTES_OF_STEP = 32  # of a line, for one instruction


@dataclass(frozen=True)
class PixelLayer:
    """The first layer: digits of its weights, as `cupybnn.deploy.digits.pixel_digits` has them.

    Attributes
    ----------
    digits : ndarray of int8, shape (digits, units, inputs + 2)
    threshold : ndarray of int32, shape (units,)
    flip : ndarray of bool, shape (units,)
    """

    digits: np.ndarray
    threshold: np.ndarray
    flip: np.ndarray


@dataclass(frozen=True)
class BitLayer:
    """A layer of signs by signs.

    Attributes
    ----------
    plus : ndarray of bool, shape (inputs, units)
        Which weights are +1.
    threshold : ndarray of int32, shape (units,)
    flip : ndarray of bool, shape (units,)
    """

    plus: np.ndarray
    threshold: np.ndarray
    flip: np.ndarray


@dataclass(frozen=True)
class RealEnd:
    """The last layer: signs by real weights, and steps after that.

    Attributes
    ----------
    weight : ndarray of float32, shape (inputs, classes)
    steps : sequence of (kind, cupy.ndarray or None)
        See `cupybnn.backends.cuda.steps`.
    """

    weight: np.ndarray
    steps: Sequence[tuple[str, Any]] = ()


def _fragments(words: np.ndarray) -> np.ndarray:
    """Return words of lines in the order in which lanes take them.

    Parameters
    ----------
    words : ndarray of uint32, shape (32 * tiles, 8 * steps)

    Returns
    -------
    ndarray of uint32, shape (tiles, 256 * steps)
    """
    lines, width = words.shape
    # Unit 16 m + 8 half + g, word 8 step + 4 high + q; a lane is 4 g + q and takes four words.
    parts = words.reshape(lines // 32, 2, 2, 8, width // 8, 2, 4)
    return parts.transpose(0, 1, 4, 3, 6, 5, 2).reshape(lines // 32, -1)


def _thresholds(threshold: np.ndarray, flip: np.ndarray, tiles: int) -> np.ndarray:
    """Return thresholds and flips of each tile, shape (tiles, 36), as uint32."""
    units = len(threshold)
    out = np.zeros((tiles, 36), np.int32)
    whole = np.full(tiles * _TILE, np.iinfo(np.int32).max, np.int32)
    whole[:units] = threshold
    out[:, :_TILE] = whole.reshape(tiles, _TILE)
    bits = np.zeros(tiles * _TILE, bool)
    bits[:units] = flip
    packed = np.packbits(bits.reshape(tiles, _TILE), axis=1, bitorder="little")
    out[:, _TILE] = packed.view("<i4")[:, 0]
    return out.view(np.uint32)


def _tiles(units: int) -> int:
    return -(-units // _TILE)


def pixel_tiles(layer: PixelLayer) -> tuple[np.ndarray, int]:
    """Return a layer's tiles and its steps."""
    count, units, width = layer.digits.shape
    tiles, steps = _tiles(units), -(-width // _BYTES_OF_STEP)
    padded = np.zeros((count, tiles * _TILE, steps * _BYTES_OF_STEP), np.int8)
    padded[:, :units, :width] = layer.digits
    parts = [_fragments(each.view("<u4")) for each in padded]
    return np.concatenate([*parts, _thresholds(layer.threshold, layer.flip, tiles)], 1), steps


def bit_tiles(layer: BitLayer) -> tuple[np.ndarray, int]:
    """Return a layer's tiles and its steps."""
    inputs, units = layer.plus.shape
    tiles, steps = _tiles(units), -(-inputs // (8 * _BYTES_OF_STEP))
    lines = np.zeros((tiles * _TILE, steps * _BYTES_OF_STEP), np.uint8)
    packed = np.packbits(layer.plus.T, axis=1, bitorder="little")
    lines[:units, : packed.shape[1]] = packed
    # product = inputs - 2 ones(weights) - 2 ones(signs) + 4 ones(both)
    least = layer.threshold.astype(np.int64) - inputs + 2 * layer.plus.sum(0)
    least = np.clip(least, -(1 << 30), 1 << 30).astype(np.int32)
    parts = [_fragments(lines.view("<u4")), _thresholds(least, layer.flip, tiles)]
    return np.concatenate(parts, 1), steps


def end_tiles(end: RealEnd) -> np.ndarray:
    """Return the last layer's tiles: weights of 32 inputs each, for all classes."""
    inputs, classes = end.weight.shape
    padded = np.zeros((_tiles(inputs) * _TILE, classes), np.float32)
    padded[:inputs] = end.weight
    return padded.view(np.uint32).reshape(-1, _TILE * classes)

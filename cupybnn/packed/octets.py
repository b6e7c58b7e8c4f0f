"""Conversion between packed matrices and the bytes of `numpy.packbits`."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupybnn import backends
from cupybnn.backends.devices import device_of
from cupybnn.backends.interop import as_native
from cupybnn.backends.levels import SIGNS
from cupybnn.packed.lines import lines_of
from cupybnn.packed.matrix import PackedMatrix, as_matrix
from cupybnn.packed.signs import packed_axis

__all__ = ["from_packbits", "to_packbits"]

# Each byte with its bits reversed.
REVERSED = np.packbits(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)[:, ::-1], 1)
REVERSED = REVERSED[:, 0]


def from_packbits(octets: Any, k: Any, axis: Any, bitorder: str) -> PackedMatrix:
    """Implement `PackedMatrix.from_packbits`."""
    function = "from_packbits"
    octets = as_native(octets, f"'octets' of {function}")
    if octets.dtype != np.uint8:
        raise TypeError(
            f"The 'octets' of {function} must be of dtype uint8, as from numpy.packbits; got "
            f"{octets.dtype}."
        )
    axis = packed_axis(octets, axis, "octets", function)
    if isinstance(k, (bool, np.bool_)) or not isinstance(k, (int, np.integer)) or k < 0:
        raise TypeError(
            f"The 'k' of {function} must be the number of elements along the packed axis, an "
            f"integer of at least 0; got {k!r}."
        )
    k = int(k)
    if octets.shape[axis] != -(-k // 8):
        raise ValueError(
            f"The 'octets' of {function} must have ceil(k / 8) bytes along axis {axis}, "
            f"{-(-k // 8)} for k = {k}; got shape {octets.shape}."
        )
    _check_bitorder(bitorder, function)
    device = device_of(octets)
    xp = device.xp
    shape = list(octets.shape)
    shape[axis] = k
    with device.scope():
        along = octets if axis == -1 else octets.swapaxes(-1, -2)
        along = along.reshape(as_matrix(along.shape))
        padded = xp.zeros((*along.shape[:-1], -(-k // 64) * 8), np.uint8)
        padded[..., : along.shape[-1]] = _reordered(xp, along, bitorder)
        if k % 8:  # numpy.packbits pads with zeros, others may not
            padded[..., k // 8] &= np.uint8((1 << k % 8) - 1)
        lines = padded.view("<u8") if k else xp.zeros(padded.shape, "<u8")
        popcounts = xp.bitwise_count(lines).sum(axis=-1, dtype=np.int32)
        words = backends.get(device).from_lines(lines, as_matrix(tuple(shape)), axis)
    return PackedMatrix._of(words, popcounts, tuple(shape), axis, device)


def to_packbits(p: PackedMatrix, bitorder: str) -> Any:
    """Implement `PackedMatrix.to_packbits`."""
    _check_bitorder(bitorder, "to_packbits")
    if p.levels is not SIGNS:
        raise ValueError(
            f"Only a PackedMatrix of signs has the bytes of numpy.packbits; got one of {p.levels} "
            f"per element. Unpack it first: p.unpack()."
        )
    xp = p.device.xp
    with p.device.scope():
        lines = lines_of(p)
        size = -(-p.k // 8)
        octets = lines.view(np.uint8)[..., :size] if size else xp.zeros(lines.shape, np.uint8)
        octets = _reordered(xp, octets, bitorder)
        if p.ndim == 1:
            octets = octets[0]
        elif p.axis == -2:
            octets = octets.swapaxes(-1, -2)
        return xp.array(octets, order="C")  # never a view of the words


def _reordered(xp: Any, octets: Any, bitorder: str) -> Any:
    return octets if bitorder == "little" else xp.asarray(REVERSED)[octets]


def _check_bitorder(bitorder: Any, function: str) -> None:
    if not isinstance(bitorder, str) or bitorder not in ("big", "little"):
        raise ValueError(
            f"The 'bitorder' of {function} must be 'big' (numpy.packbits's default) or 'little'; "
            f"got {bitorder!r}."
        )

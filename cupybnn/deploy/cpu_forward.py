"""The forward pass of a packed network of pixels by compiled kernels (the extra ``cpu``)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from cupybnn import backends, settings
from cupybnn.backends import cpu
from cupybnn.backends.cpu.addresses import address
from cupybnn.backends.devices import CPU
from cupybnn.backends.numpy_threads import parallel_for
from cupybnn.deploy import digits
from cupybnn.deploy.inputs import InputSpec
from cupybnn.deploy.layers import PackedLayer, apply_steps
from cupybnn.packed import PackedMatrix

__all__ = ["CpuForward"]

_WORD = np.dtype("<u8")
# Rows that go through all layers in one call: more are faster together.
_FEW_ROWS = 4
# Products with a pixel, and with a sign, that take as long as an element of NumPy's own work.
_PIXELS_AN_ELEMENT, _SIGNS_AN_ELEMENT = 16, 8


class CpuForward:
    """Logits of pixels, a byte each.

    The sums of the first layer are exact, with weights of 22 bits or more, as on a GPU: see
    `cupybnn.deploy.digits`.

    Parameters
    ----------
    layers : sequence of PackedLayer
        On the CPU.
    inputs : InputSpec

    Raises
    ------
    ValueError
        If the layers are of another kind, or the kernels are not there.
    """

    def __init__(self, layers: Sequence[PackedLayer], inputs: InputSpec) -> None:
        if cpu.compiled() is None:
            raise ValueError("the kernels are not there")
        from cupybnn.backends.cpu import network

        self._kernels = network
        if inputs.pixel_max is None or layers[0].threshold is None or len(layers) < 2:
            raise ValueError("it has no first layer for pixels, or no last one for logits")
        first, *hidden, last = layers
        if last.threshold is not None:
            raise ValueError("it has no last layer for logits")
        if any(layer.product != "bits" or layer.threshold is None for layer in hidden):
            raise ValueError("a layer between has real weights")
        self._layers, self._hidden, self._last = tuple(layers), hidden, last
        self._kept: list[Any] = []
        self._first_layer = self._first(first, np.float32(1.0 / inputs.pixel_max))
        self._between = self._addresses(hidden)
        self._end_layer(last)
        self._words = -(-max(layer.units for layer in (first, *hidden)) // 64)
        # More than a row of a large network is faster by layer, on several threads.
        self._few_rows = _FEW_ROWS if first.inputs * first.units < _LARGE else 1
        self._through, self._memory = network.through.call, threading.local()
        self._few_arguments = self._first_layer, self._between, len(hidden), *self._end_arguments

    def _array(self, x: Any, dtype: Any) -> int:
        """Return the address of an array that is kept."""
        array = np.ascontiguousarray(x, dtype)
        self._kept.append(array)
        return address(array)

    def _first(self, layer: PackedLayer, factor: np.float32) -> int:
        weight = layer.weight if layer.signs is None else layer.signs
        if not np.isfinite(weight).all():
            raise ValueError("a weight is not finite")
        if layer.signs is None:
            whole, exponent = digits.fixed_point(weight)
        else:
            whole, exponent = weight.astype(np.int64), np.zeros(layer.units, np.int64)
        # As few bits fewer as fit, but for what rounding adds.
        many = np.maximum(np.abs(whole).max(axis=0) / _MOST_HIGH, _most(whole) / _MOST_SUM)
        shift = np.ceil(np.log2(np.maximum(many, 1))).astype(np.int64)
        for _ in range(2):
            high = _rounded(whole, shift)
            large = (np.abs(high).max(axis=0) > _MOST_HIGH) | (_most(high) > _MOST_SUM)
            if not large.any():
                break
            shift += large
        low = whole - (high << shift)
        if large.any() or (np.abs(low) > _MOST_HIGH).any() or (_most(low) > _MOST_SUM).any():
            raise ValueError("sums do not fit in 32 bits")
        least = np.array(digits.least_sums(layer.threshold, factor, exponent), np.int64)
        padded = -(-layer.inputs // self._kernels.STEP) * self._kernels.STEP
        whole_words = -(-layer.units // 64) * 64
        parts = np.zeros((2, whole_words, padded), np.int16)
        parts[:, : layer.units, : layer.inputs] = high.T, low.T
        ends = np.zeros((2, whole_words), np.int64)
        ends[:, : layer.units] = least, shift
        flips = np.packbits(np.pad(layer.flip, (0, whole_words - layer.units)), bitorder="little")
        self._padded = padded
        numbers = [
            *(self._array(x, np.int16) for x in parts), *(self._array(x, np.int64) for x in ends),
            self._array(flips, np.uint8), layer.inputs, padded, layer.units,
        ]  # fmt: skip
        assert len(numbers) == self._kernels.FIRST
        return self._array(numbers, np.int64)

    def _addresses(self, hidden: Sequence[PackedLayer]) -> int:
        numbers = [
            (
                self._array(y.weight.words, _WORD), self._array(y.threshold, np.int32),
                self._array(y.flip, np.uint8), y.inputs, y.units, -(-y.inputs // 64),
            )
            for y in hidden
        ]  # fmt: skip
        return self._array(numbers or [0], np.int64)

    def _end_layer(self, layer: PackedLayer) -> None:
        if layer.product == "bits":
            weight = layer.weight.unpack(np.float32)
        else:
            weight = layer.weight if layer.signs is None else layer.signs
        octets = -(-layer.inputs // 8)
        lines = np.zeros((layer.units, 8 * octets), np.float32)
        lines[:, : layer.inputs] = weight.T
        self._end_arguments = self._array(lines, np.float32), 32 * octets, octets, layer.units

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return the logits.

        Parameters
        ----------
        x : ndarray of uint8, shape (rows, inputs), whose rows are contiguous

        Returns
        -------
        ndarray of float32, shape (rows, units of the last layer)
        """
        rows = len(x)
        out = np.empty((rows, self._last.units), np.float32)
        if rows <= self._few_rows:
            memory = self._memory
            if not hasattr(memory, "addresses"):
                memory.kept = self._scratch(), np.empty((2, self._words), _WORD)
                memory.addresses = tuple(address(x) for x in memory.kept)
            self._through(
                address(x), x.strides[0], rows, *self._few_arguments, *memory.addresses,
                8 * self._words, address(out),
            )  # fmt: skip
        else:
            self._by_layer(x, out)
        steps = self._last.steps
        return np.asarray(apply_steps(steps, out)) if steps else out

    def _scratch(self) -> np.ndarray:
        return np.empty(self._kernels.scratch_bytes(self._padded), np.uint8)

    def _by_layer(self, x: np.ndarray, out: np.ndarray) -> None:
        rows, first = len(x), self._layers[0]
        signs = np.empty((rows, -(-first.units // 64)), _WORD)
        threads, kernels = settings.kernel_threads(), self._kernels

        def multiply(start: int, stop: int) -> None:
            scratch = self._scratch()
            if by_rows:
                here, units, count = start * kernels.ROWS, (0, first.units), stop * kernels.ROWS
                count = min(count, rows) - here
            else:
                here, units, count = 0, (64 * start, min(64 * stop, first.units)), rows
            kernels.first(
                address(x) + here * x.strides[0], x.strides[0], count, self._first_layer,
                *units, address(scratch), address(signs) + here * signs.strides[0],
                signs.strides[0],
            )  # fmt: skip

        by_rows = rows >= 2 * kernels.ROWS * threads
        parts = -(-rows // kernels.ROWS) if by_rows else signs.shape[1]
        products = rows * first.inputs * first.units
        parallel_for(parts, products // _PIXELS_AN_ELEMENT, multiply, threads)
        backend = backends.get(CPU)
        packed = PackedMatrix._of(
            signs, np.bitwise_count(signs).sum(axis=-1, dtype=np.int32), (rows, first.units), -1,
            CPU,
        )  # fmt: skip
        for layer in self._hidden:
            words, ones = backend.gemm_packed(packed, layer.weight, layer.threshold, layer.flip)
            packed = PackedMatrix._of(words, ones, (rows, layer.units), -1, CPU)
        words = np.ascontiguousarray(packed.words)

        def sum_up(start: int, stop: int) -> None:
            kernels.end(
                address(words) + start * words.strides[0], words.strides[0], stop - start,
                *self._end_arguments, address(out) + start * out.strides[0],
            )  # fmt: skip

        products = rows * self._last.inputs * self._last.units
        parallel_for(rows, products // _SIGNS_AN_ELEMENT, sum_up, threads)


# Of a part of a weight, and of the sum of 255 times those of a unit.
_MOST_HIGH, _MOST_SUM = (1 << 15) - 1, (1 << 31) - 1
#: Weights of a first layer from which on threads are worth it, for a few rows, too.
_LARGE = 1 << 21


def _rounded(whole: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Return ``whole / 2**shift`` rounded to the nearest, so that what is left is at most half."""
    half: np.ndarray = (1 << shift) >> 1
    return (whole + half) >> shift


def _most(part: np.ndarray) -> np.ndarray:
    """Return the greatest sum of pixels times parts of weights, of each unit."""
    return 255 * np.abs(part).sum(axis=0)

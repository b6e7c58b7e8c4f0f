"""A batch of pixels through a packed network by launches that were prepared, one after the other.

A graph takes longer to start than so few launches do, and needs its input and its result in places
of its own; here the first launch reads the caller's pixels and the last one writes new memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cupybnn.backends.cuda import resident
from cupybnn.backends.cuda.byte_product import PixelProduct, PlaneProduct
from cupybnn.backends.cuda.packing import words_shape
from cupybnn.backends.cuda.product import prepare_packed
from cupybnn.backends.cuda.resident import Weights
from cupybnn.backends.cuda.results import Results
from cupybnn.backends.devices import Device
from cupybnn.deploy.layers import PackedLayer
from cupybnn.packed import PackedMatrix

__all__ = ["PixelPlan", "ResidentPlan"]


class PixelPlan:
    """The launches for batches of one size.

    Parameters
    ----------
    rows : int
        Images of a batch.
    pixels : PixelProduct
        Of the first layer.
    hidden : sequence of PackedLayer
        Products of signs with a threshold.
    last : PlaneProduct
        Of the last layer.
    steps : sequence of (kind, array)
        After it.
    device : Device
        The current device.

    Notes
    -----
    Activations have memory of their own, so calls must follow each other on the device.
    """

    def __init__(
        self, rows: int, pixels: PixelProduct, hidden: Sequence[PackedLayer], last: PlaneProduct,
        steps: Sequence[tuple[str, Any]], device: Device,
    ) -> None:  # fmt: skip
        import cupy

        counts = cupy.zeros((1 + len(hidden), rows), np.int32)
        lines = pixels.lines_like(rows)
        self._arrange = pixels.arrangement(lines, rows, counts)

        def signs(i: int, units: int) -> PackedMatrix:
            # Padding stays zeros: no launch writes it.
            words = cupy.zeros(words_shape(1, rows, units), np.uint32)
            return PackedMatrix._of(words, counts[i], (rows, units), -1, device)

        x = signs(0, pixels.units)
        self._kept: list[Any] = [lines, counts, x, pixels, last, *hidden, *steps]
        self._launches: list[Callable[[int], None]] = [
            pixels.prepared(lines, rows, x.words, x.popcounts)
        ]
        for i, layer in enumerate(hidden, 1):
            y = signs(i, layer.units)
            self._launches.append(
                prepare_packed(x, layer.weight, layer.threshold, layer.flip, y.words, y.popcounts)
            )
            self._kept.append(y)
            x = y
        planes = last.planes_like(rows)
        product, self._sum = last.prepared(x, planes, steps)
        self._launches.append(product)
        self._kept.append(planes)
        self._new = Results((rows, last.units)).new

    def run(self, x: Any, stream: int) -> Any:
        """Return the logits of pixels in new memory.

        Parameters
        ----------
        x : cupy.ndarray of uint8, shape (rows, inputs), C-contiguous
        stream : int
            Handle of the current stream.
        """
        out = self._new(stream)
        self._arrange(x, stream)
        for launch in self._launches:
            launch(stream)
        self._sum(out, stream)
        return out


class ResidentPlan:
    """The launches for batches of one size, of layers whose weights stay in shared memory.

    Parameters
    ----------
    rows : int
        Images of a batch.
    layers : sequence of Weights
        From the first to the last, at least three; each takes so many rows.

    Notes
    -----
    As for `PixelPlan`.
    """

    def __init__(self, rows: int, layers: Sequence[Weights]) -> None:
        import cupy

        first, *hidden, last = layers
        self._rows, self._cols = rows, first.shape.width
        self._pitch = -(-self._cols // 16) * 16  # as the copy engine needs it
        #: Pixels where the caller's are not aligned.
        self._copy: Any = None
        # The ones of each row that comes out of a layer. The launch after next clears them, since
        # nothing reads them any more; the first launch clears those of the last signs.
        ones = cupy.zeros((len(layers) - 1, -(-rows // 64) * 64), np.int32)
        words = [
            # Padding stays zeros: no launch writes it.
            cupy.zeros(words_shape(1, rows, layer.shape.units), np.uint32)
            for layer in layers[:-1]
        ]
        counts = None, ones[0], ones[-1]
        self._first = first.launch(rows, None, words[0], resident.MAP, ones=counts).go
        self._hidden = []
        for i, layer in enumerate(hidden, 1):
            counts = ones[i - 1], ones[i], ones[i - 2] if i > 1 else None
            self._hidden.append(layer.launch(rows, words[i - 1], words[i], ones=counts).go)
        counts = ones[-1], None, ones[-2]
        self._last = last.launch(rows, words[-1], None, resident.OUT, ones=counts).go
        self._kept = [ones, words, layers]
        self._new = Results((rows, last.shape.units)).new
        # Launches read the weights before they wait for the work in front of them.
        cupy.cuda.get_current_stream().synchronize()

    def run(self, x: Any, stream: int) -> Any:
        """Return the logits of pixels in new memory: see `PixelPlan.run`."""
        address, pitch = x.data.ptr, self._cols
        if (address | pitch) & 15:
            if self._copy is None:
                import cupy

                self._copy = cupy.zeros((self._rows, self._pitch), np.uint8)
            self._copy[:, : self._cols] = x
            address, pitch = self._copy.data.ptr, self._pitch
        out = self._new(stream)
        self._first(stream, *resident.pixel_map(address, self._rows, self._cols, pitch))
        for go in self._hidden:
            go(stream)
        self._last(stream, out.data.ptr)
        return out

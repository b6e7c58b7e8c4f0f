"""The forward pass of a packed network on a GPU, in as few launches as a batch allows.

A few rows are one launch (`cupybnn.backends.cuda.packed_network`). More rows are a launch or two
for each layer, captured as a CUDA graph for each batch size once it has come a second time. Batches
whose activations are large, and all where nothing can be captured, are launched layer by layer.

There, real weights are whole numbers where a product allows it (`cupybnn.deploy.cuda_products`).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cupybnn.backends.cuda import blas, packed_network
from cupybnn.backends.cuda.byte_product import PixelProduct, PlaneProduct
from cupybnn.backends.cuda.compiler import architecture
from cupybnn.backends.cuda.pixel_network import MOST_ROWS
from cupybnn.backends.cuda.product import gemm, gemm_packed
from cupybnn.backends.cuda.resident import Weights
from cupybnn.backends.cuda.results import Run, usual_calls
from cupybnn.backends.cuda.threshold_pack import threshold_pack
from cupybnn.backends.devices import Device
from cupybnn.backends.epilogue import Epilogue
from cupybnn.deploy.cuda_graphs import Graph, Recent
from cupybnn.deploy.cuda_plan import PixelPlan, ResidentPlan
from cupybnn.deploy.cuda_products import (
    PixelParts,
    are_signs,
    end_product,
    pixel_launch,
    plane_product,
    resident_layers,
)
from cupybnn.deploy.digits import PLANES
from cupybnn.deploy.inputs import InputSpec
from cupybnn.deploy.layers import PackedLayer, Step, apply_steps
from cupybnn.packed import PackedMatrix

__all__ = ["CudaForward"]

#: Graphs that are kept, bytes of activations of one, and of all of them.
MOST_GRAPHS, MOST_BYTES, MOST_BYTES_IN_ALL = 16, 1 << 28, 1 << 30

Multiply = Callable[[Any, Any], Any]


class CudaForward:
    """Logits of a network whose arrays are on one GPU; any thread and stream may call it.

    Parameters
    ----------
    layers : sequence of PackedLayer
    inputs : InputSpec
    device : Device
        Where the layers are; the current device, now and at each call.

    Notes
    -----
    A product with real numbers is summed in an order of its own in each of the ways above, so that
    the last bits of a real layer's results depend on the batch size, as they do with cuBLAS alone.

    A caller may capture a call in a graph of their own, after one call outside of it. Such a graph
    must not run at the same time as other calls of this network for more than `most_rows` inputs:
    dense products share a workspace.
    """

    def __init__(self, layers: Sequence[PackedLayer], inputs: InputSpec, device: Device) -> None:
        self._layers, self._inputs, self._device = tuple(layers), inputs, device
        self._classes = self._layers[-1].units
        described = [_described(layer) for layer in self._layers]
        self.one_launch: packed_network.NetworkLaunch | None = None
        #: Rows up to which one launch computes the logits; 0 if none can.
        self.most_rows = 0
        if not packed_network.unsupported_reason(described, architecture(device.index)):
            factor = 1.0 if inputs.pixel_max is None else 1.0 / inputs.pixel_max
            self.one_launch = packed_network.NetworkLaunch(described, factor, device.index)
            self.most_rows = self.one_launch.most_rows
        self._lock = threading.Lock()
        self._graphs = Recent(MOST_GRAPHS, MOST_BYTES_IN_ALL)
        self._seen: Recent = Recent(64, 64)
        # Stream of the last graph, and an event after it.
        self._last: tuple[Any, Any] = (None, None)
        parts = self._parts = PixelParts.of(self._layers[0], inputs, device)
        #: The one launch for pixels.
        self.pixel_launch = None if parts is None else pixel_launch(parts, self._layers, device)
        self._pixels = (
            None if parts is None
            else PixelProduct(parts.digits, parts.least, self._layers[0].flip, device.index)
        )  # fmt: skip
        signs = (False, *(layer.threshold is not None for layer in self._layers))
        self._planes = [
            plane_product(layer) if from_signs else None
            for layer, from_signs in zip(self._layers, signs, strict=False)
        ]
        #: Of prepared launches: bit planes of the last layer, where what is before it is for them.
        self._end = None
        if self._pixels is not None and are_signs(self._layers[1:-1]):
            self._end = end_product(self._layers[-1])
        self._resident: list[Weights] | None = None
        self._runs: dict[tuple[int, ...], Run] = {}
        if self.pixel_launch is not None:
            self._runs = self.pixel_launch.runs
        #: Takes calls like some before, and returns None for others.
        self.usual = None if parts is None else usual_calls(self._runs, device.index)
        self._real = any(
            layer.product != "bits" and planes is None
            for layer, planes in zip(self._layers, self._planes, strict=True)
        )
        self._captures = blas.capturable() or not self._real
        self._blas: Any = None
        _await_weights()

    def __call__(self, rows: Any) -> Any:
        """Return the logits of inputs that `InputSpec.rows` returned.

        Parameters
        ----------
        rows : cupy.ndarray, shape (batch, features)

        Returns
        -------
        cupy.ndarray of float32, shape (batch, classes)
            Not changed by later calls. In the order of the current stream.
        """
        import cupy

        if rows.dtype.char not in "fB" or not rows.flags.c_contiguous:
            rows = self._inputs.numbers(rows)
        count = len(rows)
        if self.pixel_launch is not None and 0 < count <= MOST_ROWS and rows.dtype.char == "B":
            out = cupy.empty((count, self._classes), np.float32)
            self.pixel_launch(rows, out)
            return out
        if 0 < count <= self.most_rows:
            assert self.one_launch is not None
            out = cupy.empty((count, self._classes), np.float32)
            self.one_launch(rows, out)
            return out
        if count == 0:
            return cupy.empty((0, self._classes), np.float32)
        if cupy.cuda.get_current_stream().is_capturing():  # the caller captures the launches
            return self.by_layer(rows, None if self._blas is None else self._multiply)
        if self._blas is None and self._real and self._captures:
            self._blas = blas.Blas("float32")
        if self._bytes(count, self._are_pixels(rows)) <= MOST_BYTES:
            logits = None
            if self._end is not None and self._are_pixels(rows):
                logits = self._by_plan(rows)
            elif self._captures:
                logits = self._by_graph(rows)
            if logits is not None:
                return logits
        return self.by_layer(rows)

    # Layer by layer ----------------------------------------------------------------------------

    def by_layer(self, rows: Any, multiply: Multiply | None = None) -> Any:
        """Return the logits by a launch or two for each layer.

        Parameters
        ----------
        rows : cupy.ndarray, shape (batch, features)
            At least one row.
        multiply : callable(x, weight), optional
            Product of float32 matrices; by default CuPy's.
        """
        import cupy

        if not self._are_pixels(rows):
            return self._from(0, self._inputs.numbers(rows), multiply)
        assert self._pixels is not None
        count = len(rows)
        words = self._pixels.lines_like(count)
        self._pixels.arrangement(words, count)(rows, cupy.cuda.get_current_stream().ptr)
        packed = self._pixels(words, count)
        shape = count, self._pixels.units
        return self._from(1, PackedMatrix._of(*packed, shape, -1, self._device), multiply)

    def _are_pixels(self, rows: Any) -> bool:
        return self._pixels is not None and rows.dtype.char == "B" and rows.flags.c_contiguous

    def _from(self, first: int, x: Any, multiply: Multiply | None) -> Any:
        """Return the logits from the input of a layer on."""
        for layer, planes in list(zip(self._layers, self._planes, strict=True))[first:]:
            x = self._layer(layer, planes, x, multiply or (lambda a, b: a @ b))
        return x

    def _layer(
        self, layer: PackedLayer, planes: PlaneProduct | None, x: Any, multiply: Multiply
    ) -> Any:
        import cupy

        shape = (x.shape[0], layer.units)
        if layer.product == "bits":
            if layer.threshold is not None:
                packed = gemm_packed(x, layer.weight, layer.threshold, layer.flip)
                return PackedMatrix._of(*packed, shape, -1, self._device)
            epilogue, rest = split_steps(layer.steps)
            y = cupy.empty(shape, np.float32)
            gemm(x, layer.weight, y, epilogue)
            return apply_steps(rest, y)
        if planes is not None and isinstance(x, PackedMatrix):
            y = planes(x)
        else:
            if isinstance(x, PackedMatrix):
                x = x.unpack(np.float32)
            y = multiply(x, layer.weight if layer.signs is None else layer.signs)
        if layer.threshold is not None:
            packed = threshold_pack(y, layer.threshold, layer.flip)
            return PackedMatrix._of(*packed, shape, -1, self._device)
        return apply_steps(layer.steps, y)

    def _bytes(self, rows: int, pixels: bool) -> int:
        """Return about how many bytes the activations of a batch take."""
        each = [self._layers[0].inputs * (1 if pixels else 4)]
        for i, (layer, planes) in enumerate(zip(self._layers, self._planes, strict=True)):
            real = layer.product != "bits" and planes is None and not (i == 0 and pixels)
            each.append(layer.units // 8 if layer.threshold is not None else 4 * layer.units)
            each[-1] += 4 * (layer.units + layer.inputs) if real else 0
            each[-1] += 2 * PLANES * layer.units if planes is not None else 0
        return rows * max(a + b for a, b in itertools.pairwise(each))

    # By prepared launches, or as a graph ---------------------------------------------------------

    def _by_plan(self, rows: Any) -> Any:
        """Return the logits by launches prepared for this batch size, or None where there are none.

        Plans are of one stream and thread: calls follow each other, since they share memory.
        """
        import cupy

        key = len(rows), cupy.cuda.get_current_stream().ptr, threading.get_ident()
        with self._lock:
            plan = self._graphs.get(key)
            if plan is None:
                if self._seen.get(key) is None:
                    self._seen.put(key, True, 1)
                    return None
                plan = self._plan(len(rows))
                self._graphs.put(key, plan, self._bytes(len(rows), True))
                self._runs[rows.shape] = self._run(len(rows))
        return plan.run(rows, key[1])

    def _run(self, rows: int) -> Run:
        """Return a function for calls that have a plan, of so many rows."""
        plans, lock, get_ident = self._graphs, self._lock, threading.get_ident

        def run(x: Any, stream: int) -> Any:
            with lock:
                plan = plans.get((rows, stream, get_ident()))
            return None if plan is None else plan.run(x, stream)

        return run

    def _plan(self, rows: int) -> PixelPlan | ResidentPlan:
        assert self._pixels is not None
        assert self._end is not None
        if self._resident is None:
            assert self._parts is not None
            self._resident = resident_layers(self._parts, self._pixels, self._layers, self._device)
            _await_weights()
        if len(self._resident) > 2 and all(layer.deal(rows) for layer in self._resident):
            return ResidentPlan(rows, self._resident)
        *hidden, last = self._layers[1:]
        steps = [(step.kind, step.by) for step in last.steps]
        return PixelPlan(rows, self._pixels, hidden, self._end, steps, self._device)

    def _by_graph(self, rows: Any) -> Any:
        """Return the logits by a graph for this batch size, or None where there is none."""
        import cupy

        stream = cupy.cuda.get_current_stream()
        key = len(rows), rows.dtype.char
        with self._lock:
            graph = self._graphs.get(key)
            if graph is None:
                if self._seen.get(key) is None:
                    self._seen.put(key, True, 1)
                    return None
                graph = self._captured(rows)
                if graph is None:
                    return None
                self._graphs.put(key, graph, self._bytes(len(rows), self._are_pixels(rows)))
            # Graphs share cuBLAS's workspace, and each has one input and one result: one at a time.
            here = stream.ptr, threading.get_ident()
            before, event = self._last
            if event is None:
                event = cupy.cuda.Event(disable_timing=True)
            elif before != here:
                stream.wait_event(event)
            logits = graph(rows)
            event.record(stream)
            self._last = here, event
            return logits

    def _captured(self, rows: Any) -> Graph | None:
        try:
            return Graph(lambda x: self.by_layer(x, self._multiply), rows)
        except RuntimeError:
            self._captures = False
            return None

    def _multiply(self, a: Any, b: Any) -> Any:
        """Return a product of float32 matrices by calls that can be captured."""
        import cupy

        y = cupy.empty((a.shape[0], b.shape[1]), np.float32)
        self._blas.multiply(a, b, y)
        return y


def _await_weights() -> None:
    """Wait until weights that were copied and arranged are there: any stream may read them next."""
    import cupy

    for stream in (cupy.cuda.Stream.null, cupy.cuda.get_current_stream()):
        stream.synchronize()


def split_steps(steps: Sequence[Step]) -> tuple[Epilogue | None, Sequence[Step]]:
    """Return what of the steps a product does on its way out, and the steps after that."""
    scale = bias = None
    done = 0
    if done < len(steps) and steps[done].kind == "multiply":
        scale, done = steps[done].by, done + 1
    if done < len(steps) and steps[done].kind == "add":
        bias, done = steps[done].by, done + 1
    if done == 0:
        return None, steps
    return Epilogue(None, None if scale is None else scale[None, :],
                    None if bias is None else bias[None, :]), steps[done:]  # fmt: skip


def _described(layer: PackedLayer) -> packed_network.Layer:
    return packed_network.Layer(
        layer.product,
        layer.weight if layer.signs is None else layer.signs,
        layer.inputs,
        layer.units,
        layer.threshold,
        layer.flip,
        tuple((step.kind, step.by) for step in layer.steps),
    )

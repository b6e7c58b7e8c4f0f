"""The file of a packed network in ONNX, for onnxruntime and whatever else reads ONNX."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np

import cupybnn
from cupybnn.deploy.onnx_graph import Graph, onnx_module
from cupybnn.deploy.plan import GREATEST_PIXEL, Planned, check_pixels, plan, scale_factor
from cupybnn.errors import SettingError
from cupybnn.files import atomic_write

if TYPE_CHECKING:
    from cupybnn.deploy.network import PackedNetwork

__all__ = ["OLDEST_OPSET", "TARGETS", "model", "write"]

OLDEST_OPSET = 13
TARGETS = ("cpu", "cuda")
INPUTS = ("pixels", "numbers")
_MOST_BYTES = 2**31 - 1  # of a protocol buffer
_HALF = 2048  # up to here a float16 is every integer


def write(
    path: str | os.PathLike[str],
    net: PackedNetwork,
    *,
    inputs: str | None = None,
    target: str = "cpu",
    opset: int = OLDEST_OPSET,
) -> None:
    """Write a network as ONNX; see `PackedNetwork.to_onnx`."""
    made = model(net, inputs=inputs, target=target, opset=opset)
    size = made.ByteSize()
    if size > _MOST_BYTES:
        raise SettingError(
            f"An ONNX file must have at most {_MOST_BYTES:,} bytes; this network needs {size:,}."
        )
    with atomic_write(path) as out:
        out.write(made.SerializeToString(deterministic=True))


def model(
    net: PackedNetwork, *, inputs: str | None = None, target: str = "cpu", opset: int = OLDEST_OPSET
) -> Any:
    """Return a network as an `onnx.ModelProto`; see `PackedNetwork.to_onnx`."""
    onnx = onnx_module()
    _check("target", target, TARGETS)
    newest = onnx.defs.onnx_opset_version()
    if isinstance(opset, bool) or not isinstance(opset, int) or not OLDEST_OPSET <= opset <= newest:
        raise SettingError(
            f"The 'opset' must be a whole number from {OLDEST_OPSET} to {newest}, the newest of "
            f"the installed onnx; got {opset!r}."
        )
    net = net.to("cpu")
    if inputs is None:
        # Where pixels are not scaled, as those of a scikit-learn estimator's features, numbers
        # are the same, and fractions are numbers only.
        scale = net.inputs.pixel_max
        inputs = "pixels" if scale is not None and 1 < scale <= GREATEST_PIXEL else "numbers"
    _check("inputs", inputs, INPUTS)
    pixels = inputs == "pixels"
    if pixels:
        check_pixels(net.inputs)
    emitter = _Emitter(net, pixels, target)
    emitter.emit()
    graph = emitter.graph
    imports = [onnx.helper.make_opsetid("", opset)]
    made = onnx.helper.make_model(
        onnx.helper.make_graph(
            graph.nodes,
            "cupybnn",
            emitter.inputs,
            emitter.outputs,
            graph.initializers,
            doc_string=_doc(net, pixels),
            value_info=graph.values,
        ),
        opset_imports=imports,
        # The oldest that goes with the opset, so that older programs read the file.
        ir_version=onnx.helper.find_min_ir_version_for(imports),
        producer_name="cupybnn",
        producer_version=cupybnn.__version__,
    )
    onnx.helper.set_model_props(made, _metadata(net, pixels))
    return made


def _check(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise SettingError(f"The {name!r} must be one of {', '.join(known)}; got {value!r}.")


def _doc(net: PackedNetwork, pixels: bool) -> str:
    if pixels:
        what = "Images as bytes, one byte a pixel; the graph scales them."
    elif net.inputs.pixel_max not in (None, 1):
        what = f"Pixels divided by {net.inputs.pixel_max:g}, as float32."
    else:
        what = "Numbers as the network was trained on them, as float32."
    return (
        f"A trained network with binary weights as packed bits. Input: {what} Outputs: logits, "
        f"probabilities, and class_index, the position of the most probable class in the "
        f"metadata's list 'classes'."
    )


def _metadata(net: PackedNetwork, pixels: bool) -> dict[str, str]:
    shape = net.inputs.image_shape
    return {
        "classes": json.dumps(net.classes.tolist(), ensure_ascii=False),
        "image_shape": json.dumps(None if shape is None else list(shape)),
        "input": "pixels" if pixels else "numbers",
        "pixel_max": json.dumps(net.inputs.pixel_max),
    }


class _Emitter:
    """Turns layers into nodes.

    On a CPU, products of integers are MatMulInteger of bytes (0 and 1 for signs) and int8 weights
    +1 and -1: pairs of products of these never leave the 16 bits that some processors add them in.
    CUDA has no such product; there they are products of floating numbers, each of them exact.
    """

    def __init__(self, net: PackedNetwork, pixels: bool, target: str) -> None:
        spec = net.inputs
        self._bytes = target == "cpu"
        self._factor = scale_factor(spec) if pixels else None
        self._layers = plan(net.layers, spec, pixels)
        self._classes = len(net.classes)
        self._features = spec.features
        self.graph = Graph("batch")
        self._name, shape = ("pixels", spec.image_shape) if pixels else ("numbers", None)
        dtype = np.uint8 if pixels else np.float32
        self._shape = shape or (spec.features,)
        self.inputs = [self.graph.rows(self._name, dtype, *self._shape)]
        self.outputs = [
            self.graph.rows("logits", np.float32, self._classes),
            self.graph.rows("probabilities", np.float32, self._classes),
            self.graph.rows("class_index", np.int64),
        ]

    def emit(self) -> None:
        graph, x = self.graph, self._name
        if len(self._shape) > 1:
            x = graph.row_node("Flatten", [x], "pixel_rows", np.uint8, self._features)
        integer = self._of_bytes if self._bytes else self._of_floats
        for layer in self._layers:
            x = integer(layer, x) if layer.integer else self._real(layer, x)
        graph.node("Identity", [x], "logits")
        graph.node("Softmax", [x], "probabilities", axis=1)
        graph.node("ArgMax", [x], "class_index", axis=1, keepdims=0)

    def _of_bytes(self, layer: Planned, x: str) -> str:
        """Add a product of integers, in bytes, and what follows it."""
        graph, name, units, threshold = self.graph, layer.name, layer.units, layer.threshold
        assert layer.plus is not None
        signs = layer.source == "signs"
        # a·w of signs a is 2·b·w - Σw of bits b.
        sums = 2 * layer.plus.sum(axis=0) - layer.inputs
        if signs:
            x = graph.cast(x, f"{name}/input_bits", np.uint8, layer.inputs)
        inputs = [x, graph.unpacked(name, layer.plus, np.int8)]
        x = graph.row_node("MatMulInteger", inputs, f"{name}/product", np.int32, units)
        if threshold is not None:
            if signs:
                threshold = -((-threshold - sums) // 2)
            return self._compared(layer, x, threshold.astype(np.int32))
        if signs:
            x = graph.row_node("Add", [x, x], f"{name}/doubled", np.int32, units)
            inputs = [x, graph.constant(f"{name}/weight_sums", sums.astype(np.int32))]
            x = graph.row_node("Sub", inputs, f"{name}/signs_product", np.int32, units)
        return graph.steps(
            name, layer.steps, graph.cast(x, f"{name}/numbers", np.float32, units), units
        )

    def _of_floats(self, layer: Planned, x: str) -> str:
        """Add a product of integers, in floating numbers that are exact, and what follows it."""
        graph, name, units = self.graph, layer.name, layer.units
        assert layer.plus is not None
        half = layer.source == "signs" and layer.inputs <= _HALF
        dtype = np.float16 if half else np.float32
        inputs = [self._floating(layer, x, dtype), graph.unpacked(name, layer.plus, dtype)]
        x = graph.row_node("MatMul", inputs, f"{name}/product", dtype, units)
        if layer.threshold is not None:
            return self._compared(layer, x, _reachable(layer).astype(dtype))
        if half:
            x = graph.cast(x, f"{name}/numbers", np.float32, units)
        return graph.steps(name, layer.steps, x, units)

    def _real(self, layer: Planned, x: str) -> str:
        """Add a product of numbers and what follows it."""
        graph, name = self.graph, layer.name
        x = self._floating(layer, x, np.float32)
        if layer.source == "pixels":
            factor = graph.constant("pixel_scale", np.array(self._factor))
            x = graph.row_node("Mul", [x, factor], "scaled_pixels", np.float32, layer.inputs)
        if layer.plus is not None:
            weight = graph.unpacked(name, layer.plus, np.float32)
        else:
            weight = graph.constant(f"{name}/weight", layer.weight)
        product = graph.row_node("MatMul", [x, weight], f"{name}/product", np.float32, layer.units)
        if layer.threshold is not None:
            return self._compared(layer, product, layer.threshold)
        return graph.steps(name, layer.steps, product, layer.units)

    def _floating(self, layer: Planned, x: str, dtype: Any) -> str:
        """Return what comes in, signs or pixels or numbers, as floating numbers."""
        graph = self.graph
        if layer.source == "signs":
            name = f"{layer.name}/input_signs"
            graph.values.append(graph.rows(name, dtype, layer.inputs))
            return graph.signs(name, x, dtype)
        if layer.source == "pixels":
            return graph.cast(x, f"{layer.name}/input", dtype, layer.inputs)
        return x

    def _compared(self, layer: Planned, product: str, threshold: np.ndarray) -> str:
        """Add a comparison with thresholds, and return which units are +1."""
        graph, name, units = self.graph, layer.name, layer.units
        assert layer.flip is not None
        least = graph.constant(f"{name}/threshold", threshold)
        inputs = [product, least]
        x = graph.row_node("GreaterOrEqual", inputs, f"{name}/at_least", np.bool_, units)
        if layer.flip.any():
            flip = graph.constant(f"{name}/flip", layer.flip)
            x = graph.row_node("Xor", [x, flip], f"{name}/is_plus", np.bool_, units)
        return x


def _reachable(layer: Planned) -> np.ndarray:
    """Return thresholds as floating numbers that a product can have, or infinity.

    A sum of K signs is even if K is: the next one of its kind is as good a threshold, and one that
    is beyond all sums need not be a number that float16 has.
    """
    assert layer.threshold is not None
    threshold = layer.threshold
    if layer.source == "signs":
        threshold = threshold + (threshold - layer.inputs) % 2
    return np.where(threshold > -layer.least, np.inf, threshold.astype(np.float64))

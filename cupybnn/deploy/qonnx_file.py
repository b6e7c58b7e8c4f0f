"""The file of a packed network in QONNX, ONNX with quantizers, which FINN and hls4ml read."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

import cupybnn
from cupybnn.deploy.onnx_graph import Graph, onnx_module
from cupybnn.deploy.plan import Planned, plan
from cupybnn.files import atomic_write

if TYPE_CHECKING:
    from cupybnn.deploy.network import PackedNetwork

__all__ = ["model", "write"]

_OPSET = 13
_DOMAIN = "qonnx.custom_op.general"


def write(path: str | os.PathLike[str], net: PackedNetwork) -> None:
    """Write a network as QONNX; see `PackedNetwork.to_qonnx`."""
    made = model(net)
    with atomic_write(path) as out:
        out.write(made.SerializeToString(deterministic=True))


def model(net: PackedNetwork) -> Any:
    """Return a network as an `onnx.ModelProto`; see `PackedNetwork.to_qonnx`."""
    onnx = onnx_module()
    net = net.to("cpu")
    # Programs that make circuits of a graph want one input at a time.
    graph = Graph(1)
    x = "numbers"
    for layer in plan(net.layers, net.inputs, pixels=False):
        x = _layer(graph, layer, x)
    graph.node("Identity", [x], "logits")
    opsets = [onnx.helper.make_opsetid("", _OPSET), onnx.helper.make_opsetid(_DOMAIN, 1)]
    return onnx.helper.make_model(
        onnx.helper.make_graph(
            graph.nodes,
            "cupybnn",
            [graph.rows("numbers", np.float32, net.inputs.features)],
            [graph.rows("logits", np.float32, len(net.classes))],
            graph.initializers,
            value_info=graph.values,
        ),
        opset_imports=opsets,
        ir_version=onnx.helper.find_min_ir_version_for(opsets[:1]),
        producer_name="cupybnn",
        producer_version=cupybnn.__version__,
    )


def _layer(graph: Graph, layer: Planned, x: str) -> str:
    name, units, threshold = layer.name, layer.units, layer.threshold
    weight = layer.weight if layer.plus is None else np.where(layer.plus, 1, -1)
    assert weight is not None
    if threshold is not None:
        assert layer.flip is not None
        # A unit that is +1 below its threshold is one of the opposite weights, +1 from the
        # negative of the next smaller number on.
        weight = np.where(layer.flip, -weight, weight)
        below = threshold - 1 if layer.integer else np.nextafter(threshold, np.float32(-np.inf))
        threshold = np.where(layer.flip, -below, threshold).astype(np.float32)
    kept = graph.constant(f"{name}/weight", weight.astype(np.float32))
    if layer.plus is not None:
        kept = _signs(graph, kept, f"{name}/weight_signs")
        graph.values.append(_matrix(graph, kept, layer))
    x = graph.row_node("MatMul", [x, kept], f"{name}/product", np.float32, units)
    if threshold is not None:
        by = graph.constant(f"{name}/threshold", threshold)
        x = graph.row_node("Sub", [x, by], f"{name}/above_threshold", np.float32, units)
        graph.values.append(graph.rows(f"{name}/signs", np.float32, units))
        return _signs(graph, x, f"{name}/signs")
    return graph.steps(name, layer.steps, x, units)


def _signs(graph: Graph, x: str, output: str) -> str:
    one = graph.constant("one", np.ones((), np.float32))
    return graph.node("BipolarQuant", [x, one], output, domain=_DOMAIN)


def _matrix(graph: Graph, name: str, layer: Planned) -> Any:
    helper, kind = graph.onnx.helper, graph.onnx.TensorProto.FLOAT
    return helper.make_tensor_value_info(name, kind, [layer.inputs, layer.units])

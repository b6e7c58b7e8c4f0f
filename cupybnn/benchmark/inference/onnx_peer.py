"""The same network in onnxruntime: dense float32 products on the CPU. Imports onnx."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
from onnx import TensorProto, helper, numpy_helper

from cupybnn.backends.devices import Device
from cupybnn.benchmark.inference.network import CLASSES, FEATURES, PIXEL_MAX, Network
from cupybnn.benchmark.inference.variants import Calls, Variant

__all__ = ["variants"]

_OPSET, _IR = 13, 8


def variants(device: Device) -> list[Variant]:
    """Return what is measured of onnxruntime on a kind of device."""
    return [Variant("onnxruntime", "CPU", "float32", _make)] if device.kind == "cpu" else []


def _model(network: Network) -> Any:
    nodes = []
    constants = {"plus": 1, "minus": -1, "zero": 0, "factor": 1 / PIXEL_MAX}
    arrays = {name: np.asarray(value, np.float32) for name, value in constants.items()}
    name = "x"
    nodes += [
        helper.make_node("Cast", ["pixels"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["numbers", "factor"], [name]),
    ]
    for i, weight in enumerate(network.weights):
        arrays[f"weight{i}"] = weight
        last = i + 1 == len(network.weights)
        product = "logits" if last else f"product{i}"
        nodes.append(helper.make_node("MatMul", [name, f"weight{i}"], [product]))
        if not last:
            arrays[f"scale{i}"], arrays[f"shift{i}"] = network.folded(i)
            name = f"sign{i}"
            nodes += [
                helper.make_node("Mul", [product, f"scale{i}"], [f"scaled{i}"]),
                helper.make_node("Add", [f"scaled{i}", f"shift{i}"], [f"shifted{i}"]),
                helper.make_node("GreaterOrEqual", [f"shifted{i}", "zero"], [f"above{i}"]),
                helper.make_node("Where", [f"above{i}", "plus", "minus"], [name]),
            ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", FEATURES])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(a, n) for n, a in arrays.items()],
    )
    opsets = [helper.make_opsetid("", _OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR)
    onnx.checker.check_model(model)
    return model


def _make(variant: Variant, network: Network, x: np.ndarray, device: Device) -> Calls:
    options = onnxruntime.SessionOptions()
    affinity = getattr(os, "sched_getaffinity", None)
    options.intra_op_num_threads = len(affinity(0)) if affinity else os.cpu_count() or 1
    session = onnxruntime.InferenceSession(
        _model(network).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return Calls(lambda: session.run(None, {"pixels": x})[0], lambda y: y)

"""An ONNX graph in the making: nodes, initializers, and the shapes of what lies between."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from cupybnn.deploy.layers import Step
from cupybnn.errors import SettingError
from cupybnn.extras import to_install

__all__ = ["Graph", "onnx_module"]


def onnx_module() -> ModuleType:
    """Import the package onnx.

    Raises
    ------
    SettingError
        If it is not installed; the message says how to install it.
    """
    try:
        import onnx
    except ImportError as error:
        raise SettingError(
            f"An ONNX file needs the package onnx, which is not installed: {to_install('onnx')}."
        ) from error
    return onnx


class Graph:
    """Collects what a graph is made of. Values are known by their names.

    A matrix with a row for each input of the network is described by its columns alone.

    Parameters
    ----------
    batch : str or int
        The name of a dynamic dimension, or how many rows there are.
    """

    def __init__(self, batch: str | int) -> None:
        self.onnx = onnx_module()
        self._batch = batch
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.values: list[Any] = []
        self._constants: set[str] = set()

    def constant(self, name: str, array: Any) -> str:
        """Add an initializer, unless there is one of this name already."""
        if name not in self._constants:
            self._constants.add(name)
            self.initializers.append(self.onnx.numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Add a node with one output, after which it is named, and return the output."""
        made = self.onnx.helper.make_node(kind, inputs, [output], name=output, **attributes)
        self.nodes.append(made)
        return output

    def rows(self, name: str, dtype: Any, *columns: int) -> Any:
        """Return the description of a value with a row for each input."""
        kind = self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.onnx.helper.make_tensor_value_info(name, kind, [self._batch, *columns])

    def row_node(
        self, kind: str, inputs: list[str], output: str, dtype: Any, columns: int, **attributes: Any
    ) -> str:
        """Add a node whose output has a row for each input, and describe that."""
        self.values.append(self.rows(output, dtype, columns))
        return self.node(kind, inputs, output, **attributes)

    def cast(self, name: str, output: str, dtype: Any, columns: int) -> str:
        """Add a Cast of rows."""
        to = self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.row_node("Cast", [name], output, dtype, columns, to=to)

    def steps(self, layer: str, steps: Sequence[Step], x: str, columns: int) -> str:
        """Add what follows a product, and return its result."""
        for number, step in enumerate(steps, 1):
            inputs = [x]
            if step.by is not None:
                inputs.append(self.constant(f"{layer}/step{number}_by", step.by))
            kind = {"multiply": "Mul", "add": "Add", "relu": "Relu"}[step.kind]
            x = self.row_node(kind, inputs, f"{layer}/step{number}", np.float32, columns)
        return x

    def signs(self, name: str, condition: str, dtype: Any) -> str:
        """Add a Where that makes +1 and -1 of a condition."""
        kind = np.dtype(dtype).name
        plus = self.constant(f"plus_one/{kind}", np.array(1, dtype))
        minus = self.constant(f"minus_one/{kind}", np.array(-1, dtype))
        return self.node("Where", [condition, plus, minus], name)

    def unpacked(self, layer: str, plus: np.ndarray, dtype: Any) -> str:
        """Add weights +1 and -1 as packed bits, and the nodes that unpack them.

        Eight bits lie in a byte, the first in the highest, row by row. Shifted to the left by its
        number, a bit is the highest; shifted to the right by seven, it is all that is left.
        """
        packed = self.constant(f"{layer}/bits", np.packbits(plus).reshape(-1, 1))
        left = self.constant("bit_numbers", np.arange(8, dtype=np.uint8))
        right = self.constant("highest_bit", np.array(7, np.uint8))
        high = self.node("BitShift", [packed, left], f"{layer}/bits_left", direction="LEFT")
        low = self.node("BitShift", [high, right], f"{layer}/bits_right", direction="RIGHT")
        if plus.size % 8:
            flat = self.constant("flat", np.array([-1]))
            low = self.node("Reshape", [low, flat], f"{layer}/bits_flat")
            ends = [
                self.constant("first", np.array([0])),
                self.constant(f"{layer}/bit_count", np.array([plus.size])),
            ]
            low = self.node("Slice", [low, *ends], f"{layer}/bits_used")
        shape = self.constant(f"{layer}/shape", np.array(plus.shape))
        matrix = self.node("Reshape", [low, shape], f"{layer}/bit_matrix")
        to = self.onnx.TensorProto.BOOL
        condition = self.node("Cast", [matrix], f"{layer}/is_plus_one", to=to)
        if dtype != np.float16:
            return self.signs(f"{layer}/weight", condition, dtype)
        # onnxruntime folds constants on the CPU, where its Where knows no float16.
        single = self.signs(f"{layer}/weight_float32", condition, np.float32)
        to = self.onnx.TensorProto.FLOAT16
        return self.node("Cast", [single], f"{layer}/weight", to=to)

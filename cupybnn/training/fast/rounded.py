"""The backward pass of a hidden layer whose gradient is rounded: products of bit planes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cupybnn.backends.cuda.fused_batch import Draw
from cupybnn.backends.cuda.planes import GradientLevels, TurnedSigns
from cupybnn.backends.cuda.product import prepare_scaled
from cupybnn.backends.devices import Device
from cupybnn.backends.levels import levels_of
from cupybnn.packed import PackedMatrix

__all__ = ["RoundedBackward"]


class RoundedBackward:
    """The memory of a layer's backward pass, and its launches; see `cupybnn.ops.quantize_gradient`.

    Parameters
    ----------
    bits : int
        Of a level.
    inputs : PackedMatrix, shape (batch, inputs), packed along the inputs
        The layer's, signs.
    weight : PackedMatrix, shape (inputs, units), packed along the inputs
        Their signs.
    inputs_grad : cupy.ndarray, shape (batch, inputs)
        float32, or uint16 for bfloat16: receives the gradient of the inputs.
    weight_grad : cupy.ndarray, shape (inputs, units)
        Likewise: receives that of the weights.
    device : Device

    Notes
    -----
    Each product reads signs along another axis than the forward product: they are turned first.
    """

    def __init__(
        self, bits: int, inputs: PackedMatrix, weight: PackedMatrix, inputs_grad: Any,
        weight_grad: Any, device: Device,
    ) -> None:  # fmt: skip
        self._inputs, self._weight = inputs, weight
        (batch, count), units = inputs.shape, weight.shape[1]
        self._levels = made = GradientLevels(batch, units, bits)
        self._turned_weight = TurnedSigns.of(units, count)
        self._turned_inputs = TurnedSigns.of(batch, count)

        def packed(words: Any, sums: Any, shape: tuple[int, int], axis: int, b: int) -> Any:
            return PackedMatrix._of(words, sums, shape, axis, device, levels_of(b, True))

        weight_t, inputs_t = self._turned_weight, self._turned_inputs
        self._for_inputs: Callable[[int], None] = prepare_scaled(
            packed(made.row_words, made.row_sums, (batch, units), -1, bits),
            packed(weight_t.words, weight_t.popcounts, (units, count), -2, 1),
            inputs_grad,
            rows=made.row_scale,
        )
        self._for_weight: Callable[[int], None] = prepare_scaled(
            packed(inputs_t.words, inputs_t.popcounts, (count, batch), -1, 1),
            packed(made.col_words, made.col_sums, (batch, units), -2, bits),
            weight_grad,
            columns=made.col_scale,
        )

    def quantize(self, grad: Any, draw: Draw, step: Any) -> None:
        """Round the gradient of the layer's products on the current stream."""
        self._levels.launch(grad, draw.seed, draw.offset, step)

    def input_gradient(self) -> None:
        """Compute the gradient of the inputs, after `quantize`, on the current stream."""
        self._turned_weight.launch(self._weight.words, self._weight.shape[1])
        self._for_inputs(_stream())

    def weight_gradient(self) -> None:
        """Compute the gradient of the weights, after `quantize`, on the current stream."""
        self._turned_inputs.launch(self._inputs.words, self._inputs.shape[0])
        self._for_weight(_stream())


def _stream() -> int:
    import cupy

    return int(cupy.cuda.get_current_stream().ptr)

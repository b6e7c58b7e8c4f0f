"""The backward pass of a hidden layer whose gradient is rounded: products of bit planes."""

from __future__ import annotations

from typing import Any

from cupybnn.backends.cuda import plane_gemm
from cupybnn.backends.cuda.compiler import Defines
from cupybnn.backends.cuda.fused_batch import Draw
from cupybnn.backends.cuda.fused_layers import Greatest
from cupybnn.backends.cuda.planes import GradientLevels, TurnedSigns
from cupybnn.backends.cuda.product import prepare_scaled
from cupybnn.backends.devices import Device
from cupybnn.backends.levels import SIGNS, Levels, levels_of
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
    weight_grad : cupy.ndarray, shape (inputs, units), or None
        Likewise: receives that of the weights. None if it is not stored: see `weight_update`.
    device : Device
    hopper : bool
        Whether to compute the gradient of the inputs by Hopper's kernel for it, in bfloat16.
    first : int
        Rows before these in the whole batch.

    Notes
    -----
    Each product reads signs along another axis than the forward product: `turn` comes first.
    """

    def __init__(
        self, bits: int, inputs: PackedMatrix, weight: PackedMatrix, inputs_grad: Any,
        weight_grad: Any, device: Device, *, hopper: bool = False, first: int = 0,
    ) -> None:  # fmt: skip
        self._hopper, self._first = hopper, first
        self._inputs, self._weight, self._device = inputs, weight, device.index
        (batch, count), units = inputs.shape, weight.shape[1]
        self._made = made = GradientLevels(batch, units, bits)
        self._turned_weight = TurnedSigns.of(units, count)
        self._turned_inputs = TurnedSigns.of(batch, count)
        levels, shape = levels_of(bits, True), (batch, units)

        def packed(words: Any, sums: Any, shape: tuple[int, int], axis: int, of: Levels) -> Any:
            return PackedMatrix._of(words, sums, shape, axis, device, of)

        weight_t, inputs_t = self._turned_weight, self._turned_inputs
        self._for_inputs = (
            packed(made.row_words, made.row_sums, shape, -1, levels),
            packed(weight_t.words, weight_t.popcounts, (units, count), -2, SIGNS),
        )
        self._for_weight = (
            packed(inputs_t.words, inputs_t.popcounts, (count, batch), -1, SIGNS),
            packed(made.col_words, made.col_sums, shape, -2, levels),
        )
        self._inputs_grad = inputs_grad
        # Launches of products that are stored, by any device's kernels.
        self._to_inputs = self._to_weight = None
        if not hopper:
            self._to_inputs = prepare_scaled(*self._for_inputs, inputs_grad, rows=made.row_scale)
        if weight_grad is not None:
            self._to_weight = prepare_scaled(*self._for_weight, weight_grad, columns=made.col_scale)

    @property
    def greatest(self) -> Greatest:
        """The greatest magnitudes of the gradient: `measure`, or what writes it, finds them."""
        return self._made

    def measure(self, grad: Any) -> None:
        """Find the greatest gradients of images and units on the current stream."""
        self._made.measure(grad)

    def quantize(self, grad: Any, draw: Draw, step: Any) -> None:
        """Round the gradient of the layer's products on the current stream.

        Its greatest magnitudes must have been found, by `measure` or by the kernel that wrote it.
        """
        self._made.quantize(grad, draw.seed, draw.offset, step, self._first)

    def turn(self) -> None:
        """Turn the signs of weights and inputs on the current stream."""
        self._turned_weight.launch(self._weight.words, self._weight.shape[1])
        self._turned_inputs.launch(self._inputs.words, self._inputs.shape[0])

    def input_gradient(self) -> None:
        """Compute the gradient of the inputs, after `quantize`, on the current stream."""
        if self._to_inputs is not None:
            self._to_inputs(_stream())
            return
        plane_gemm.stored_product(
            *self._for_inputs, self._made.row_scale, self._inputs_grad, self._device
        )

    def weight_gradient(self) -> None:
        """Compute the gradient of the weights, after `quantize`, on the current stream."""
        assert self._to_weight is not None
        self._to_weight(_stream())

    def weight_update(self, update: dict[str, Any], defines: Defines) -> None:
        """Compute the gradient of the weights and update them; see `Update.arguments_of`."""
        plane_gemm.weight_update(
            *self._for_weight, self._made.col_scale, update, defines=defines, device=self._device
        )


def _stream() -> int:
    import cupy

    return int(cupy.cuda.get_current_stream().ptr)

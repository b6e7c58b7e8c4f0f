"""The gradients of a fused step's hidden weights, and the updates of all parameters."""

from __future__ import annotations

import math
from typing import Any

from cupybnn.backends.cuda import blas, sign_gemm
from cupybnn.backends.cuda.fused_layers import UnpackRows
from cupybnn.backends.cuda.fused_update import Update
from cupybnn.training.fast.exchange import Exchange
from cupybnn.training.fast.parts import Part, Shared

__all__ = ["Weights"]


class Weights(Part):
    """Launches what computes weight gradients, exchanges them and updates parameters.

    Attributes
    ----------
    update : Update
        Updates all parameters; must be set before the first launch.
    sums_loss : bool
        Whether the loss is still to be summed over all ranks after the update.
    """

    update: Update
    sums_loss = False

    def __init__(self, shared: Shared) -> None:
        super().__init__(shared)
        plan = self._plan
        #: By number of a hidden layer: memory for the gradients of its weights from parts of the
        #: batch. The layers share it.
        self._parts: dict[int, Any] = {}
        shapes = {
            i: (
                sign_gemm.parts(shared.device, plan.batch, layer.inputs, layer.units),
                layer.inputs,
                layer.units,
            )
            for i, layer in enumerate(plan.hidden)
            if layer.backward == "parts"
        }
        if shapes:
            memory = sign_gemm.part_scratch(max(map(math.prod, shapes.values())))
            for i, shape in shapes.items():
                self._parts[i] = memory[: math.prod(shape)].reshape(shape)

    def gradient(self, i: int, gradient: Any, products: blas.Blas) -> None:
        """Compute the gradient of the weights of hidden layer `i`, summed over all passes."""
        hidden = self._buffers.hidden[i]
        inputs, scale = self._buffers.all_inputs, self.shared.input_scale
        if i:
            before, scale = self._buffers.hidden[i - 1], 1.0
            inputs = before.all_dense
            if inputs is None:
                inputs = self._buffers.signs(i - 1)
                with self.span("unpack signs"):
                    UnpackRows(packed=before.packed, out=inputs).launch(self.launcher)
        out = self._buffers.gradients[hidden.plan.linear.weight]
        with self.span(f"gradient of {hidden.plan.name}'s weights"):
            products.multiply(inputs, gradient, out, transpose_a=True, scale=scale)

    def update_by_bits(self, i: int, gradient: Any) -> None:
        """Compute the gradient of hidden layer `i`'s weights and update them, in one kernel."""
        signs, name = self._buffers.hidden[i - 1].packed, self._plan.hidden[i].name
        with self.span(f"gradient of {name}'s weights and their update"):
            self.update.launch_fused_update(self._group(i), signs=signs, matrix=gradient)

    def gradient_by_bits(self, i: int, gradient: Any) -> None:
        """Compute the gradient of hidden layer `i`'s weights from packed signs."""
        before, hidden = self._buffers.hidden[i - 1], self._buffers.hidden[i]
        out = self._buffers.gradients[hidden.plan.linear.weight]
        with self.span(f"gradient of {hidden.plan.name}'s weights"):
            scratch = self._parts.get(i)
            sign_gemm.weight_gradient(before.packed, gradient, out, self.shared.device, scratch)

    def gradient_by_planes(self, i: int) -> None:
        """Compute the gradient of hidden layer `i`'s weights by bit planes; update them, or not."""
        plan, rounded = self._plan.hidden[i], self._buffers.rounded[i]
        if plan.updates and self._buffers.exchange is None:
            with self.span(f"gradient of {plan.name}'s weights and their update"):
                rounded.weight_update(*self.update.arguments_of(self._group(i)))
        else:
            with self.span(f"gradient of {plan.name}'s weights"):
                rounded.weight_gradient()

    def _group(self, i: int) -> int:
        """Return the update group of hidden layer `i`; groups begin with the last layer."""
        last = len(self._buffers.hidden) - 1
        return min(last - i, last - 1) if self._plan.updates_together else last - i

    def update_layer(self, i: int) -> None:
        """Update the parameters of hidden layer `i`; the head's are updated with the last."""
        with self.span("update"):
            self.update.launch(self._group(i))

    def update_shares(self, exchange: Exchange) -> None:
        """Update this rank's shares of weights, and send their signs."""
        for number, weights in enumerate(exchange.groups):
            with self.span("wait for gradients"):
                for weight in weights:
                    exchange.receive(weight)
            with self.span("update"):
                self.update.launch(number)
        exchange.send_signs()

    def receive_signs(self, exchange: Exchange) -> None:
        """Put the signs of all shares where the next step reads them; this one no longer does."""
        with self.span("wait for signs"):
            exchange.receive_signs(self._buffers.hidden, self.launcher)

    def update_rest(self, exchange: Exchange) -> None:
        """Update what has not been updated, with the sums over all ranks; see `plan_update`."""
        buffers = self._buffers
        if not exchange.early:
            self.update_shares(exchange)
        with self.span("wait for gradients"):
            exchange.receive_rest()
        with self.span("update"):
            self.update.launch(len(exchange.groups))
        if not exchange.early:
            self.receive_signs(exchange)
        if self.sums_loss:
            with self.span("wait for the loss"):
                exchange.add_up(buffers.loss, buffers.loss)

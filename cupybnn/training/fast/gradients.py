"""The gradients of a fused step's products and activations, from the last layer to the first."""

from __future__ import annotations

from typing import Any

from cupybnn.backends.cuda import sign_gemm
from cupybnn.backends.cuda.fused_batch import Draw
from cupybnn.backends.cuda.fused_layers import ActivationGradient, Greatest, UnpackColumns
from cupybnn.training.fast.buffers import Pass
from cupybnn.training.fast.parts import Part, Shared, Tools

__all__ = ["ProductGradients"]


class ProductGradients(Part):
    """Launches what computes the gradients of products and activations.

    Parameters
    ----------
    shared : Shared

    Attributes
    ----------
    rounding : dict of int to Draw
        By number of a hidden layer, counted from 0: how this step rounds its gradient.
    measured : dict of int to bool
        Likewise: whether its gradient's greatest magnitudes are known.
    """

    def __init__(self, shared: Shared) -> None:
        super().__init__(shared)
        plan = self._plan
        self.rounding: dict[int, Draw] = {}
        self.measured: dict[int, bool] = {}
        #: Likewise: whether the product that computes its activations' gradient has added it up.
        self._summed: dict[int, bool] = {}
        self._norm_scratch = None
        if any(layer.backward == "bits" for layer in plan.hidden):
            widest = max(layer.units for layer in plan.hidden)
            self._norm_scratch = sign_gemm.NormScratch(plan.batch, widest)

    def descend(self, at: Pass, tools: Tools) -> None:
        """Compute the gradients of all products of a pass, without those of hidden weights."""
        for i in reversed(range(1, len(at.hidden))):
            self.input_gradient(at, i, tools)
            self.activation_gradient(at, i - 1, tools)

    def of_pixels(self, at: Pass) -> None:
        """Compute the gradient of the pixels, up to a factor."""
        buffers = self._buffers
        self.descend(at, self._main)
        with self.span("gradient of the pixels"):
            self._main.products.multiply(
                buffers.product_grad(0, at.number)[1],
                self._weight_of(0),
                buffers.input_grad,
                transpose_b=True,
            )

    def compare(self, i: int) -> None:
        """Begin to compare the greatest gradients of hidden layer `i`'s units with other ranks'.

        The scale of a unit's levels is that of the whole batch. That of an image's is its own.
        """
        exchange, rounded = self._buffers.exchange, self._buffers.rounded.get(i)
        if exchange is not None and rounded is not None:
            with self.span("rounding of gradients"):
                self._measure(i, self._buffers.product_grad(i)[1])
            exchange.send_greatest(rounded.greatest.col_most)

    def _measure(self, i: int, gradient: Any) -> None:
        """Find the greatest magnitudes of a gradient, unless what wrote it has found them."""
        if not self.measured[i]:
            self._buffers.rounded[i].measure(gradient)

    def input_gradient(self, at: Pass, i: int, tools: Tools, compared: bool = False) -> None:
        """Compute the gradient of the input of hidden layer `i` > 0, counted from 0.

        With `compared`, `compare` was called before. For the gradient of the inputs alone, that is
        not necessary.
        """
        hidden = at.hidden[i]
        gradient = self._buffers.product_grad(i, at.number)[1]
        if i in self._buffers.rounded:
            rounded = self._buffers.rounded[i]
            if compared and self._buffers.exchange is not None:
                with self.span("wait for the greatest gradients"):
                    self._buffers.exchange.receive_greatest()
            with self.span("rounding of gradients"):
                if not compared:
                    self._measure(i, gradient)
                rounded.quantize(gradient, self.rounding[i], self._feed.step)
            with self.span(f"gradient of {hidden.plan.name}'s input"):
                rounded.input_gradient()
            return
        incoming = self._buffers.incoming_grad(i - 1, at.number)
        by_bits = hidden.plan.backward == "bits"
        weight = None if by_bits else self._weight_of(i)
        with self.span(f"gradient of {hidden.plan.name}'s input"):
            if by_bits:
                below = self._activation_of(at, i - 1)
                self._summed[i - 1] = below.can_be_summed()
                sign_gemm.transposed_product(
                    hidden.packed_weight, gradient, incoming, self.shared.device,
                    below if self._summed[i - 1] else None, self._norm_scratch,
                )  # fmt: skip
            else:
                tools.products.multiply(gradient, weight, incoming, transpose_b=True)

    def activation_gradient(self, at: Pass, i: int, tools: Tools) -> None:
        """Turn the gradient of hidden layer `i`'s activation into that of its product."""
        with self.span("gradient of activation"):
            self.measured[i] = self._activation_of(at, i).launch(
                tools.launcher, self.greatest(i), self._summed.get(i, False)
            )

    def _activation_of(self, at: Pass, i: int) -> ActivationGradient:
        hidden = at.hidden[i]
        return ActivationGradient(
            layer=hidden.layer,
            gate=hidden.plan.gate,
            mask=hidden.mask,
            grad=self._buffers.incoming_grad(i, at.number),
            out=self._buffers.product_grad(i, at.number)[1],
        )

    def greatest(self, i: int) -> Greatest | None:
        """Return where to find the greatest magnitudes of the gradient of hidden layer `i`."""
        rounded = self._buffers.rounded.get(i)
        return None if rounded is None else rounded.greatest

    def _weight_of(self, i: int) -> Any:
        """Return hidden layer `i`'s weights for a dense product, unpacked if necessary."""
        hidden = self._buffers.hidden[i]
        if hidden.weight is not None:
            return hidden.weight
        out = self._buffers.weight_scratch((hidden.plan.inputs, hidden.plan.units))
        with self.span("unpack signs"):
            UnpackColumns(packed=hidden.packed_weight, out=out).launch(self.launcher)
        return out

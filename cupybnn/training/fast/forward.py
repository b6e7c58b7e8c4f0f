"""The forward pass of a fused step, with the loss and the gradient of the head."""

from __future__ import annotations

from typing import Any

from cupybnn.backends import cuda
from cupybnn.backends.cuda.fused_head import Head
from cupybnn.backends.cuda.fused_layers import Activation
from cupybnn.backends.cuda.graph import Fork
from cupybnn.training.config import TrainConfig
from cupybnn.training.fast.buffers import Pass
from cupybnn.training.fast.gradients import ProductGradients
from cupybnn.training.fast.parts import Part, Shared

__all__ = ["Forward"]


class Forward(Part):
    """Launches forward passes.

    Parameters
    ----------
    shared : Shared
    config : TrainConfig
        Its fields `loss` and `label_smoothing`.
    gradients : ProductGradients
        Which go on from the gradient of the head.
    """

    def __init__(self, shared: Shared, config: TrainConfig, gradients: ProductGradients) -> None:
        super().__init__(shared)
        self._gradients = gradients
        buffers = self._buffers
        first, *more = buffers.passes
        labels = buffers.labels if buffers.targets is None else buffers.targets
        self._heads = [self._make_head(config, first, labels, config.loss)]
        self._heads += [
            self._make_head(config, second, buffers.predictions, "divergence") for second in more
        ]

    def launch(self, at: Pass, fork: Fork | None = None, taught: Any = None) -> None:
        """Compute the loss, and the gradient of the last hidden product.

        Parameters
        ----------
        at : Pass
        fork : Fork, optional
            Alongside the loss, signs are turned on its stream for products with rounded gradients.
        taught : event, optional
            After which there are targets.
        """
        for i in range(len(at.hidden)):
            self._multiply(at, i)
            self._activate(at, i)
        fork = fork or Fork()
        fork.wait(taught)
        turned = None
        if self._buffers.rounded:
            with fork.aside(), self.span("turning of signs"):
                for rounded in self._buffers.rounded.values():
                    rounded.turn()
            turned = fork.mark()
        self._launch_head(at)
        fork.wait(turned)

    def _multiply(self, at: Pass, i: int) -> None:
        """Compute the product of hidden layer `i`, counted from 0."""
        hidden = at.hidden[i]
        with self.span(hidden.plan.name):
            if i == 0:
                self._main.products.multiply(
                    at.inputs, hidden.weight, hidden.layer.product, scale=self.shared.input_scale
                )
            elif hidden.plan.product == "xnor":
                before = at.hidden[i - 1].packed
                cuda.gemm(before, hidden.packed_weight, hidden.layer.product, None)
            else:
                before = at.hidden[i - 1].dense
                self._main.products.multiply(before, hidden.weight, hidden.layer.product)

    def _activate(self, at: Pass, i: int) -> None:
        """Normalize the product of hidden layer `i`, and take its sign or ReLU."""
        hidden = at.hidden[i]
        with self.span("batch norm, activation"):
            Activation(layer=hidden.layer, to=hidden.activations).launch(self.launcher)

    def _make_head(self, config: TrainConfig, at: Pass, labels: Any, loss: str) -> Head:
        head, last = self._plan.head, at.hidden[-1]
        weight = head.linear.weight
        factor = None if head.scale is None else head.scale.factor
        return Head(
            layer=last.layer,
            reads=head.reads,
            weight=weight._data,
            grad_weight=at.head_gradients[weight],
            labels=labels,
            loss=loss,
            smoothing=config.label_smoothing,
            logits=at.logits,
            grad_logits=at.logits_grad,
            mean_loss=at.mean_loss,
            factor=None if factor is None else factor._data,
            grad_factor=None if factor is None else at.head_gradients[factor],
            norm=at.head_norm,
            gate=last.plan.gate,
            window=last.plan.window,
            out=self._buffers.product_grad(len(at.hidden) - 1, at.number)[1],
            examples=self._plan.whole,
        )

    def _launch_head(self, at: Pass) -> None:
        """Compute the loss from the last hidden product, and that product's gradient."""
        with self.span("logits and loss"):
            self._heads[at.number].launch_logits(self.launcher)
        last = len(at.hidden) - 1
        with self.span("gradient of the head"):
            found = self._heads[at.number].launch_gradient(
                self.launcher, self._gradients.greatest(last)
            )
        self._gradients.measured[last] = found

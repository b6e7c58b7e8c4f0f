"""The launches of a fused step: forward, head, backward and update, in order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cupybnn.backends import cuda
from cupybnn.backends.cuda import blas, fused, fused_arguments, sign_gemm
from cupybnn.backends.cuda.fused_update import Update
from cupybnn.backends.cuda.graph import Fork
from cupybnn.data import DeviceData
from cupybnn.training.config import TrainConfig
from cupybnn.training.fast.buffers import Buffers
from cupybnn.training.fast.feed import Feed
from cupybnn.training.fast.plan import NetworkPlan
from cupybnn.training.step import augmentation_seed

__all__ = ["Passes"]


class Passes:
    """Launches a step on the current stream; allocates nothing.

    Parameters
    ----------
    plan : NetworkPlan
    buffers : Buffers
    feed : Feed
    data : DeviceData
    config : TrainConfig
        Its fields `loss`, `label_smoothing`, `dtype` and `seed`.

    Attributes
    ----------
    update : Update
        Of all parameters; to be set before the first launch.
    span : callable
        Returns a context for each launch or group of launches, given what it does.
    """

    update: Update

    def __init__(
        self,
        plan: NetworkPlan,
        buffers: Buffers,
        feed: Feed,
        data: DeviceData,
        config: TrainConfig,
    ) -> None:
        self._plan, self._buffers, self._feed = plan, buffers, feed
        self._data, self._config = data, config
        self._device = data.device.index
        self.launcher = fused.Launcher(
            self._device,
            blas.operand_dtype(plan.precision),
            plan.batch,
            max(layer.units for layer in plan.hidden),
            plan.classes,
        )
        # One for each stream that has products: those of both may run at the same time.
        self._blas = self._blas_aside = blas.Blas(plan.precision)
        if plan.keep_dense_copies and any(h.backward == "dense" for h in plan.hidden[1:]):
            self._blas_aside = blas.Blas(plan.precision)
        self._deformation = None
        if any(plan.augment):
            assert data.image_shape is not None
            self._deformation = fused_arguments.Deformation(
                data.image_shape, augmentation_seed(config), *plan.augment
            )
        keep = 1.0 if plan.input_dropout is None else plan.input_dropout.keep_prob
        #: Factor that makes pixels of the whole numbers in `Buffers.inputs`.
        self._input_scale = float(data.pixel_scale) / keep
        self.span: Callable[[str], Any] = no_span

    def launch(self, fork: Fork, draws: Sequence[fused_arguments.Draw]) -> None:
        """Launch a whole step, with what can wait aside.

        Parameters
        ----------
        fork : Fork
        draws : sequence of Draw
            One for each dropout of the model, in the order of its layers.
        """
        plan, buffers = self._plan, self._buffers
        left = iter(draws)
        pixel_draw = None if plan.input_dropout is None else next(left)
        with self.span("gather"):
            self.launcher.gather(
                self._data.train_images,
                self._data.train_labels,
                self._feed.images,
                self._feed.step,
                pixel_draw,
                buffers.inputs,
                buffers.labels,
                buffers.pops,
                self._deformation,
            )
        for hidden in buffers.hidden:
            if hidden.layer.kept is not None:
                with self.span("dropout"):
                    self.launcher.dropout_mask(
                        self._feed.step, next(left), hidden.layer.shape, hidden.layer.kept
                    )
        if plan.adversarial:
            self._forward()
            self._attack(pixel_draw)
        self._forward()
        self._backward(fork)
        fork.join()
        self._update_layer(0)

    # Forward -----------------------------------------------------------------------------------

    def _forward(self) -> None:
        """From the batch to the loss, and back to the gradient of the last hidden product."""
        for i in range(len(self._buffers.hidden)):
            self._multiply(i)
            self._activate(i)
        self._head()

    def _multiply(self, i: int) -> None:
        """Compute the product of hidden layer `i`, counted from 0."""
        hidden = self._buffers.hidden[i]
        with self.span(hidden.plan.name):
            if i == 0:
                self._blas.multiply(
                    self._buffers.inputs,
                    hidden.weight,
                    hidden.layer.product,
                    scale=self._input_scale,
                )
            elif hidden.plan.product == "xnor":
                before = self._buffers.hidden[i - 1].packed
                cuda.gemm(before, hidden.packed_weight, hidden.layer.product, None)
            else:
                before = self._buffers.hidden[i - 1].dense
                self._blas.multiply(before, hidden.weight, hidden.layer.product)

    def _activate(self, i: int) -> None:
        """Normalise the product of hidden layer `i`, and take its sign or ReLU."""
        hidden, norm = self._buffers.hidden[i], self._plan.hidden[i].norm
        with self.span("batch norm, activation"):
            if norm is None:
                self.launcher.activate(hidden.layer, hidden.activations)
            else:
                self.launcher.normalise(
                    hidden.layer,
                    (norm.mean, norm.variance),
                    norm.decay,
                    norm.eps,
                    hidden.activations,
                )

    def _norm_grads(self, norm: Any) -> tuple[Any, Any] | None:
        if norm is None:
            return None
        return self._buffers.gradients[norm.gamma], self._buffers.gradients[norm.beta]

    def _head(self) -> None:
        """From the last hidden product to the loss, and back to that product's gradient."""
        buffers, head = self._buffers, self._plan.head
        last, weight = buffers.hidden[-1], head.linear.weight
        kind, smoothing = self._config.loss, self._config.label_smoothing
        factor = None if head.scale is None else head.scale.factor
        with self.span("logits and loss"):
            self.launcher.logits(
                last.layer, head.reads, weight._data, buffers.labels, kind, smoothing,
                None if factor is None else factor._data, buffers.logits, buffers.logits_grad,
            )  # fmt: skip
            if head.norm is not None:
                norm, grads = head.norm, self._norm_grads(head.norm)
                self.launcher.output_norm(
                    (norm.gamma._data, norm.beta._data), (norm.mean, norm.variance), norm.decay,
                    norm.eps, buffers.labels, kind, smoothing, buffers.logits,
                    buffers.logits_grad, grads, buffers.mean_loss,
                )  # fmt: skip
        with self.span("gradient of the head"):
            self.launcher.head_gradient(
                last.layer, head.reads, kind, weight._data, buffers.logits_grad, last.plan.gate,
                last.plan.window, buffers.gradients[weight], self._norm_grads(last.plan.norm),
                buffers.product_grad(len(buffers.hidden) - 1)[1], buffers.mean_loss,
                None if factor is None else buffers.gradients[factor],
            )  # fmt: skip

    # Backward ----------------------------------------------------------------------------------

    def _backward(self, fork: Fork) -> None:
        """Gradients of the hidden layers' weights, from the last layer to the first.

        What the layer below waits for comes first; alongside, or after it where memory is spared,
        weights get their gradients and are updated, except those of the first layer.
        """
        buffers = self._buffers
        in_use: dict[int, Any] = {}  # events after which a gradient's buffer is free

        def finish(i: int) -> None:
            own, gradient = buffers.product_grad(i)
            if buffers.hidden[i].plan.backward == "bits":
                self._update_by_bits(i, gradient)
            else:
                self._weight_gradient(i, gradient, self._blas_aside)
            if own is not None:
                in_use[own] = fork.mark()
            self._update_layer(i)

        for i in reversed(range(1, len(buffers.hidden))):
            below = buffers.product_grad(i - 1)[0]
            if below is not None:
                fork.wait(in_use.pop(below, None))
            self._input_gradient(i)
            if self._plan.keep_dense_copies:
                with fork.aside():
                    finish(i)
            self._activation_gradient(i - 1)
            if not self._plan.keep_dense_copies:  # shared memory is free again
                finish(i)
        self._weight_gradient(0, buffers.product_grad(0)[1], self._blas)

    def _input_gradient(self, i: int) -> None:
        """Gradient of what enters the product of hidden layer `i` > 0, counted from 0."""
        hidden, gradient = self._buffers.hidden[i], self._buffers.product_grad(i)[1]
        incoming = self._buffers.incoming_grad(i - 1)
        by_bits = hidden.plan.backward == "bits"
        weight = None if by_bits else self._weight_of(i)
        with self.span(f"gradient of {hidden.plan.name}'s input"):
            if by_bits:
                sign_gemm.transposed_product(hidden.packed_weight, gradient, incoming, self._device)
            else:
                self._blas.multiply(gradient, weight, incoming, transpose_b=True)

    def _activation_gradient(self, i: int) -> None:
        """Turn the gradient of hidden layer `i`'s activation into that of its product."""
        buffers, hidden = self._buffers, self._buffers.hidden[i]
        with self.span("gradient of activation"):
            self.launcher.gradient(
                hidden.layer, hidden.plan.gate, hidden.mask, buffers.incoming_grad(i),
                buffers.product_grad(i)[1], self._norm_grads(hidden.plan.norm),
            )  # fmt: skip

    def _weight_of(self, i: int) -> Any:
        """Return hidden layer `i`'s weights for a dense product, unpacked where they must be."""
        hidden = self._buffers.hidden[i]
        if hidden.weight is not None:
            return hidden.weight
        out = self._buffers.weight_scratch((hidden.plan.inputs, hidden.plan.units))
        with self.span("unpack signs"):
            self.launcher.unpack_columns(hidden.packed_weight, out)
        return out

    def _weight_gradient(self, i: int, gradient: Any, products: blas.Blas) -> None:
        """Gradient of the weights of hidden layer `i`."""
        hidden = self._buffers.hidden[i]
        inputs, scale = self._buffers.inputs, self._input_scale
        if i:
            before, scale = self._buffers.hidden[i - 1], 1.0
            inputs = before.dense
            if inputs is None:
                inputs = self._buffers.signs(i - 1)
                with self.span("unpack signs"):
                    self.launcher.unpack_rows(before.packed, inputs)
        out = self._buffers.gradients[hidden.plan.linear.weight]
        with self.span(f"gradient of {hidden.plan.name}'s weights"):
            products.multiply(inputs, gradient, out, transpose_a=True, scale=scale)

    def _update_by_bits(self, i: int, gradient: Any) -> None:
        """Compute the gradient of hidden layer `i`'s weights and update them with it."""
        signs, name = self._buffers.hidden[i - 1].packed, self._plan.hidden[i].name
        with self.span(f"gradient of {name}'s weights and their update"):
            self.update.launch_at_once(
                self._group(i), signs, gradient, self._feed.rates, self._feed.step
            )

    def _group(self, i: int) -> int:
        """Number of the update of hidden layer `i`: they go from the last layer to the first."""
        return len(self._buffers.hidden) - 1 - i

    def _update_layer(self, i: int) -> None:
        """Update what belongs to hidden layer `i`, and with the last one the head."""
        with self.span("update"):
            self.update.launch(
                self._group(i),
                self._feed.rates,
                self._feed.step,
                self._buffers.mean_loss,
                self._buffers.loss,
            )

    # The attack --------------------------------------------------------------------------------

    def _attack(self, pixel_draw: fused_arguments.Draw | None) -> None:
        """Move the batch against the network. No gradient of a parameter is used."""
        buffers = self._buffers
        for i in reversed(range(1, len(buffers.hidden))):
            self._input_gradient(i)
            self._activation_gradient(i - 1)
        with self.span("gradient of the pixels"):
            self._blas.multiply(
                buffers.product_grad(0)[1],
                self._weight_of(0),
                buffers.input_grad,
                transpose_b=True,
            )
        with self.span("attack"):
            self.launcher.attack(
                buffers.input_grad,
                self._feed.step,
                pixel_draw,
                self._plan.adversarial / float(self._data.pixel_scale),
                buffers.inputs,
                buffers.pops,
            )


@contextlib.contextmanager
def no_span(name: str) -> Iterator[None]:
    """Do nothing around a launch."""
    yield

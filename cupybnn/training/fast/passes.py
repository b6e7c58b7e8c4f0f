"""The launches of a fused step: forward, head, backward and update, in order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from cupybnn.backends import cuda
from cupybnn.backends.cuda import blas, fused, sign_gemm
from cupybnn.backends.cuda.fused_batch import Draw, DropoutMask
from cupybnn.backends.cuda.fused_head import Head
from cupybnn.backends.cuda.fused_layers import (
    Activation,
    ActivationGradient,
    Greatest,
    UnpackColumns,
    UnpackRows,
)
from cupybnn.backends.cuda.fused_update import Update
from cupybnn.backends.cuda.fused_virtual import Soften
from cupybnn.backends.cuda.graph import Fork
from cupybnn.data import DeviceData
from cupybnn.training.config import TrainConfig
from cupybnn.training.fast.buffers import Buffers, Pass
from cupybnn.training.fast.exchange import Exchange
from cupybnn.training.fast.feed import Feed
from cupybnn.training.fast.images import Images
from cupybnn.training.fast.plan import NetworkPlan
from cupybnn.training.fast.teaching import Teaching

__all__ = ["Passes"]


class _Tools(NamedTuple):
    """What has memory of its own for each stream, because both streams may run at a time."""

    launcher: fused.Launcher
    products: blas.Blas


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
    teaching : Teaching, optional
        The networks whose predictions are learned.

    Attributes
    ----------
    update : Update
        Updates all parameters; must be set before the first launch.
    sums_loss : bool
        Whether the loss is still to be summed over all ranks after the update.
    span : callable
        Gets the name of a launch or group of launches, and returns a context for it.
    """

    update: Update
    sums_loss = False

    def __init__(
        self,
        plan: NetworkPlan,
        buffers: Buffers,
        feed: Feed,
        data: DeviceData,
        config: TrainConfig,
        teaching: Teaching | None = None,
    ) -> None:
        self._plan, self._buffers, self._feed = plan, buffers, feed
        self._data = data
        self._device = data.device.index
        self.launcher = self._new_launcher()
        self._main = self._side = _Tools(self.launcher, blas.Blas(plan.precision))
        if plan.keep_dense_copies and any(h.backward == "dense" for h in plan.hidden[1:]):
            launcher = self._new_launcher() if plan.vat else self.launcher
            self._side = _Tools(launcher, blas.Blas(plan.precision))
        self._images = Images(plan, buffers, feed, data, config, teaching)
        first, *more = buffers.passes
        labels = buffers.labels if buffers.targets is None else buffers.targets
        self._heads = [self._make_head(config, first, labels, config.loss)]
        self._heads += [
            self._make_head(config, second, buffers.predictions, "divergence") for second in more
        ]
        keep = 1.0 if plan.input_dropout is None else plan.input_dropout.keep_prob
        #: Factor that turns the whole numbers in `Buffers.inputs` into pixels.
        self._input_scale = float(data.pixel_scale) / keep
        self._rounding: dict[int, Draw] = {}
        #: By number of a hidden layer: whether its gradient's greatest magnitudes are known.
        self._measured: dict[int, bool] = {}
        #: Likewise: whether the product that computes its activations' gradient has added it up.
        self._summed: dict[int, bool] = {}
        self._norm_scratch = None
        if any(layer.backward == "bits" for layer in plan.hidden):
            widest = max(layer.units for layer in plan.hidden)
            self._norm_scratch = sign_gemm.NormScratch(plan.batch, widest)
        self.span: Callable[[str], Any] = no_span

    def _new_launcher(self) -> fused.Launcher:
        plan = self._plan
        return fused.Launcher(
            self._device,
            blas.operand_dtype(plan.precision),
            shapes=[(plan.batch, layer.units) for layer in plan.hidden],
            classes=plan.classes,
            clusters=self._buffers.clusters,
        )

    def launch(self, fork: Fork, draws: Sequence[Draw]) -> None:
        """Launch a whole step; what nothing waits for goes to the second stream, if any.

        Parameters
        ----------
        fork : Fork
        draws : sequence of Draw
            One for each dropout of the model, in layer order, then one for each layer whose
            gradient is rounded.
        """
        plan, buffers, feed = self._plan, self._buffers, self._feed
        for tools in (self._main, self._side):
            tools.launcher.begin_step()
        remaining = iter(draws)
        pixel_draw = None if plan.input_dropout is None else next(remaining)
        taught = self._images.gather(self.launcher, fork, pixel_draw, self.span)
        for hidden in buffers.hidden:
            layer = hidden.layer
            if layer.kept is not None:
                with self.span("dropout"):
                    DropoutMask(
                        step=feed.step,
                        draw=next(remaining),
                        shape=layer.shape,
                        out=layer.kept,
                        first=plan.first,
                    ).launch(self.launcher)
        self._rounding = dict(zip(buffers.rounded, remaining, strict=True))
        first = buffers.passes[0]
        if plan.adversarial:
            self._forward(first, fork, taught)
            self._attack(pixel_draw)
        self._forward(first, fork, taught)
        if plan.vat:
            # Its kernels fill the multiprocessors that those of a search leave idle.
            with fork.aside():
                self._descend(first, self._side)
            descended = fork.mark()
            self._search(pixel_draw)
            self._forward(buffers.passes[1])
            fork.wait(descended)
        self._backward(fork)
        fork.join()
        if buffers.exchange is None:
            self._update_layer(0)
        else:
            self._finish(buffers.exchange)

    # Forward -----------------------------------------------------------------------------------

    def _forward(self, at: Pass, fork: Fork | None = None, taught: Any = None) -> None:
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
                    at.inputs, hidden.weight, hidden.layer.product, scale=self._input_scale
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
            found = self._heads[at.number].launch_gradient(self.launcher, self._greatest(last))
        self._measured[last] = found

    # Backward ----------------------------------------------------------------------------------

    def _backward(self, fork: Fork) -> None:
        """Compute the gradients of hidden weights, from the last layer to the first.

        In each layer, the gradient for the layer below comes first. The weight gradient and the
        update follow it, or run alongside it on further streams, if there are any. They are
        launched after the gradient of the activation, which the next product waits for: of two
        kernels that can begin, the device begins the one that was captured first. A product that
        also updates fills the device and would hold up what runs alongside, so it follows. The
        first layer is updated by `launch`, together with the second if
        `NetworkPlan.updates_together`. With other ranks, weight gradients are sent, at once or at
        the end (see `Exchange.overlaps`), and layers are updated later.
        """
        buffers, exchange = self._buffers, self._buffers.exchange
        last = buffers.passes[-1]
        in_use: dict[int, Any] = {}  # events after which a gradient buffer is free

        def finish(i: int, ready: Any) -> None:
            own, gradient = buffers.product_grad(i, None)
            fills = self._plan.hidden[i].updates and exchange is None
            with contextlib.nullcontext() if fills else fork.aside(ready):
                if i in buffers.rounded:
                    self._finish_rounded(i)
                elif buffers.hidden[i].plan.backward == "dense":
                    self._weight_gradient(i, gradient, self._side.products)
                elif exchange is None:
                    self._update_by_bits(i, gradient)
                else:
                    self._gradient_by_bits(i, gradient)
                if exchange is not None and exchange.overlaps:
                    exchange.send_gradient(buffers.hidden[i].plan.linear.weight)
            done = None if fills else fork.mark()
            if own is not None:
                in_use[own] = done
            if exchange is None and (i > 1 or not self._plan.updates_together):
                with fork.aside(done, 1):
                    self._update_layer(i)

        buffers.add_passes(len(buffers.hidden) - 1)
        self._compare(len(buffers.hidden) - 1)
        for i in reversed(range(1, len(buffers.hidden))):
            below = buffers.product_grad(i - 1)[0]
            if below is not None:
                fork.wait(in_use.pop(below, None))
            self._input_gradient(last, i, self._main, compared=exchange is not None)
            ready = fork.ready()
            self._activation_gradient(last, i - 1, self._main)
            buffers.add_passes(i - 1)
            self._compare(i - 1)  # before the weight gradient is sent, which takes longer
            finish(i, ready)
        if exchange is not None and exchange.overlaps:
            exchange.send_small()  # all of them are there
            if exchange.early:
                with fork.aside():
                    self._update_shares(exchange)
                    self._receive_signs(exchange)
        self._weight_gradient(0, buffers.product_grad(0, None)[1], self._main.products)
        if exchange is not None:
            unsent = buffers.hidden[:1]
            if not exchange.overlaps:
                exchange.send_small()
                unsent = buffers.hidden[::-1]
            for hidden in unsent:
                exchange.send_gradient(hidden.plan.linear.weight)

    def _descend(self, at: Pass, tools: _Tools) -> None:
        """Compute the gradients of all products of a pass, without those of hidden weights."""
        for i in reversed(range(1, len(at.hidden))):
            self._input_gradient(at, i, tools)
            self._activation_gradient(at, i - 1, tools)

    def _compare(self, i: int) -> None:
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
        if not self._measured[i]:
            self._buffers.rounded[i].measure(gradient)

    def _input_gradient(self, at: Pass, i: int, tools: _Tools, compared: bool = False) -> None:
        """Compute the gradient of the input of hidden layer `i` > 0, counted from 0.

        With `compared`, `_compare` was called before. For the gradient of the inputs alone, that is
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
                rounded.quantize(gradient, self._rounding[i], self._feed.step)
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
                    hidden.packed_weight, gradient, incoming, self._device,
                    below if self._summed[i - 1] else None, self._norm_scratch,
                )  # fmt: skip
            else:
                tools.products.multiply(gradient, weight, incoming, transpose_b=True)

    def _activation_gradient(self, at: Pass, i: int, tools: _Tools) -> None:
        """Turn the gradient of hidden layer `i`'s activation into that of its product."""
        with self.span("gradient of activation"):
            self._measured[i] = self._activation_of(at, i).launch(
                tools.launcher, self._greatest(i), self._summed.get(i, False)
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

    def _greatest(self, i: int) -> Greatest | None:
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

    def _weight_gradient(self, i: int, gradient: Any, products: blas.Blas) -> None:
        """Compute the gradient of the weights of hidden layer `i`, summed over all passes."""
        hidden = self._buffers.hidden[i]
        inputs, scale = self._buffers.all_inputs, self._input_scale
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

    def _update_by_bits(self, i: int, gradient: Any) -> None:
        """Compute the gradient of hidden layer `i`'s weights and update them, in one kernel."""
        signs, name = self._buffers.hidden[i - 1].packed, self._plan.hidden[i].name
        with self.span(f"gradient of {name}'s weights and their update"):
            self.update.launch_fused_update(self._group(i), signs=signs, matrix=gradient)

    def _gradient_by_bits(self, i: int, gradient: Any) -> None:
        """Compute the gradient of hidden layer `i`'s weights from packed signs."""
        before, hidden = self._buffers.hidden[i - 1], self._buffers.hidden[i]
        out = self._buffers.gradients[hidden.plan.linear.weight]
        with self.span(f"gradient of {hidden.plan.name}'s weights"):
            sign_gemm.weight_gradient(before.packed, gradient, out, self._device)

    def _finish_rounded(self, i: int) -> None:
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

    def _update_layer(self, i: int) -> None:
        """Update the parameters of hidden layer `i`; the head's are updated with the last."""
        with self.span("update"):
            self.update.launch(self._group(i))

    def _update_shares(self, exchange: Exchange) -> None:
        """Update this rank's shares of weights, and send their signs."""
        for number, weight in enumerate(exchange.updated):
            with self.span("wait for gradients"):
                exchange.receive(weight)
            with self.span("update"):
                self.update.launch(number)
        exchange.send_signs()

    def _receive_signs(self, exchange: Exchange) -> None:
        """Put the signs of all shares where the next step reads them; this one no longer does."""
        with self.span("wait for signs"):
            exchange.receive_signs(self._buffers.hidden, self.launcher)

    def _finish(self, exchange: Exchange) -> None:
        """Update what has not been updated, with the sums over all ranks; see `plan_update`."""
        buffers = self._buffers
        if not exchange.early:
            self._update_shares(exchange)
        with self.span("wait for gradients"):
            exchange.receive_rest()
        with self.span("update"):
            self.update.launch(len(exchange.updated))
        if not exchange.early:
            self._receive_signs(exchange)
        if self.sums_loss:
            with self.span("wait for the loss"):
                exchange.add_up(buffers.loss, buffers.loss)

    # Adversarial images ------------------------------------------------------------------------

    def _pixel_gradient(self, at: Pass) -> None:
        """Compute the gradient of the pixels, up to a factor."""
        buffers = self._buffers
        self._descend(at, self._main)
        with self.span("gradient of the pixels"):
            self._main.products.multiply(
                buffers.product_grad(0, at.number)[1],
                self._weight_of(0),
                buffers.input_grad,
                transpose_b=True,
            )

    def _attack(self, pixel_draw: Draw | None) -> None:
        """Move the batch in the direction that increases the loss; updates no parameter."""
        self._pixel_gradient(self._buffers.passes[0])
        with self.span("attack"):
            self._images.attack(self.launcher, pixel_draw)

    def _search(self, pixel_draw: Draw | None) -> None:
        """Make the second pass's images: moved to where predictions change most."""
        buffers, second = self._buffers, self._buffers.passes[1]
        with self.span("predictions"):
            Soften(logits=buffers.logits, out=buffers.predictions).launch(self.launcher)
        with self.span("move"):
            self._images.move(self.launcher, "random", self._plan.vat_xi, pixel_draw)
        self._forward(second)
        self._pixel_gradient(second)
        with self.span("move"):
            self._images.move(self.launcher, "gradient", self._plan.vat, pixel_draw)


@contextlib.contextmanager
def no_span(name: str) -> Iterator[None]:
    """Do nothing; the default of `Passes.span`."""
    yield

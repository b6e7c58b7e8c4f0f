"""The launches of a fused step: forward, head, backward and update, in order."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from cupybnn.backends.cuda.fused_batch import Draw, DropoutMask
from cupybnn.backends.cuda.fused_virtual import Soften
from cupybnn.backends.cuda.graph import Fork
from cupybnn.data import DeviceData
from cupybnn.training.config import TrainConfig
from cupybnn.training.fast.buffers import Buffers
from cupybnn.training.fast.feed import Feed
from cupybnn.training.fast.forward import Forward
from cupybnn.training.fast.gradients import ProductGradients
from cupybnn.training.fast.images import Images
from cupybnn.training.fast.parts import Part, Shared
from cupybnn.training.fast.plan import NetworkPlan
from cupybnn.training.fast.teaching import Teaching
from cupybnn.training.fast.weights import Weights

__all__ = ["Passes"]


class Passes(Part):
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
    gradients : ProductGradients
    weights : Weights
        Its `update` must be set before the first launch.
    """

    def __init__(
        self,
        plan: NetworkPlan,
        buffers: Buffers,
        feed: Feed,
        data: DeviceData,
        config: TrainConfig,
        teaching: Teaching | None = None,
    ) -> None:
        super().__init__(Shared(plan, buffers, feed, data))
        self._images = Images(plan, buffers, feed, data, config, teaching)
        self.gradients = ProductGradients(self.shared)
        self._forward = Forward(self.shared, config, self.gradients)
        self.weights = Weights(self.shared)

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
        self.gradients.rounding = dict(zip(buffers.rounded, remaining, strict=True))
        first = buffers.passes[0]
        if plan.adversarial:
            self._forward.launch(first, fork, taught)
            self._attack(pixel_draw)
        self._forward.launch(first, fork, taught)
        if plan.vat:
            # Its kernels fill the multiprocessors that those of a search leave idle.
            with fork.aside():
                self.gradients.descend(first, self._side)
            descended = fork.mark()
            self._search(pixel_draw)
            self._forward.launch(buffers.passes[1])
            fork.wait(descended)
        self._backward(fork)
        fork.join()
        if buffers.exchange is None:
            self.weights.update_layer(0)
        else:
            self.weights.update_rest(buffers.exchange)

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
                    self.weights.gradient_by_planes(i)
                elif buffers.hidden[i].plan.backward == "dense":
                    self.weights.gradient(i, gradient, self._side.products)
                elif fills:
                    self.weights.update_by_bits(i, gradient)
                else:
                    self.weights.gradient_by_bits(i, gradient)
                if exchange is not None and exchange.overlaps:
                    exchange.send_gradient(buffers.hidden[i].plan.linear.weight)
            done = None if fills else fork.mark()
            if own is not None:
                in_use[own] = done
            if exchange is None and (i > 1 or not self._plan.updates_together):
                with fork.aside(done, 1):
                    self.weights.update_layer(i)

        buffers.add_passes(len(buffers.hidden) - 1)
        self.gradients.compare(len(buffers.hidden) - 1)
        for i in reversed(range(1, len(buffers.hidden))):
            below = buffers.product_grad(i - 1)[0]
            if below is not None:
                fork.wait(in_use.pop(below, None))
            self.gradients.input_gradient(last, i, self._main, compared=exchange is not None)
            ready = fork.ready()
            self.gradients.activation_gradient(last, i - 1, self._main)
            buffers.add_passes(i - 1)
            self.gradients.compare(i - 1)  # before the weight gradient is sent, which takes longer
            finish(i, ready)
        if exchange is not None and exchange.overlaps:
            exchange.send_small()  # all of them are there
            if exchange.early:
                with fork.aside():
                    self.weights.update_shares(exchange)
                    self.weights.receive_signs(exchange)
        self.weights.gradient(0, buffers.product_grad(0, None)[1], self._main.products)
        if exchange is not None:
            unsent = buffers.hidden[:1]
            if not exchange.overlaps:
                fork.join()
                exchange.send_small()
                unsent = buffers.hidden[::-1]
            for hidden in unsent:
                exchange.send_gradient(hidden.plan.linear.weight)

    def _attack(self, pixel_draw: Draw | None) -> None:
        """Move the batch in the direction that increases the loss; updates no parameter."""
        self.gradients.of_pixels(self._buffers.passes[0])
        with self.span("attack"):
            self._images.attack(self.launcher, pixel_draw)

    def _search(self, pixel_draw: Draw | None) -> None:
        """Make the second pass's images: moved to where predictions change most."""
        buffers, second = self._buffers, self._buffers.passes[1]
        with self.span("predictions"):
            Soften(logits=buffers.logits, out=buffers.predictions).launch(self.launcher)
        with self.span("move"):
            self._images.move(self.launcher, "random", self._plan.vat_xi, pixel_draw)
        self._forward.launch(second)
        self.gradients.of_pixels(second)
        with self.span("move"):
            self._images.move(self.launcher, "gradient", self._plan.vat, pixel_draw)

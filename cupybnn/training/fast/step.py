"""One training step as few launches as the mathematics allows, captured as a CUDA graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from cupybnn import optim
from cupybnn.backends import cuda
from cupybnn.backends.cuda import blas, fused, fused_arguments, fused_update, sign_gemm
from cupybnn.backends.cuda.graph import Fork, capture
from cupybnn.data import BatchOrder, DeviceData
from cupybnn.training.config import TrainConfig
from cupybnn.training.fast.buffers import Buffers, HiddenBuffers
from cupybnn.training.fast.feed import Feed
from cupybnn.training.fast.plan import NetworkPlan
from cupybnn.training.network import Perceptron
from cupybnn.training.step import StepOutput, augmentation_seed

__all__ = ["FusedStep"]


class FusedStep:
    """Makes the steps that `PlainStep` defines, in float32 within rounding.

    Parameters, batch norm's running statistics and the optimiser's arrays are worked on where they
    are, so that evaluation, records and checkpoints see each step. After one of them was changed
    from outside, call `refresh`.

    Parameters
    ----------
    model : Perceptron
        On the current CUDA device; `obstacle` has nothing against it.
    optimizer : Adam or AdamW
    data : DeviceData
    order : BatchOrder
    config : TrainConfig
    notify : callable, optional
        Told in a sentence when steps cannot be captured.

    Notes
    -----
    What a step returns is overwritten by the next one. So are parameters' gradients; where products
    round them or update by them at once, and nobody records them, `grad` is None.
    """

    def __init__(
        self,
        model: Perceptron,
        optimizer: optim.Adam,
        data: DeviceData,
        order: BatchOrder,
        config: TrainConfig,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        import cupy

        self._device = data.device.index
        self.plan = NetworkPlan.of(config, data.features, data.classes, self._device)
        self._config = config
        self._model, self._optimizer, self._data = model, optimizer, data
        self._notify = notify or (lambda sentence: None)
        self._recorded = config.log_dir is not None
        self.buffers = Buffers(self.plan, model, data.device, self._recorded)
        self.feed = Feed(order, optimizer)
        real = blas.operand_dtype(config.dtype)
        self._launcher = fused.Launcher(
            data.device.index, real, config.batch_size, config.n_hidden, data.classes
        )
        # One for each stream that has products: those of both may run at the same time.
        self._blas = self._blas_aside = blas.Blas(config.dtype)
        if self.plan.roomy and any(hidden.backward == "dense" for hidden in self.plan.hidden[1:]):
            self._blas_aside = blas.Blas(config.dtype)
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._stream_aside = cupy.cuda.Stream(non_blocking=True)
        self._graph: Any = None
        self._capture = config.graph
        if config.graph and not blas.capturable():
            self._capture = False
            self._notify(
                "Steps are launched kernel by kernel, since CuPy's dense products cannot be put in "
                "a CUDA graph: pip install nvmath-python."
            )
        self._warm = False
        self._offsets: tuple[int, ...] = ()
        self._penalty = "none" if config.reg == 0 else config.penalty
        self._deformation = None
        if any(self.plan.augment):
            assert data.image_shape is not None
            self._deformation = fused_arguments.Deformation(
                data.image_shape, augmentation_seed(config), *self.plan.augment
            )
        self._span: Callable[[str], Any] = _no_span
        self._parameters = list(model.named_parameters())
        self._update = self._planned_update()

    def _planned_update(self) -> fused_update.Update:
        """Plan the update, in the order in which layers get their gradients: the last one first."""
        group = self._optimizer.groups[0]
        scale = group["lr_scale"]
        layers = len(self.buffers.hidden)
        groups: list[list[fused_update.Updated]] = [[] for _ in range(layers)]
        for name, parameter in self._parameters:
            mean, square = self._optimizer._slots_of(parameter)
            layer, _, kind = name.partition(".")
            number = int(layer.lstrip("fcbn")) if layer[-1].isdigit() else layers
            hidden = self.buffers.hidden[number - 1] if layer == f"fc{number}" else None
            latent = parameter.bits == 1
            penalised = kind == "weight" and (self._penalty == "l1" or latent)
            groups[layers - number].append(
                fused_update.Updated(
                    parameter._data,
                    self.buffers.gradients[name],
                    mean,
                    square,
                    left=self.buffers.left[name],
                    copy=hidden.weight if hidden is not None and hidden.copied else None,
                    packed=hidden.packed_weight if hidden is not None else None,
                    binary=latent,
                    gate=self.plan.latent_gate if latent else "none",
                    limit=parameter.limit,
                    lr_scale=scale(parameter) if callable(scale) else scale,
                    penalty=self._config.reg if penalised else 0.0,
                    weight_decay=group.get("weight_decay", 0.0),
                )
            )
        return fused_update.Update(
            self._launcher, groups, group["betas"], self._penalty, self._recorded
        )

    def refresh(self) -> None:
        """Take up weights that were changed from outside."""
        for hidden in self.buffers.hidden:
            hidden.refresh(getattr(self._model, f"fc{hidden.plan.number}").weight._data)

    def __call__(self, step: int) -> StepOutput:
        """Make step number `step`."""
        self.feed.prepare(step)
        self._count_draws(step)
        if self._capture and self._graph is None and self._warm:
            self._graph = self._captured()
        if self._graph is not None:
            self._graph.launch()
        else:
            self._launch(Fork(None))
            self._warm = True
        self._optimizer.steps += 1
        for name, parameter in self._parameters:
            parameter.write()  # notes that it changed
            parameter.grad = self.buffers.left[name]
        buffers = self.buffers
        return StepOutput(buffers.loss.reshape(()), buffers.logits, buffers.labels)

    def _captured(self) -> Any:
        """Return the graph of a step, or None, and say so, where it cannot be had."""
        try:
            aside = self._stream_aside if self.plan.roomy else None
            return capture(self._stream, lambda: self._launch(Fork(aside)))
        except RuntimeError as error:
            self._capture = False
            self._notify(f"Steps are launched kernel by kernel, since {error}.")
            return None

    def spans(self, step: int) -> dict[str, float]:
        """Make step number `step`, kernel by kernel.

        Returns
        -------
        dict of str to float
            Seconds on the device by what was launched. Small ones are mostly the gap to the next.
        """
        import cupy

        events: list[tuple[str, Any, Any]] = []

        @contextlib.contextmanager
        def span(name: str) -> Iterator[None]:
            begin, end = cupy.cuda.Event(), cupy.cuda.Event()
            begin.record()
            yield
            end.record()
            events.append((name, begin, end))

        graph, self._graph, capturing, self._capture = self._graph, None, self._capture, False
        self._span = span
        try:
            self(step)
        finally:
            self._graph, self._capture, self._span = graph, capturing, _no_span
        seconds: dict[str, float] = {}
        for name, begin, end in events:
            end.synchronize()
            elapsed = cupy.cuda.get_elapsed_time(begin, end) / 1e3
            seconds[name] = seconds.get(name, 0.0) + elapsed
        return seconds

    # Random numbers ----------------------------------------------------------------------------

    def _dropouts(self) -> list[Any]:
        """Return the dropout layers in use, that of the pixels first."""
        plan = self.plan
        names = ["dropout0"] * (plan.input_keep_prob < 1)
        if plan.keep_prob < 1:
            names += [f"dropout{hidden.number}" for hidden in plan.hidden]
        return [getattr(self._model, name) for name in names]

    def _count_draws(self, step: int) -> None:
        """Move the dropout layers' counters on; their draws of this step have `step + offset`."""
        counters = [layer.random.next()[1] for layer in self._dropouts()]
        offsets = tuple(counter - step for counter in counters)
        if offsets != self._offsets:
            self._offsets, self._graph = offsets, None

    def _draws(self) -> Iterator[fused_arguments.Draw]:
        for layer, offset in zip(self._dropouts(), self._offsets, strict=True):
            yield fused_arguments.Draw(int(layer.random.state[0]), offset, layer.keep_prob)

    # The launches of a step --------------------------------------------------------------------

    def _launch(self, fork: Fork) -> None:
        """Launch a step on the current stream, with what can wait aside."""
        plan, buffers, launcher, data = self.plan, self.buffers, self._launcher, self._data
        span = self._span
        draws = self._draws()
        of_pixels = next(draws) if plan.input_keep_prob < 1 else None
        with span("gather"):
            launcher.gather(
                data.train_images,
                data.train_labels,
                self.feed.images,
                self.feed.step,
                of_pixels,
                buffers.inputs,
                buffers.labels,
                buffers.pops,
                self._deformation,
            )
        for hidden in buffers.hidden:
            if hidden.layer.kept is not None:
                with span("dropout"):
                    launcher.dropout_mask(
                        self.feed.step, next(draws), hidden.layer.shape, hidden.layer.kept
                    )
        if plan.adversarial:
            self._forward()
            self._attack(of_pixels)
        self._forward()
        self._backward(fork)
        fork.join()
        self._update_layer(1)

    def _forward(self) -> None:
        """From the batch to the loss, and back to the last product's gradient."""
        for i, hidden in enumerate(self.buffers.hidden):
            self._multiply(i)
            self._normalise(hidden)
        self._head()

    def _attack(self, of_pixels: fused_arguments.Draw | None) -> None:
        """Move the batch against the network. No gradient of a parameter is used."""
        buffers = self.buffers
        for i in reversed(range(1, len(buffers.hidden))):
            self._input_gradient(i)
            self._activation_gradient(i - 1)
        with self._span("gradient of the pixels"):
            self._blas.multiply(
                buffers.gradient_of(0)[1],
                self._weight_of(0),
                buffers.of_inputs,
                transpose_b=True,
            )
        with self._span("attack"):
            self._launcher.attack(
                buffers.of_inputs,
                self.feed.step,
                of_pixels,
                self.plan.adversarial / float(self._data.pixel_scale),
                buffers.inputs,
                buffers.pops,
            )

    def _update_layer(self, number: int) -> None:
        """Update what belongs to hidden layer `number`, and with the last one what follows it."""
        with self._span("update"):
            self._update.launch(
                len(self.buffers.hidden) - number,
                self.feed.rates,
                self.feed.step,
                self.buffers.mean_loss,
                self.buffers.loss,
            )

    def _input_scale(self) -> float:
        """Factor that makes pixels of the whole numbers in `Buffers.inputs`."""
        return float(self._data.pixel_scale) / self.plan.input_keep_prob

    def _multiply(self, i: int) -> None:
        """Compute the product of hidden layer `i`, counted from 0."""
        hidden = self.buffers.hidden[i]
        before = self.buffers.hidden[i - 1] if i else None
        with self._span(f"fc{i + 1}"):
            if before is None:
                scale = self._input_scale()
                self._blas.multiply(
                    self.buffers.inputs, hidden.weight, hidden.layer.product, scale=scale
                )
            elif hidden.plan.product == "xnor":
                cuda.gemm(before.packed, hidden.packed_weight, hidden.layer.product, None)
            else:
                self._blas.multiply(before.dense, hidden.weight, hidden.layer.product)

    def _normalise(self, hidden: HiddenBuffers) -> None:
        number = hidden.plan.number
        with self._span("batch norm, activation"):
            if hidden.layer.norm is None:
                self._launcher.activate(hidden.layer, hidden.activations)
                return
            norm = getattr(self._model, f"bn{number}")
            running = (norm.mean, norm.variance)
            self._launcher.normalise(
                hidden.layer, running, norm.decay, norm.eps, hidden.activations
            )

    def _norm_gradients(self, number: int) -> tuple[Any, Any] | None:
        if not self.plan.batch_norm:
            return None
        gradients = self.buffers.gradients
        return gradients[f"bn{number}.gamma"], gradients[f"bn{number}.beta"]

    def _head(self) -> None:
        """From the last hidden product to the loss, and back to that product's gradient."""
        buffers, last = self.buffers, self.buffers.hidden[-1]
        number, head = len(buffers.hidden), self.plan.head
        weight = dict(self._parameters)["fcout.weight"]._data
        kind, smoothing = self._config.loss, self._config.label_smoothing
        scale = dict(self._parameters).get("scaleout.factor")
        factor = None if scale is None else scale._data
        with self._span("logits and loss"):
            self._launcher.logits(
                last.layer, head, weight, buffers.labels, kind, smoothing, factor, buffers.logits,
                buffers.of_logits,
            )  # fmt: skip
            if head == "sign" and factor is None:
                norm, gradients = vars(self._model)["bnout"], buffers.gradients
                self._launcher.output_norm(
                    (norm.gamma._data, norm.beta._data), (norm.mean, norm.variance), norm.decay,
                    norm.eps, buffers.labels, kind, smoothing, buffers.logits, buffers.of_logits,
                    (gradients["bnout.gamma"], gradients["bnout.beta"]), buffers.mean_loss,
                )  # fmt: skip
        with self._span("gradient of the head"):
            self._launcher.head_gradient(
                last.layer, head, kind, weight, buffers.of_logits, last.plan.gate,
                last.plan.window, buffers.gradients["fcout.weight"], self._norm_gradients(number),
                buffers.gradient_of(number - 1)[1], buffers.mean_loss,
                buffers.gradients.get("scaleout.factor"),
            )  # fmt: skip

    def _backward(self, fork: Fork) -> None:
        """Gradients of the hidden layers' weights, from the last layer to the first.

        What the layer below waits for comes first; beside it, or after it where memory is spared,
        weights get their gradients and are updated, but for those of the first layer.
        """
        buffers = self.buffers
        in_use: dict[int, Any] = {}  # events after which a gradient's buffer is free

        def finish(i: int) -> None:
            own, gradient = buffers.gradient_of(i)
            if buffers.hidden[i].plan.backward == "bits":
                self._update_weights(i, gradient)
            else:
                self._weight_gradient(i, gradient, self._blas_aside)
            if own is not None:
                in_use[own] = fork.mark()
            self._update_layer(i + 1)

        for i in reversed(range(1, len(buffers.hidden))):
            below = buffers.gradient_of(i - 1)[0]
            if below is not None:
                fork.wait(in_use.pop(below, None))
            self._input_gradient(i)
            if self.plan.roomy:
                with fork.aside():
                    finish(i)
            self._activation_gradient(i - 1)
            if not self.plan.roomy:  # shared memory is free again
                finish(i)
        self._weight_gradient(0, buffers.gradient_of(0)[1], self._blas)

    def _input_gradient(self, i: int) -> None:
        """Gradient of what enters the product of hidden layer `i` > 0, counted from 0."""
        hidden, gradient = self.buffers.hidden[i], self.buffers.gradient_of(i)[1]
        arriving = self.buffers.arriving_at(i - 1)
        by_bits = hidden.plan.backward == "bits"
        weight = None if by_bits else self._weight_of(i)
        with self._span(f"gradient of fc{i + 1}'s input"):
            if by_bits:
                sign_gemm.transposed_product(hidden.packed_weight, gradient, arriving, self._device)
            else:
                self._blas.multiply(gradient, weight, arriving, transpose_b=True)

    def _activation_gradient(self, i: int) -> None:
        """Turn the gradient of hidden layer `i`'s activation into that of its product."""
        buffers, hidden = self.buffers, self.buffers.hidden[i]
        with self._span("gradient of activation"):
            self._launcher.gradient(
                hidden.layer, hidden.plan.gate, hidden.mask, buffers.arriving_at(i),
                buffers.gradient_of(i)[1], self._norm_gradients(i + 1),
            )  # fmt: skip

    def _weight_of(self, i: int) -> Any:
        """Return hidden layer `i`'s weights for a dense product, unpacked where they must be."""
        hidden = self.buffers.hidden[i]
        if hidden.weight is not None:
            return hidden.weight
        out = self.buffers.scratch((hidden.plan.inputs, hidden.plan.units))
        with self._span("unpack signs"):
            self._launcher.unpack_columns(hidden.packed_weight, out)
        return out

    def _update_weights(self, i: int, gradient: Any) -> None:
        """Compute the gradient of hidden layer `i`'s weights and update them with it."""
        signs, group = self.buffers.hidden[i - 1].packed, len(self.buffers.hidden) - 1 - i
        with self._span(f"gradient of fc{i + 1}'s weights and their update"):
            self._update.launch_at_once(group, signs, gradient, self.feed.rates, self.feed.step)

    def _weight_gradient(self, i: int, gradient: Any, products: blas.Blas) -> None:
        out = self.buffers.gradients[f"fc{i + 1}.weight"]
        left, scale = self.buffers.inputs, self._input_scale()
        if i:
            before, scale = self.buffers.hidden[i - 1], 1.0
            left = before.dense
            if left is None:
                left = self.buffers.signs
                with self._span("unpack signs"):
                    self._launcher.unpack_rows(before.packed, left)
        with self._span(f"gradient of fc{i + 1}'s weights"):
            products.multiply(left, gradient, out, transpose_a=True, scale=scale)


@contextlib.contextmanager
def _no_span(name: str) -> Iterator[None]:
    yield

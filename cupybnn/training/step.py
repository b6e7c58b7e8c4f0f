"""One training step: the objective, and the reference implementation of an update."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from cupybnn import nn, ops, optim
from cupybnn.autograd import Tensor
from cupybnn.backends.random import bell
from cupybnn.data import BatchOrder, DeviceData
from cupybnn.training.config import TrainConfig
from cupybnn.training.images import DIRECTIONS, TrainingImages, stream_seed
from cupybnn.training.teachers import Teachers

if TYPE_CHECKING:
    from cupybnn.training.team import Team

__all__ = [
    "Objective",
    "PlainStep",
    "Step",
    "StepOutput",
    "make_optimizer",
]


@dataclass(frozen=True)
class StepOutput:
    """What a step computed, on the device.

    Attributes
    ----------
    loss : array of one element
        Loss plus penalty on the batch, before the update.
    logits : array, shape (batch, classes)
        Before the update. Of several ranks, each has those of its images.
    labels : array of int64, shape (batch,)
    """

    loss: Any
    logits: Any
    labels: Any


class Step(Protocol):
    """A callable that performs training step number `step` of a run."""

    def __call__(self, step: int) -> StepOutput: ...

    def stale(self) -> bool:
        """Whether something that the step was built on was replaced, so that it must be rebuilt."""
        ...

    def prepare(self, evaluate: Callable[[], object], mention: Callable[[str], None]) -> None:
        """Get ready for the first call, and for one of `evaluate`.

        `mention` is called with a sentence if this takes long.
        """
        ...


class Objective:
    """What training minimizes: the mean loss of a batch plus ``reg`` times a penalty.

    Parameters
    ----------
    model : Module
        The penalty applies to its weights (the latent ones of binary layers).
    config : TrainConfig
        Its fields `loss`, `label_smoothing`, `reg`, `penalty` and `optimizer`. With ``reg = 0``
        there is no penalty, and with "l2" or "bop" none on binary weights.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.config = config
        self._penalty = {"l1": ops.l1, "l2": ops.l2, "bipolar": ops.bipolar_penalty}[config.penalty]
        kind = nn.BinaryLinear if config.penalty == "bipolar" else nn.Linear
        weights = [m.weight for _, m in model.named_modules() if isinstance(m, kind)]
        # The network does not depend on the squares of latent weights.
        real_only = config.penalty == "l2" or config.optimizer == "bop"
        self._weights = [w for w in weights if w.bits > 1 or not real_only]

    @property
    def penalty_kind(self) -> str:
        """The kind of penalty: "none", "l1", "l2" or "bipolar"."""
        return "none" if self.config.reg == 0 else self.config.penalty

    def penalty_factor(self, parameter: nn.Parameter) -> float:
        """Return the factor of a parameter's penalty; 0 if it has none."""
        return self.config.reg if any(parameter is weight for weight in self._weights) else 0.0

    def loss(self, logits: Tensor, labels: Any) -> Tensor:
        """Return the mean loss of a batch, without the penalty.

        `labels` are class numbers, shape (batch,), or probabilities, shape (batch, classes).
        """
        if self.config.loss == "squared_hinge":
            return ops.squared_hinge(logits, labels)
        return ops.softmax_cross_entropy(logits, labels, self.config.label_smoothing)

    def penalty(self) -> Tensor | None:
        """Return ``reg`` times the penalty, or None if there is none.

        A weight that is shared out among ranks is left out: see `penalty_of_share`.
        """
        weights = [weight for weight in self._weights if weight.share is None]
        if self.config.reg == 0 or not weights:
            return None
        total = self._penalty(weights[0])
        for weight in weights[1:]:
            total = total + self._penalty(weight)
        return total * self.config.reg

    def penalty_of_share(self, parameter: nn.Parameter, elements: Tensor) -> Tensor | None:
        """Return the penalty on some elements of a weight; None if there is none."""
        if not self.penalty_factor(parameter) or not elements.size:
            return None
        return self._penalty(elements) * self.config.reg

    def __call__(self, logits: Tensor, labels: Any) -> Tensor:
        """Return loss plus penalty."""
        loss, penalty = self.loss(logits, labels), self.penalty()
        return loss if penalty is None else loss + penalty


def make_optimizer(model: nn.Module, config: TrainConfig) -> optim.Optimizer:
    """Return the optimizer that `config` describes, with its schedule."""
    schedule = _schedule(config)
    common: dict[str, Any] = {"lr": config.lr, "schedule": schedule}
    if config.optimizer == "bop":
        binary, real = optim.parameter_groups(model, (optim.is_binary, {}))
        bop = optim.Bop([binary], config.bop_rate, config.bop_threshold, schedule=schedule)
        return optim.Combined(bop, optim.Adam([real], **common))
    if config.lr_scale != "none" or config.latent_lr != 1:
        common["lr_scale"] = _latent_scale(config)
    parameters = list(model.parameters())
    if config.optimizer == "sgd":
        return optim.SGD(parameters, momentum=config.momentum, **common)
    if config.optimizer == "adamw":
        return optim.AdamW(parameters, weight_decay=config.weight_decay, **common)
    return optim.Adam(parameters, **common)


def _schedule(config: TrainConfig) -> optim.schedules.Schedule:
    schedule = optim.schedules.constant()
    falling = max(config.max_steps - config.warm_up, 1)
    if config.schedule == "cosine":
        schedule = optim.schedules.cosine(falling, config.final_lr)
    elif config.schedule == "exponential":
        schedule = optim.schedules.exponential(falling, config.final_lr)
    elif config.schedule == "step":
        # A schedule after a warm-up counts from its end; milestones count from the first step.
        boundaries = [milestone - config.warm_up for milestone in config.milestones]
        schedule = optim.schedules.step(boundaries, config.milestone_factor)
    if config.warm_up:
        schedule = optim.schedules.warm_up(config.warm_up, schedule)
    return schedule


def _latent_scale(config: TrainConfig) -> Callable[[nn.Parameter], float]:
    """Return the factor of a parameter's learning rate."""

    def scale(parameter: nn.Parameter) -> float:
        factor = config.latent_lr if parameter.bits == 1 else 1.0
        return factor * (optim.binarynet_scale(parameter) if config.lr_scale != "none" else 1.0)

    return scale


class PlainStep:
    """The step as the autograd engine computes it, operation by operation.

    It defines the result that every faster step must reproduce.

    Parameters
    ----------
    model : Module
    objective : Objective
    optimizer : Optimizer
    data : DeviceData
    order : BatchOrder
    config : TrainConfig
        Its fields `adversarial`, `vat`, `vat_xi`, `seed` and `max_steps`, and those of
        `TrainingImages`.
    teachers : Teachers, optional
        Whose predictions are learned instead of the labels.
    team : Team, optional
        The ranks that perform the step together, each with a part of the batch.

    Notes
    -----
    Teachers see the images as `TrainingImages` returns them. An attack moves them next, and virtual
    adversarial training starts from there.

    The extra passes of virtual adversarial training drop the same units as the first. Batch norm
    normalizes each pass by the statistics of its own batch, and its running statistics are those of
    the first pass alone, as in the code of Miyato et al.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimizer: optim.Optimizer,
        data: DeviceData,
        order: BatchOrder,
        config: TrainConfig,
        teachers: Teachers | None = None,
        team: Team | None = None,
    ) -> None:
        self._model = model
        self._objective = objective
        self._optimizer = optimizer
        self._team = team
        self._data = data
        self._max_steps = max(config.max_steps, 1)
        self._adversarial = config.adversarial
        self._images = TrainingImages(data, order, config, None if team is None else team.rows)
        self._teachers = teachers
        self._vat = {"distance": config.vat, "xi": config.vat_xi} if config.vat else None
        self._vat_seed = stream_seed(config, DIRECTIONS)

    def __call__(self, step: int) -> StepOutput:
        """Perform step number `step`: images, attack, forward, backward, update."""
        team = self._team
        with contextlib.nullcontext() if team is None else team.part():
            inputs, labels, targets = self._images(step)
            if self._teachers is not None:
                targets = self._teachers.targets(inputs)
            self._model.train()
            nn.set_progress(self._model, min(step / self._max_steps, 1.0))
            if self._adversarial:
                inputs = self._attacked(inputs, targets)
            divergence = None
            if self._vat is None:
                logits = self._model(Tensor(inputs))
            else:
                logits, divergence = self._virtual(inputs, step)
            self._optimizer.zero_grad()  # of what the search for directions left
            loss = self._objective(logits, targets)
            if divergence is not None:
                loss = loss + divergence
            if team is None:
                loss.backward()
                self._optimizer.step()
                value = loss.data
            else:
                value = team.learn(loss)
        return StepOutput(value, logits.data, labels)

    def _virtual(self, inputs: Any, step: int) -> tuple[Tensor, Tensor]:
        """Return the logits, and how far predictions change where inputs move most adversely."""
        assert self._vat is not None
        with _repeated_draws(self._model):
            logits = self._model(Tensor(inputs))
        probabilities = ops.softmax(logits.detach()).data
        start = bell(inputs.shape, self._vat_seed, step, self._data.device.xp)
        start = start.astype(inputs.dtype)
        with _kept_statistics(self._model):
            with _repeated_draws(self._model):
                weight = 1.0 if self._team is None else self._team.share_of_batch
                move = ops.virtual_adversarial(
                    self._model, inputs, probabilities, start, **self._vat, weight=weight
                )
            moved = self._model(Tensor(inputs + move))
        return logits, ops.softmax_divergence(moved, probabilities)

    def stale(self) -> bool:
        """Never: each step reads the model and the optimizer as they are."""
        return False

    def prepare(self, evaluate: Callable[[], object], mention: Callable[[str], None]) -> None:
        """Do nothing: operations are compiled when they are first needed."""

    def _attacked(self, inputs: Any, labels: Any) -> Any:
        """Move each input by `adversarial` in the direction that increases the loss.

        The fast gradient sign method of Goodfellow et al. (see `TrainConfig`). Inputs with zero
        gradient do not move. Batch norm's running statistics include both batches.
        """
        x = Tensor(inputs, requires_grad=True)
        with _repeated_draws(self._model):
            loss = self._objective.loss(self._model(x), labels)
            # With other ranks' images in the statistics of batch norm, their losses count, too.
            loss.backward(None if self._team is None else self._team.weight_of(loss))
        direction = self._data.device.xp.sign(x.grad)
        return inputs + direction * self._data.dtype.type(self._adversarial)


@contextlib.contextmanager
def _repeated_draws(model: nn.Module) -> Iterator[None]:
    """At the end of the context, rewind the random states to its beginning.

    So the network that is attacked is the one that learns: the same units are dropped.
    """
    states = [state for _, m in model.named_modules() if (state := m.random_state()) is not None]
    before = [state.copy() for state in states]
    try:
        yield
    finally:
        for state, old in zip(states, before, strict=True):
            state[...] = old


@contextlib.contextmanager
def _kept_statistics(model: nn.Module) -> Iterator[None]:
    """At the end of the context, put back batch norm's running statistics of its beginning."""
    before = [(array, array.copy()) for _, array in model.named_buffers()]
    try:
        yield
    finally:
        for array, old in before:
            array[...] = old

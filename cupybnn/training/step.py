"""One training step: what is minimised, and the plain way to make it smaller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from cupybnn import nn, ops
from cupybnn.autograd import Tensor
from cupybnn.data import BatchOrder, DeviceData
from cupybnn.optim import Optimizer

__all__ = ["Objective", "PlainStep", "Step", "StepOutput"]


@dataclass(frozen=True)
class StepOutput:
    """What a step computed, on the device.

    Attributes
    ----------
    loss : array of one element
        Loss and penalty of the batch, before the update.
    logits : array, shape (batch, classes)
        Before the update.
    labels : array of int64, shape (batch,)
    """

    loss: Any
    logits: Any
    labels: Any


class Step(Protocol):
    """Something that makes training step number `step` of a run."""

    def __call__(self, step: int) -> StepOutput: ...


class Objective:
    """What training minimises: the mean softmax cross-entropy and ``reg`` times the L1 penalty.

    Parameters
    ----------
    model : Module
        The penalty is the sum of the magnitudes of the weights (latent ones where they are
        binary) of its linear layers.
    reg : float
        At 0 no penalty is computed.
    """

    def __init__(self, model: nn.Module, reg: float) -> None:
        self.reg = reg
        self._weights = [
            module.weight
            for _, module in model.named_modules()
            if isinstance(module, (nn.Linear, nn.BinaryLinear))
        ]

    def loss(self, logits: Tensor, labels: Any) -> Tensor:
        """Mean cross-entropy of a batch, without the penalty."""
        return ops.softmax_cross_entropy(logits, labels)

    def penalty(self) -> Tensor | None:
        """``reg * sum |W|``, or None where `reg` is 0."""
        if self.reg == 0:
            return None
        total = ops.l1(self._weights[0])
        for weight in self._weights[1:]:
            total = total + ops.l1(weight)
        return total * self.reg

    def __call__(self, logits: Tensor, labels: Any) -> Tensor:
        """Loss and penalty."""
        loss, penalty = self.loss(logits, labels), self.penalty()
        return loss if penalty is None else loss + penalty


class PlainStep:
    """The step as the autograd engine does it, operation by operation.

    Every faster step must give what this one gives.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimizer: Optimizer,
        data: DeviceData,
        order: BatchOrder,
    ) -> None:
        self._model = model
        self._objective = objective
        self._optimizer = optimizer
        self._data = data
        self._order = order

    def __call__(self, step: int) -> StepOutput:
        """Make step number `step`: gather its batch, forward, backward, update."""
        inputs, labels = self._data.batch(self._order.indices(step))
        self._model.train()
        self._optimizer.zero_grad()
        logits = self._model(Tensor(inputs))
        loss = self._objective(logits, labels)
        loss.backward()
        self._optimizer.step()
        return StepOutput(loss.data, logits.data, labels)

"""Detecting changes between fused steps: replaced layers and arrays, and edited weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter, is_
from typing import Any

from cupybnn import nn, optim
from cupybnn.training.fast.hidden import HiddenBuffers

__all__ = ["Edits", "Wiring"]


class Wiring:
    """The objects and values that a step was built on, whose memory it uses directly.

    Parameters
    ----------
    model : Module
    optimizer : Optimizer
    """

    def __init__(self, model: nn.Module, optimizer: optim.Optimizer) -> None:
        # One getter reads all attributes of an object, because this is done before each step.
        self._getters = [(owner, attrgetter(*names)) for owner, names in _attributes(model)]
        self._values = self._now()
        # Detects modules that are added or removed: they are attributes.
        modules = [m for _, m in model.named_modules()]
        self._chains = [vars(m) for m in modules if isinstance(m, nn.Sequential)]
        self._sizes = [*map(_size, self._chains)]
        self._optimizer = optimizer
        self._learned = list(model.parameters())
        self._slots = [optimizer._slots_of(p) for p in self._learned]
        self._groups = optimizer.groups
        self._parameters = list(optimizer.groups[0]["params"])

    def _now(self) -> list[Any]:
        values: list[Any] = []
        for owner, get in self._getters:
            values += get(owner)
        return values

    def changed(self) -> bool:
        """Whether any of them has been replaced."""
        slots = map(self._optimizer._slots.get, self._learned)
        return (
            not all(map(is_, self._now(), self._values))
            or [*map(_size, self._chains)] != self._sizes
            or not all(map(is_, slots, self._slots))
            or self._optimizer.groups is not self._groups
            or len(self._groups) != 1
            or len(self._groups[0]["params"]) != len(self._parameters)
        )


def _size(attributes: dict[str, Any]) -> int:
    """Return the number of attributes but for the mode, which is one once it has been set."""
    return len(attributes) - ("training" in attributes)


def _attributes(model: nn.Module) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Yield (owner, names of at least two attributes) for everything that a step is built on."""
    for _, module in model.named_modules():
        # A dropout's random stream is tracked by its counter, and the mode does not matter.
        names = vars(module).keys() - {"training", "random"}
        yield module, ("__class__", *names, "__class__")
    for parameter in model.parameters():
        yield parameter, ("_data", "requires_grad", "limit")


class Edits:
    """Edits, after the last step, of weights of which kernels read a copy.

    Parameters
    ----------
    hidden : sequence of HiddenBuffers
    """

    def __init__(self, hidden: Sequence[HiddenBuffers]) -> None:
        self._copies = [h for h in hidden if h.copied or h.packed_weight is not None]
        self._versions: list[int] = []
        self.mark_current()

    def mark_current(self) -> None:
        """Record that the copies match the current weights."""
        self._versions = [h.plan.linear.weight._storage.watch() for h in self._copies]

    def refresh_copies(self) -> None:
        """Refresh the copies of weights that have been edited since."""
        for hidden, version in zip(self._copies, self._versions, strict=True):
            if hidden.plan.linear.weight._storage.version() != version:
                hidden.refresh()

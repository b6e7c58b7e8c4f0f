"""The update of a model's parameters, as the kernels make it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cupybnn import nn, optim
from cupybnn.backends.cuda.fused import Launcher
from cupybnn.backends.cuda.fused_update import Update, Updated
from cupybnn.training.fast.buffers import Buffers
from cupybnn.training.fast.layers import latent_gate
from cupybnn.training.fast.plan import NetworkPlan
from cupybnn.training.step import Objective

__all__ = ["UpdateOptions", "plan_update"]


@dataclass(frozen=True)
class UpdateOptions:
    """Options of an optimiser that are built into the launches of an update.

    Its learning rate, eps and schedule are not: `Feed` writes them for each step.

    Attributes
    ----------
    betas : tuple of float
    weight_decay : float
    lr_scales : tuple of float
        One for each of the parameters.
    """

    betas: tuple[float, float]
    weight_decay: float
    lr_scales: tuple[float, ...]

    @classmethod
    def of(cls, optimizer: optim.Adam, parameters: Sequence[nn.Parameter]) -> UpdateOptions:
        """Return the options as they are now."""
        group = optimizer.groups[0]
        scale = group["lr_scale"]
        scales = [scale(p) for p in parameters] if callable(scale) else [scale] * len(parameters)
        return cls(tuple(group["betas"]), group.get("weight_decay", 0.0), tuple(scales))


def plan_update(
    plan: NetworkPlan,
    buffers: Buffers,
    objective: Objective,
    optimizer: optim.Adam,
    parameters: Sequence[nn.Parameter],
    options: UpdateOptions,
    launcher: Launcher,
    recorded: bool,
) -> Update:
    """Return the update, in groups in the order in which layers get their gradients.

    The last hidden layer comes first, with the head; then one layer after the other.

    Parameters
    ----------
    plan, buffers, objective, optimizer, launcher
        Those of the step.
    parameters : sequence of Parameter
        In the order of ``options.lr_scales``.
    options : UpdateOptions
    recorded : bool
        Whether gradients are kept, with the penalty's part in them.
    """
    lr_scales = dict(zip(parameters, options.lr_scales, strict=True))

    def updated(parameter: nn.Parameter, gate: str = "none", **copies: Any) -> Updated:
        mean, square = optimizer._slots_of(parameter)
        return Updated(
            parameter._data,
            buffers.gradients[parameter],
            mean,
            square,
            left=buffers.kept_grads[parameter],
            binary=parameter.bits == 1,
            gate=gate,
            limit=parameter.limit,
            lr_scale=lr_scales[parameter],
            penalty=objective.penalty_factor(parameter),
            weight_decay=options.weight_decay,
            **copies,
        )

    def all_of(norm: nn.BatchNorm | None) -> list[Updated]:
        return [] if norm is None else [updated(norm.gamma), updated(norm.beta)]

    groups = []
    for layer, hidden in reversed(list(zip(plan.hidden, buffers.hidden, strict=True))):
        copy = hidden.weight if hidden.copied else None
        linear = layer.linear
        weight = updated(linear.weight, latent_gate(linear), copy=copy, packed=hidden.packed_weight)
        groups.append([weight, *all_of(layer.norm)])
    head = plan.head
    groups[0] += [updated(head.linear.weight, latent_gate(head.linear)), *all_of(head.norm)]
    if head.scale is not None:
        groups[0].append(updated(head.scale.factor))
    return Update(launcher, groups, options.betas, objective.penalty_kind, recorded)

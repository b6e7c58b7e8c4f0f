"""The update of a model's parameters by the fused kernels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cupybnn import nn, optim
from cupybnn.backends.cuda.fused import Launcher
from cupybnn.backends.cuda.fused_update import ParameterUpdate, Update
from cupybnn.training.fast.buffers import Buffers
from cupybnn.training.fast.feed import Feed
from cupybnn.training.fast.layers import latent_gate
from cupybnn.training.fast.plan import NetworkPlan
from cupybnn.training.step import Objective

__all__ = ["UpdateOptions", "plan_update"]


@dataclass(frozen=True)
class UpdateOptions:
    """Options of an optimizer that are built into the launches of an update.

    Learning rate, eps and schedule are not: `Feed` writes their values for each step.

    Attributes
    ----------
    betas : tuple of float
    weight_decay : float
    lr_scales : tuple of float
        One for each parameter.
    """

    betas: tuple[float, float]
    weight_decay: float
    lr_scales: tuple[float, ...]

    @classmethod
    def of(cls, optimizer: optim.Adam, parameters: Sequence[nn.Parameter]) -> UpdateOptions:
        """Return the current options."""
        group = optimizer.groups[0]
        scale = group["lr_scale"]
        scales = [scale(p) for p in parameters] if callable(scale) else [scale] * len(parameters)
        return cls(tuple(group["betas"]), group.get("weight_decay", 0.0), tuple(scales))


def plan_update(
    plan: NetworkPlan,
    buffers: Buffers,
    feed: Feed,
    objective: Objective,
    optimizer: optim.Adam,
    parameters: Sequence[nn.Parameter],
    options: UpdateOptions,
    launcher: Launcher,
    recorded: bool,
) -> Update:
    """Return the update, with one group per hidden layer in the order of the backward pass.

    The first group is the last hidden layer's, together with the head's. The last one is that of
    the first two layers if `NetworkPlan.updates_together`. With other ranks, the groups are
    those of `Exchange.groups`, this rank's shares of weights, and all that is not shared out.

    Parameters
    ----------
    plan, buffers, feed, objective, optimizer, launcher
        Those of the step.
    parameters : sequence of Parameter
        In the order of ``options.lr_scales``.
    options : UpdateOptions
    recorded : bool
        Whether to keep the gradients, including the penalty's part.
    """
    import cupy

    lr_scales = dict(zip(parameters, options.lr_scales, strict=True))
    exchange = buffers.exchange
    shared = {} if exchange is None else exchange.shared
    shares: dict[nn.Parameter, ParameterUpdate] = {}

    def update_of(parameter: nn.Parameter, gate: str = "none", **copies: Any) -> ParameterUpdate:
        weight, (mean, square) = parameter._data, optimizer._slots_of(parameter)
        if exchange is not None and parameter in shared:
            assert parameter.share is not None
            arrays = (parameter.share.weight, mean, square)
            weight, mean, square = (exchange.share_of(parameter, array) for array in arrays)
            copies = {"sent": exchange.words_of(parameter)}
            if exchange.reads(parameter):
                copies["distances"] = exchange.distances
        update = ParameterUpdate(
            weight=weight,
            grad=buffers.sums[parameter],
            mean=mean,
            square=square,
            kept_grad=buffers.kept_grads[parameter],
            binary=parameter.bits == 1,
            gate=gate,
            limit=parameter.limit,
            lr_scale=lr_scales[parameter],
            penalty=objective.penalty_factor(parameter),
            weight_decay=options.weight_decay,
            **copies,
        )
        if parameter in shared:
            shares[parameter] = update
        return update

    def norm_updates(norm: nn.BatchNorm | None) -> list[ParameterUpdate]:
        return [] if norm is None else [update_of(norm.gamma), update_of(norm.beta)]

    by_layer = []
    for layer, hidden in reversed(list(zip(plan.hidden, buffers.hidden, strict=True))):
        copy = hidden.weight if hidden.copied else None
        linear = layer.linear
        copies = {"copy": copy, "packed": hidden.packed_weight}
        weight = update_of(linear.weight, latent_gate(linear), **copies)
        by_layer.append([weight, *norm_updates(layer.norm)])
    if plan.updates_together:
        first = by_layer.pop()
        by_layer[-1] += first
    head = plan.head
    weight = update_of(head.linear.weight, latent_gate(head.linear))
    by_layer[0] += [weight, *norm_updates(head.norm)]
    if head.scale is not None:
        by_layer[0].append(update_of(head.scale.factor))
    groups, counted, mean_loss = by_layer, None, buffers.total_of(buffers.mean_loss)
    if exchange is not None:
        everything = list(itertools.chain.from_iterable(by_layer))
        groups = [[shares[parameter] for parameter in some] for some in exchange.groups]
        groups.append([u for u in everything if u.sent is None])
        if exchange.ranks.rank and objective.penalty_kind != "none":
            # Rank 0 alone counts what all ranks have, because the losses will be summed.
            counted, mean_loss = len(groups) - 1, cupy.zeros_like(mean_loss)
    return Update(
        launcher,
        groups,
        betas=options.betas,
        penalty=objective.penalty_kind,
        keep_gradients=recorded,
        rates=feed.rates,
        step=feed.step,
        mean_loss=mean_loss,
        loss=buffers.loss,
        counted=counted,
    )

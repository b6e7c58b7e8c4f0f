"""Divide parameters into groups with their own options."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from cupybnn.nn import Module, Parameter

__all__ = ["binarynet_scale", "is_binary", "parameter_groups"]

Predicate = Callable[[str, Parameter], bool]


def parameter_groups(
    model: Module, *rules: tuple[Predicate, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Divide the parameters of a model into groups for an optimizer.

    Parameters
    ----------
    model : Module
        The model.
    *rules : (predicate, options)
        A parameter goes to the first rule for which ``predicate(name, parameter)`` is true; if
        there is none, to a last group without options.

    Returns
    -------
    list of dict
        Groups with "params" and their options; empty groups are left out.

    Examples
    --------
    >>> from cupybnn import nn, optim
    >>> model = nn.Sequential(nn.Linear(4, 3, bias=True, rng=0), nn.BatchNorm(3))
    >>> groups = optim.parameter_groups(
    ...     model, (lambda name, p: name.endswith("weight"), {"weight_decay": 0.1})
    ... )
    >>> [len(group["params"]) for group in groups]
    [1, 3]
    >>> optimizer = optim.AdamW(groups, lr=1e-3, weight_decay=0.0)
    """
    groups = [{"params": [], **options} for _, options in rules] + [{"params": []}]
    for name, parameter in model.named_parameters():
        matching = (i for i, (predicate, _) in enumerate(rules) if predicate(name, parameter))
        groups[next(matching, -1)]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def is_binary(name: str, parameter: Parameter) -> bool:
    """Predicate for the latent weights of binary layers.

    Examples
    --------
    >>> from cupybnn import nn, optim
    >>> model = nn.Sequential(nn.BinaryLinear(8, 4), nn.BatchNorm(4))
    >>> [name for name, p in model.named_parameters() if optim.is_binary(name, p)]
    ['0.weight']
    """
    return parameter.bits == 1


def binarynet_scale(parameter: Parameter) -> float:
    """Return BinaryNet's learning-rate factor, ``sqrt((inputs + outputs) / 1.5)``.

    Pass it as an optimizer's `lr_scale`. It applies to latent weights, whose initial values shrink
    with the size of the layer (Glorot's rule); for other parameters it is 1.

    Notes
    -----
    Courbariaux et al.: Binarized neural networks, NeurIPS 2016, and its code.

    Examples
    --------
    >>> from cupybnn import nn, optim
    >>> round(optim.binarynet_scale(nn.BinaryLinear(784, 512).weight), 2)
    29.39
    >>> optim.binarynet_scale(nn.Linear(784, 512).weight)
    1.0
    """
    return math.sqrt(sum(parameter.shape) / 1.5) if parameter.bits == 1 else 1.0

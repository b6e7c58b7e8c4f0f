"""Whether the fused step supports a model and the settings of a run."""

from __future__ import annotations

from collections.abc import Iterator

from cupybnn import nn, optim
from cupybnn.backends.cuda.blas import PRECISIONS
from cupybnn.training.config import TrainConfig
from cupybnn.training.declaration import declared
from cupybnn.training.fast.layers import Unsupported
from cupybnn.training.fast.plan import NetworkPlan
from cupybnn.training.fast.teaching import plan_layers
from cupybnn.training.teachers import Teachers

__all__ = ["unsupported_reason"]


def unsupported_reason(
    config: TrainConfig,
    model: nn.Module,
    optimizer: optim.Optimizer,
    capability: int,
    teachers: Teachers | None = None,
) -> str | None:
    """Return why the fused step cannot train `model`, to end a sentence; None if it can."""
    for reason in _unsupported_settings(config, optimizer, capability):
        return reason
    learned = {id(p) for group in optimizer.groups for p in group["params"]}
    if learned != {id(p) for p in model.parameters()}:
        return "the optimizer must have exactly the parameters of the model"
    try:
        NetworkPlan.of(model, config)
        for network in () if teachers is None else teachers.networks:
            plan_layers(network.to("cpu").layers)
    except Unsupported as reason:
        return str(reason)
    return None


def _unsupported_settings(
    config: TrainConfig, optimizer: optim.Optimizer, capability: int
) -> Iterator[str]:
    """Yield reasons against the fused step other than the model, each to end a sentence.

    Parameters
    ----------
    config : TrainConfig
    optimizer : Optimizer
    capability : int
        Compute capability of the device: 90 for 9.0.
    """
    if config.dtype not in PRECISIONS:
        yield f"{config.dtype} is not supported"
    elif capability < PRECISIONS[config.dtype]:
        least = PRECISIONS[config.dtype]
        yield (
            f"{config.dtype} needs compute capability {least // 10}.{least % 10}, and this device "
            f"has {capability // 10}.{capability % 10}"
        )
    if type(optimizer) not in (optim.Adam, optim.AdamW):
        yield f"the optimizer {type(optimizer).__name__} is not supported"
    elif len(optimizer.groups) != 1:
        yield "the optimizer has more than one group of parameters"
    for name, setting in declared(type(config)).items():
        if not setting.fused and getattr(config, name) != setting.default:
            yield f"the setting {name!r} is not supported"
    if config.penalty == "l2" and config.reg != 0:
        yield "the penalty 'l2' is not supported"
    if config.debug:
        yield "--debug checks every operation"

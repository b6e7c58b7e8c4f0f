"""Whether the fused step can train a model with the settings of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from cupybnn import nn, optim
from cupybnn.backends.cuda.blas import PRECISIONS
from cupybnn.training.config import TrainConfig
from cupybnn.training.fast.layers import Unsupported
from cupybnn.training.fast.plan import NetworkPlan

__all__ = ["unsupported_reason"]

#: Settings that the fused step follows, that the model was built from, or that others act on.
_KNOWN = (
    "data_dir dataset log_dir n_hidden reg lr batch_size max_steps eval_every_n binary xnor "
    "batch_norm debug keep_prob first last restore device seed ste dtype validation hidden_layers "
    "input_keep_prob loss label_smoothing penalty optimizer momentum weight_decay lr_scale "
    "schedule final_lr warm_up fused graph latent_lr bop_rate bop_threshold milestones "
    "milestone_factor average average_decay average_from "
    "augment_shift augment_rotation augment_scale augment_shear adversarial sign_keep_prob"
)


def unsupported_reason(
    config: TrainConfig, model: nn.Module, optimizer: optim.Optimizer, capability: int
) -> str | None:
    """Return why the fused step cannot train this, as the end of a sentence; None if it can."""
    for reason in _unsupported_settings(config, optimizer, capability):
        return reason
    learned = {id(p) for group in optimizer.groups for p in group["params"]}
    if learned != {id(p) for p in model.parameters()}:
        return "the optimiser must have the parameters of the model, all of them"
    try:
        NetworkPlan.of(model, config)
    except Unsupported as reason:
        return str(reason)
    return None


def _unsupported_settings(
    config: TrainConfig, optimizer: optim.Optimizer, capability: int
) -> Iterator[str]:
    """Yield what of a run, the model aside, the fused step cannot do, as the end of a sentence.

    Parameters
    ----------
    config : TrainConfig
    optimizer : Optimizer
    capability : int
        Compute capability of the device, 90 for 9.0.
    """
    if config.dtype not in PRECISIONS:
        yield f"it has no {config.dtype}"
    elif capability < PRECISIONS[config.dtype]:
        least = PRECISIONS[config.dtype]
        yield (
            f"{config.dtype} needs compute capability {least // 10}.{least % 10}, and this device "
            f"has {capability // 10}.{capability % 10}"
        )
    if type(optimizer) not in (optim.Adam, optim.AdamW):
        yield f"it does not know the optimiser {type(optimizer).__name__}"
    elif len(optimizer.groups) != 1:
        yield "it takes one group of parameters"
    # A list of what it knows: a setting that is new is refused until someone thinks of it here.
    for setting in fields(config):
        value = getattr(config, setting.name)
        if setting.name not in _KNOWN.split() and value != setting.default:
            yield f"it does not know the setting {setting.name!r}"
    if config.debug:
        yield "--debug looks at every operation"

"""Latent weights kept within [-1, 1], where the usual pseudo-gradients let them learn."""

from __future__ import annotations

from typing import Any

import torch

from cupybnn.torch.modules import XnorLinear

__all__ = ["clip_after_step", "clip_weights"]


def clip_weights(model: torch.nn.Module) -> None:
    """Limit the latent weights of all `XnorLinear` with ``clip=True`` in `model` to [-1, 1].

    Call it after each ``optimizer.step()``, or let `clip_after_step` do so.

    Parameters
    ----------
    model : torch.nn.Module
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, XnorLinear) and module.clip:
                module.weight.clamp_(-1.0, 1.0)


def clip_after_step(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> Any:
    """Call `clip_weights` after each step of an optimizer.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    model : torch.nn.Module

    Returns
    -------
    torch.utils.hooks.RemovableHandle
        Its method ``remove()`` ends the clipping.

    Examples
    --------
    >>> import torch
    >>> from cupybnn.torch import XnorLinear, clip_after_step
    >>> layer = XnorLinear(8, 4)
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=100.0)
    >>> handle = clip_after_step(optimizer, layer)
    >>> layer(torch.ones(2, 8)).sum().backward()
    >>> optimizer.step()
    >>> float(layer.weight.detach().abs().max())
    1.0
    """
    return optimizer.register_step_post_hook(lambda *_: clip_weights(model))

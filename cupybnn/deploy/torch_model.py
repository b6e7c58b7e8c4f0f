"""From a model of PyTorch to our own chain of layers, which the packed network is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cupybnn import nn
from cupybnn.backends.interop import type_name

__all__ = ["model_from_torch"]


def model_from_torch(model: Any) -> nn.Module:
    """Return a chain of our layers that does what a model of PyTorch does in evaluation mode.

    Parameters
    ----------
    model : torch.nn.Sequential
        May be nested. A module with a method ``cupybnn_layers()``, such as
        `cupybnn.torch.XnorLinear`, names its own layers.

    Returns
    -------
    Module
        On the CPU, in evaluation mode. Layers have the names that they have in `model`.

    Raises
    ------
    TypeError
        If `model` is not a `torch.nn.Sequential`.
    ValueError
        If a layer has no counterpart; the message names it and says why.
    """
    import torch

    if not isinstance(model, torch.nn.Sequential):
        raise TypeError(
            f"The 'model' of from_torch must be a torch.nn.Sequential of layers; got "
            f"{type_name(model)}. Put the layers that its forward pass applies into one: "
            f"torch.nn.Sequential(model.fc1, model.norm1, ...)."
        )
    chain = nn.Sequential()
    are_signs = False  # whether the result so far holds +1 and -1 alone
    for name, module in _leaves(torch, model, ""):
        _check(torch, name, module)
        for layer in _layers(torch, name, module):
            sign = isinstance(layer, nn.Sign)
            if sign and not any(isinstance(before, nn.Linear) for before in chain):
                raise _cannot(
                    name,
                    module,
                    "takes the signs of the network's inputs, but a packed network takes numbers: "
                    "begin with Linear or XnorLinear(..., binary_input=False)",
                )
            if not (sign and are_signs):
                # A sign that belongs to the layer after it goes under a name of its own.
                own = sign and hasattr(module, "weight")
                setattr(chain, f"{name}_sign" if own else name, layer)
            if not isinstance(layer, (nn.Identity, nn.Flatten, nn.Dropout)):
                are_signs = sign
    return chain.eval()


def _leaves(torch: Any, model: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield (name, module) for the modules that a `Sequential` applies, nested ones flattened."""
    _check(torch, prefix or "the model", model)
    for name, module in model.named_children():
        if type(module).forward is torch.nn.Sequential.forward:
            yield from _leaves(torch, module, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", module


def _check(torch: Any, name: str, module: Any) -> None:
    """Raise ValueError if a module does more than its class says, or in another precision."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    if hooks:
        raise _cannot(name, module, "has forward hooks, which may change what it computes")
    for what, tensor in (*module.named_parameters(recurse=False), *module._buffers.items()):
        if what != "progress" and tensor is not None and tensor.is_floating_point():
            if tensor.dtype != torch.float32:
                raise _cannot(
                    name, module, f"holds {what} in {tensor.dtype}, not float32: use model.float()"
                )
            if tensor.is_meta:
                raise _cannot(name, module, f"holds {what} without values (device meta)")


def _cannot(name: str, module: Any, why: str) -> ValueError:
    return ValueError(
        f"Each layer of from_torch must have a counterpart in a packed network; got {name}, "
        f"a {type(module).__name__}, which {why}."
    )


def _layers(torch: Any, name: str, module: Any) -> list[nn.Module]:
    """Return our layers for one module."""
    own = getattr(module, "cupybnn_layers", None)
    if callable(own):
        return list(own())
    t = torch.nn
    makers = {
        t.Linear: _linear,
        t.BatchNorm1d: _batch_norm,
        t.ReLU: lambda *_: nn.ReLU(),
        t.Identity: lambda *_: nn.Identity(),
        t.Flatten: _flatten,
    }
    for kind in (t.Dropout, t.Dropout1d, t.AlphaDropout, t.FeatureAlphaDropout):
        makers[kind] = lambda *_: nn.Identity()
    for kind, make in makers.items():
        if type(module).forward is kind.forward:
            return [make(name, module)]
    raise _cannot(
        name,
        module,
        "is none of Linear, BatchNorm1d, ReLU, Flatten, Dropout, Identity, XnorLinear and SignSTE",
    )


def _linear(name: str, module: Any) -> nn.Module:
    layer = nn.Linear(module.in_features, module.out_features, module.bias is not None, rng=0)
    layer.weight.write()[...] = _host(module.weight).T
    if layer.bias is not None:
        layer.bias.write()[...] = _host(module.bias)
    return layer


def _batch_norm(name: str, module: Any) -> nn.Module:
    if module.running_mean is None:
        raise _cannot(
            name, module, "has no running statistics, so that results depend on the whole batch"
        )
    if not module.eps > 0:
        raise _cannot(name, module, f"has eps={module.eps}, which must be positive")
    layer = nn.BatchNorm(module.num_features, eps=module.eps)
    if module.weight is not None:
        layer.gamma.write()[...] = _host(module.weight)
        layer.beta.write()[...] = _host(module.bias)
    layer.mean[...] = _host(module.running_mean)
    layer.variance[...] = _host(module.running_var)
    return layer


def _flatten(name: str, module: Any) -> nn.Module:
    if (module.start_dim, module.end_dim) != (1, -1):
        raise _cannot(
            name,
            module,
            f"merges axes {module.start_dim} to {module.end_dim}, not all but the first",
        )
    return nn.Flatten()


def _host(tensor: Any) -> np.ndarray:
    array: np.ndarray = tensor.detach().cpu().numpy()
    return array

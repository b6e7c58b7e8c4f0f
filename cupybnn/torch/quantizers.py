"""The quantizers of `cupybnn.ops` for tensors, named by strings that a compiled graph can hold."""

from __future__ import annotations

import copy
from typing import Any

from cupybnn.ops import Quantizer, StochasticSign, get_quantizer, quantizer_names

__all__ = ["is_plus", "is_random", "key_of", "pseudo_gradient", "restore", "scale"]

#: An operator's argument cannot be a quantizer. Its key describes all of it, so that a graph that
#: PyTorch caches on disk means the same in another process.
_KNOWN: dict[str, Quantizer] = {name: get_quantizer(name) for name in quantizer_names()}
_STATE = ("progress", "random")  # attributes that are passed to an operator, or not used here


def key_of(ste: str | Quantizer) -> str:
    """Return the key of a quantizer.

    Parameters
    ----------
    ste : str or Quantizer
        A quantizer is known by its class and its settings of now; later changes have no effect.

    Raises
    ------
    TypeError
        If the quantizer computes signs in a way of its own, which only arrays support.
    ValueError
        If there is no quantizer of that name.
    """
    if isinstance(ste, str) and ste in _KNOWN:
        return ste
    quantizer = get_quantizer(ste)
    kind = type(quantizer)
    if kind.forward not in (Quantizer.forward, StochasticSign.forward):
        raise TypeError(
            f"A quantizer for PyTorch must have the forward pass of Quantizer, sign(x); got "
            f"{kind.__name__}, which has its own. Override pseudo_gradient and scale only."
        )
    if isinstance(ste, str):
        key = ste
    else:
        settings = {k: v for k, v in sorted(vars(quantizer).items()) if k not in _STATE}
        key = f"{kind.__module__}.{kind.__qualname__}({settings})"
    if key not in _KNOWN:
        _KNOWN[key] = copy.copy(quantizer)
    return key


def restore(key: str, quantizer: Quantizer) -> None:
    """Make the quantizer of a key from another process known to this one."""
    _KNOWN.setdefault(key, quantizer)


def is_random(key: str) -> bool:
    """Whether signs are random in training."""
    return isinstance(_KNOWN[key], StochasticSign)


def is_plus(key: str, x: Any, draws: Any) -> Any:
    """Return where a sign is +1, given random numbers in [0, 1) or None."""
    if draws is None:
        return x >= 0
    quantizer = _KNOWN[key]
    assert isinstance(quantizer, StochasticSign)
    return quantizer.is_plus(x, draws)


def pseudo_gradient(key: str, x: Any, grad: Any, progress: Any) -> Any:
    """Return the gradient of `x` from that of its signs, in the dtype of `x`.

    Parameters
    ----------
    key : str
    x, grad : torch.Tensor, of one shape
    progress : torch.Tensor of shape (), or None
        Training progress; None: that of the quantizer when its key was made.
    """
    quantizer = _KNOWN[key]
    if progress is not None:
        quantizer = copy.copy(quantizer)
        quantizer.progress = progress
    return quantizer.pseudo_gradient(x, grad.to(x.dtype))


def scale(key: str, weight: Any) -> Any | None:
    """Return a factor for each row of `weight`, shape (out_features, in_features), or None."""
    return _KNOWN[key].scale(weight.T)

"""Signs and products of signs of tensors, with straight-through gradients."""

from __future__ import annotations

from typing import Any

import torch

from cupybnn.ops import Quantizer
from cupybnn.torch import calls, operators, quantizers

__all__ = ["check_features", "drawn_signs", "result_dtype", "sign_ste", "xnor_linear"]


def sign_ste(
    x: torch.Tensor, ste: str | Quantizer = "ste_sign", *, training: bool = True
) -> torch.Tensor:
    """Return +1 where x >= 0 and -1 elsewhere, with a pseudo-gradient.

    Both zeros give +1 and NaN gives -1, as in `cupybnn.sign`.

    Parameters
    ----------
    x : torch.Tensor
        Of floating dtype, any shape, on any device.
    ste : str or Quantizer
        The pseudo-gradient, used instead of the derivative, which is 0; see `cupybnn.ops.sign`.
        "stochastic_sign" draws from PyTorch's generator.
    training : bool
        Whether a stochastic quantizer draws random signs.

    Returns
    -------
    torch.Tensor
        Of the shape and dtype of `x`, contiguous.

    Raises
    ------
    TypeError
        If `x` is not of floating dtype, or the quantizer has a forward pass of its own.
    ValueError
        If there is no quantizer of that name.
    RuntimeError
        When the gradient is differentiated again.

    Examples
    --------
    >>> import torch
    >>> from cupybnn.torch import sign_ste
    >>> x = torch.tensor([-2.0, -0.5, 0.0, 1.5], requires_grad=True)
    >>> y = sign_ste(x)
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([-1.0, -1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0])
    """
    _check_floating(x, "'x' of sign_ste")
    return drawn_signs(x, quantizers.key_of(ste), training, None)


def xnor_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ste: str | Quantizer = "ste_sign",
    input_ste: str | Quantizer = "ste_sign",
) -> torch.Tensor:
    """Return ``sign(x) @ sign(weight).T + bias``, the product computed exactly from bits.

    The function behind `XnorLinear`, without scale and random signs.

    Parameters
    ----------
    x : torch.Tensor, shape (..., in_features)
    weight : torch.Tensor, shape (out_features, in_features)
        On the device of `x`; the dtypes may differ.
    bias : torch.Tensor, shape (out_features,), optional
    ste, input_ste : str or Quantizer
        Pseudo-gradients of `weight` and of `x`; see `sign_ste`.

    Returns
    -------
    torch.Tensor, shape (..., out_features)
        Of the dtype of `x`, or that of autocast.

    Raises
    ------
    TypeError
        If a tensor is not of floating dtype.
    ValueError
        If the shapes do not fit, or the devices differ.

    Examples
    --------
    >>> import torch
    >>> from cupybnn.torch import xnor_linear
    >>> xnor_linear(torch.tensor([[0.5, -2.0, 0.0]]), torch.tensor([[1.0, 1.0, -1.0]]))
    tensor([[-1.]])
    """
    if weight.dim() != 2:
        raise ValueError(
            f"The 'weight' of xnor_linear must have shape (out_features, in_features); got "
            f"{tuple(weight.shape)}."
        )
    _check_floating(weight, "'weight' of xnor_linear")
    check_features(x, weight.shape[1], "xnor_linear")
    if x.device != weight.device:
        raise ValueError(
            f"The 'x' and 'weight' of xnor_linear must be on one device; got {x.device} and "
            f"{weight.device}."
        )
    y = calls.xnor_linear(
        x, weight, result_dtype(x), quantizers.key_of(input_ste), quantizers.key_of(ste), None
    )
    return y if bias is None else y + bias.to(y.dtype)


def drawn_signs(x: torch.Tensor, key: str, training: bool, progress: Any) -> torch.Tensor:
    """Return the signs of `x` by the quantizer of a key, random ones in training."""
    draws = torch.rand_like(x) if training and quantizers.is_random(key) else None
    return operators.sign_ste(x, draws, key, progress)


def result_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype of a layer's result: that of its input, or that of autocast."""
    device = x.device.type
    if device == "meta":  # shapes alone, without autocast
        return x.dtype
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def check_features(x: torch.Tensor, features: int, layer: str) -> None:
    """Raise unless `x` is of floating dtype and its last axis has `features` elements."""
    _check_floating(x, f"input of {layer}")
    if x.dim() == 0 or x.shape[-1] != features:
        raise ValueError(
            f"The input of {layer} must have shape (..., {features}); got {tuple(x.shape)}."
        )


def _check_floating(x: torch.Tensor, what: str) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(
            f"The {what} must be a torch.Tensor; got {type(x).__name__}. Make it one: "
            f"torch.as_tensor(x)."
        )
    if not x.dtype.is_floating_point:
        raise TypeError(
            f"The {what} must be of floating dtype; got {x.dtype}. For 0 and 1 pass 2 * x - 1, as "
            f"floating numbers."
        )

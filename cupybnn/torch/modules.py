"""Layers of binary weights and activations for PyTorch."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.nn import functional

from cupybnn import nn
from cupybnn.ops import Quantizer, get_quantizer
from cupybnn.torch import calls, operators, quantizers
from cupybnn.torch.functional import check_features, drawn_signs, result_dtype

__all__ = ["SignSTE", "XnorLinear", "set_progress"]


class SignSTE(torch.nn.Module):
    """Signs of the input, with a pseudo-gradient; see `sign_ste`.

    Parameters
    ----------
    ste : str or Quantizer
        The pseudo-gradient.

    Examples
    --------
    >>> import torch
    >>> from cupybnn.torch import SignSTE
    >>> SignSTE("approx_sign")(torch.tensor([-0.5, 0.0, 2.0]))
    tensor([-1.,  1.,  1.])
    """

    def __init__(self, ste: str | Quantizer = "ste_sign") -> None:
        super().__init__()
        self._key = quantizers.key_of(ste)
        self.quantizer = get_quantizer(ste)
        _add_progress(self, self.quantizer)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _restore_keys(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return +1 and -1 of the shape and dtype of `x`."""
        return drawn_signs(x, self._key, self.training, self.progress)

    def extra_repr(self) -> str:
        """Describe the quantizer."""
        return repr(self.quantizer)

    def cupybnn_layers(self) -> list[nn.Module]:
        """Return the layers of `cupybnn.nn` that do the same, for `PackedNetwork.from_torch`."""
        return [nn.Sign(self.quantizer)]


class XnorLinear(torch.nn.Module):
    """``y = sign(x) @ sign(weight).T + bias``: a product with the signs of latent weights.

    A replacement of `torch.nn.Linear` for binarized networks. The result is exact, and bit for bit
    that of the dense product ``linear(sign(x), sign(weight))`` with sums in float32: the integer,
    rounded to the dtype. The gradients are the dense products of the same signs, times the
    pseudo-gradients.

    Parameters
    ----------
    in_features, out_features : int
        Sizes of the last axes of x and y.
    bias : bool
        Whether there is a full-precision bias; it starts at 0.
    binary_input : bool
        Whether to take the signs of x. If not, x may hold any numbers, and the product is a dense
        one with the signs of the weights: for a first layer.
    xnor : bool
        Whether to compute a product of signs from bits, or as a dense product: for comparisons, and
        for exporters that do not know the operator.
    ste : str or Quantizer
        Pseudo-gradient for the latent weights, and their scale if it has one; see
        `cupybnn.ops.sign`.
    input_ste : str or Quantizer
        Pseudo-gradient for x. The default does not change the gradient of an x that holds signs
        already, so that a `SignSTE` with another pseudo-gradient may stand before this layer.
    clip : bool
        Whether `clip_weights` and `clip_after_step` keep the latent weights within [-1, 1].
        PyTorch's optimizers do not do so by themselves.
    device, dtype
        Of the parameters, as in `torch.nn.Linear`.

    Attributes
    ----------
    weight : torch.nn.Parameter, shape (out_features, in_features)
        The latent weights, initially Glorot-uniform.
    bias : torch.nn.Parameter, shape (out_features,), or None
    quantizer, input_quantizer : Quantizer
        Those named by `ste` and `input_ste`.

    Warns
    -----
    UserWarning
        If latent weights can leave the quantizer's window, where they get no gradient and stop
        learning.

    Notes
    -----
    Inputs have shape (..., in_features), results (..., out_features), of the dtype of x or that of
    autocast. float16 holds integers up to 2048, bfloat16 up to 256; larger ones are rounded.

    Examples
    --------
    >>> import torch
    >>> from cupybnn.torch import XnorLinear, clip_after_step
    >>> model = torch.nn.Sequential(
    ...     XnorLinear(8, 16, binary_input=False), torch.nn.BatchNorm1d(16), XnorLinear(16, 2)
    ... )
    >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    >>> handle = clip_after_step(optimizer, model)
    >>> loss = model(torch.randn(4, 8)).square().mean()
    >>> loss.backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        binary_input: bool = True,
        xnor: bool = True,
        ste: str | Quantizer = "ste_sign",
        input_ste: str | Quantizer = "ste_sign",
        clip: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.binary_input = binary_input
        self.xnor = xnor
        self.clip = clip
        self._key, self._input_key = quantizers.key_of(ste), quantizers.key_of(input_ste)
        self.quantizer, self.input_quantizer = get_quantizer(ste), get_quantizer(input_ste)
        _warn_of_window(self.quantizer, clip)
        where = {"device": device, "dtype": dtype}
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, **where))
        if bias:
            self.bias = torch.nn.Parameter(torch.empty(out_features, **where))
        else:
            self.register_parameter("bias", None)
        _add_progress(self, self.quantizer, device)
        self._scaled = type(self.quantizer).scale is not Quantizer.scale
        self._random = quantizers.is_random(self._key) or quantizers.is_random(self._input_key)
        self.reset_parameters()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _restore_keys(self)

    def reset_parameters(self) -> None:
        """Draw new weights, and set the bias to 0."""
        if self.weight.numel():
            torch.nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product, shape (..., out_features), of an x of shape (..., in_features)."""
        check_features(x, self.in_features, f"XnorLinear({self.in_features}, {self.out_features})")
        y = self._product(x)
        scale = self.scale()
        if scale is not None:
            y = y * scale.to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def scale(self) -> torch.Tensor | None:
        """Return the factors of the results, constants by the quantizer of `ste`, or None."""
        return operators.weight_scale(self.weight.detach(), self._key) if self._scaled else None

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        weight, keys, dtype = self.weight, (self._input_key, self._key), result_dtype(x)
        if self.binary_input and self.xnor and not (self._random and self.training):
            # Only the gradient depends on it, and looking it up takes a microsecond.
            progress = self.progress if torch.is_grad_enabled() else None
            return calls.xnor_linear(x, weight, dtype, *keys, progress)
        if self.binary_input:
            x = drawn_signs(x, self._input_key, self.training, self.progress)
        signs = drawn_signs(weight, self._key, self.training, self.progress)
        if self.binary_input and self.xnor:
            return calls.xnor_linear(x, signs, dtype, "identity", "identity", None)
        return functional.linear(x, signs.to(x.dtype)).to(dtype)

    def extra_repr(self) -> str:
        """Describe the layer."""
        kind = "binary" if self.binary_input else "real"
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {kind} input, "
            f"{self.quantizer!r}"
        )

    def cupybnn_layers(self) -> list[nn.Module]:
        """Return the layers of `cupybnn.nn` that do the same, for `PackedNetwork.from_torch`."""
        layer = nn.BinaryLinear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            binary_input=self.binary_input,
            ste=self.quantizer,
            rng=0,
        )
        layer.weight.write()[...] = self.weight.detach().cpu().numpy().T
        if layer.bias is not None:
            layer.bias.write()[...] = self.bias.detach().cpu().numpy()
        return [nn.Sign(self.input_quantizer), layer] if self.binary_input else [layer]


def set_progress(model: torch.nn.Module, progress: float) -> None:
    """Set the training progress, from 0 to 1, of all quantizers in `model`.

    Call it before each step if a quantizer changes during training ("ede_sign"). The number is kept
    on the device: compiled models and CUDA graphs see the change.

    Parameters
    ----------
    model : torch.nn.Module
    progress : float
    """
    for module in model.modules():
        if isinstance(module, (SignSTE, XnorLinear)):
            module.progress.fill_(progress)


def _add_progress(module: Any, quantizer: Quantizer, device: Any = None) -> None:
    value = torch.full((), quantizer.progress, dtype=torch.float32, device=device)
    module.register_buffer("progress", value, persistent=False)


def _restore_keys(module: Any) -> None:
    """Make the quantizers of a module from another process known to this one."""
    for key, quantizer in (("_key", "quantizer"), ("_input_key", "input_quantizer")):
        if key in vars(module):
            quantizers.restore(vars(module)[key], vars(module)[quantizer])


def _warn_of_window(quantizer: Quantizer, clip: bool) -> None:
    window = quantizer.window
    if window is not None and not (clip and window >= 1.0):
        warnings.warn(
            f"The latent weights of an XnorLinear can leave the window |w| <= {window:g} of "
            f"{quantizer!r}, and those that do stop learning. "
            + ("Use a window of at least 1." if clip else "Clip them: clip=True."),
            stacklevel=3,
        )

"""Linear layers whose weights are bits, for inference."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from cupybnn import backends
from cupybnn.backends.devices import Device
from cupybnn.packed import pack
from cupybnn.torch import calls
from cupybnn.torch.functional import check_features, result_dtype
from cupybnn.torch.modules import XnorLinear

__all__ = ["PackedLinear", "pack_linear"]


class PackedLinear(torch.nn.Module):
    """``y = (sign(x) @ signs.T) * scale + bias``, with one bit for each sign; inference only.

    Made by `pack_linear`. To read a saved state, make one of the same sizes and call
    ``load_state_dict``. Its results are those of the `XnorLinear` that it was made of.

    Parameters
    ----------
    in_features, out_features : int
        Sizes of the last axes of x and y.
    bias, scale : bool
        Whether there is a bias, and a scale.
    device
        Of the buffers.
    dtype : torch.dtype, optional
        Of bias and scale.

    Attributes
    ----------
    words : torch.Tensor of uint32, shape (out_features, 2 * ceil(in_features / 64))
        The signs, 1 for +1, in rows of whole 64-bit words; the first sign is the lowest bit of the
        first word. The same on every device, and what the state dict holds.
    bias, scale : torch.Tensor, shape (out_features,), or None

    Examples
    --------
    >>> import torch
    >>> from cupybnn.torch import XnorLinear, pack_linear
    >>> layer = XnorLinear(100, 30)
    >>> packed = pack_linear(layer)
    >>> x = torch.randn(5, 100)
    >>> torch.equal(packed(x), layer(x)), packed.words.shape
    (True, torch.Size([30, 4]))
    """

    words: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        scale: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        shape = (out_features, 2 * -(-in_features // 64))
        self.register_buffer("words", torch.zeros(shape, dtype=torch.uint32, device=device))
        for name, wanted, value in (("scale", scale, torch.ones), ("bias", bias, torch.zeros)):
            values = value(out_features, device=device, dtype=dtype) if wanted else None
            self.register_buffer(name, values)
        self._prepare()

    def _prepare(self) -> None:
        """Derive from the words what the product on their device needs."""
        words, device = self.words, self.words.device
        layout = torch.empty(0, dtype=torch.int32, device=device)
        popcounts = torch.empty(self.out_features, dtype=torch.int32, device=device)
        if device.type in ("cpu", "cuda"):
            lines = words.cpu().numpy().view("<u8")
            popcounts = _tensor(np.bitwise_count(lines).sum(1, dtype=np.int32), device)
        if device.type == "cuda":
            layout = self._kernel_layout(lines, device)
        self.register_buffer("_layout", layout, persistent=False)
        self.register_buffer("_popcounts", popcounts, persistent=False)

    def _kernel_layout(self, lines: np.ndarray, device: Any) -> torch.Tensor:
        from cupybnn.torch import cuda

        with cuda.scope(device.index):
            backend = backends.get(Device("cuda", device.index))
            words = backend.from_canonical(lines, (self.in_features, self.out_features), -2)
            # A copy, so that the memory is PyTorch's, and graphs may keep it.
            return torch.from_dlpack(words).view(torch.int32).clone()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = self.words.device
        super()._apply(fn, recurse)
        if self.words.device != before:
            self._prepare()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._prepare()

    def __getstate__(self) -> dict[str, Any]:
        buffers = {k: v for k, v in self._buffers.items() if k not in ("_layout", "_popcounts")}
        # PyTorch cannot read pickled uint32 back, except from torch.save.
        buffers["words"] = self.words.view(torch.int32)
        return {**self.__dict__, "_buffers": buffers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.words = self.words.view(torch.uint32)
        self._prepare()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product, shape (..., out_features), of an x of shape (..., in_features)."""
        check_features(
            x, self.in_features, f"PackedLinear({self.in_features}, {self.out_features})"
        )
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "The input of a PackedLinear must not require gradients, because the layer is for "
                "inference and has none; got requires_grad=True. Use torch.no_grad(), or the "
                "XnorLinear that it was made of."
            )
        words = self._layout if self.words.is_cuda else self.words
        y = calls.packed_linear(x, words, self._popcounts, result_dtype(x))
        if self.scale is not None:
            y = y * self.scale.to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Describe the layer."""
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"scale={self.scale is not None}"
        )


def pack_linear(module: torch.nn.Module) -> torch.nn.Module:
    """Return a module for inference whose binary weights are stored with one bit per element.

    Parameters
    ----------
    module : torch.nn.Module
        An `XnorLinear`; or any module that holds some. It does not change.

    Returns
    -------
    torch.nn.Module
        A `PackedLinear` for an `XnorLinear`. For another module a copy, in evaluation mode, in
        which each `XnorLinear` with binary input is a `PackedLinear` and no parameter requires
        gradients; it shares no memory with the original.

    Raises
    ------
    ValueError
        If there is nothing to pack: no `XnorLinear`, or one that takes real inputs.

    Examples
    --------
    >>> import torch
    >>> from cupybnn.torch import XnorLinear, pack_linear
    >>> model = torch.nn.Sequential(XnorLinear(64, 32), torch.nn.BatchNorm1d(32)).eval()
    >>> x = torch.randn(3, 64)
    >>> with torch.no_grad():
    ...     torch.equal(pack_linear(model)(x), model(x))
    True
    """
    if isinstance(module, XnorLinear):
        return _packed(module)
    if not any(_is_packable(m) for m in module.modules()):
        raise ValueError(
            f"The 'module' of pack_linear must be, or hold, an XnorLinear with binary input; got "
            f"{type(module).__name__}."
        )
    # The memo replaces each layer wherever the module refers to it.
    memo = {id(m): _packed(m) for m in module.modules() if _is_packable(m)}
    return copy.deepcopy(module, memo).eval().requires_grad_(False)


def _is_packable(module: torch.nn.Module) -> bool:
    return isinstance(module, XnorLinear) and module.binary_input


@torch.no_grad()
def _packed(layer: XnorLinear) -> PackedLinear:
    if not layer.binary_input:
        raise ValueError(
            "The 'module' of pack_linear must be an XnorLinear with binary input; got one with "
            "binary_input=False, whose product with real inputs is not one of bits."
        )
    weight, scale, bias = layer.weight, layer.scale(), layer.bias
    packed = PackedLinear(
        layer.in_features, layer.out_features, bias=bias is not None, scale=scale is not None,
        device=weight.device, dtype=weight.dtype,
    )  # fmt: skip
    rows = pack((weight >= 0).cpu().numpy())
    packed.words.copy_(torch.from_numpy(rows.words.view("<u4")))
    for target, source in ((packed.scale, scale), (packed.bias, bias)):
        if target is not None and source is not None:
            target.copy_(source)
    packed._prepare()
    return packed.eval()


def _tensor(array: np.ndarray, device: Any) -> torch.Tensor:
    return torch.from_numpy(array).to(device)

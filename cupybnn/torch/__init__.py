"""Binary layers for PyTorch: exact 1-bit products, straight-through gradients, packed inference.

`XnorLinear` trains with PyTorch's own optimizers, `pack_linear` stores its weights with one bit per
element, and `cupybnn.PackedNetwork.from_torch` packs a whole network. The products are operators of
PyTorch: they work with autocast, `torch.compile` and CUDA graphs, on the current stream.

Needs PyTorch 2.6 or newer (the extra ``torch``), and CuPy for tensors on a GPU.
"""

from cupybnn.extras import to_install as _to_install

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError(
        f"cupybnn.torch needs PyTorch 2.6 or newer, which is not installed. Install it as "
        f"https://pytorch.org/get-started describes, or: {_to_install('torch')}.",
        name="torch",
    ) from error

from cupybnn.torch.clipping import clip_after_step, clip_weights
from cupybnn.torch.functional import sign_ste, xnor_linear
from cupybnn.torch.modules import SignSTE, XnorLinear, set_progress
from cupybnn.torch.packed_linear import PackedLinear, pack_linear

__all__ = [
    "PackedLinear",
    "SignSTE",
    "XnorLinear",
    "clip_after_step",
    "clip_weights",
    "pack_linear",
    "set_progress",
    "sign_ste",
    "xnor_linear",
]

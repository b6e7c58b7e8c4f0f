"""The operators ``torch.ops.cupybnn.*``: shapes, gradients, and what computes them on each device.

PyTorch's compiler sees an operator as one node of its graph. The forward products are ours; the
backward passes are dense products of PyTorch, so that its compiler can fuse what stands around
them.
"""

from __future__ import annotations

from typing import Any

import torch

from cupybnn import backends
from cupybnn.backends.devices import CPU
from cupybnn.packed import PackedMatrix
from cupybnn.torch import quantizers

__all__ = [
    "KERNELS",
    "as_rows",
    "packed_linear",
    "product_backward",
    "save_product",
    "sign_ste",
    "weight_scale",
    "xnor_linear",
]

_LIBRARY = torch.library.Library("cupybnn", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
#: Dtypes that NumPy has, too.
_NUMPY = {torch.float32, torch.float64, torch.float16}

for _schema in (
    "sign_ste(Tensor x, Tensor? draws, str ste, Tensor? progress) -> Tensor",
    "xnor_linear(Tensor x, Tensor weight, ScalarType dtype, str input_ste, str ste, "
    "Tensor? progress) -> Tensor",
    "packed_linear(Tensor x, Tensor words, Tensor popcounts, ScalarType dtype) -> Tensor",
    "weight_scale(Tensor weight, str ste) -> Tensor",
):
    _LIBRARY.define(_schema, tags=_TAGS)

sign_ste = torch.ops.cupybnn.sign_ste.default
xnor_linear = torch.ops.cupybnn.xnor_linear.default
packed_linear = torch.ops.cupybnn.packed_linear.default
weight_scale = torch.ops.cupybnn.weight_scale.default


# Shapes and dtypes -----------------------------------------------------------------------------


def _fake_product(x: Any, outputs: Any, dtype: Any) -> Any:
    return x.new_empty((*x.shape[:-1], outputs), dtype=dtype)


@torch.library.register_fake("cupybnn::sign_ste", lib=_LIBRARY)
def _(x: Any, draws: Any, ste: str, progress: Any) -> Any:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("cupybnn::xnor_linear", lib=_LIBRARY)
def _(x: Any, weight: Any, dtype: Any, input_ste: str, ste: str, progress: Any) -> Any:
    return _fake_product(x, weight.shape[0], dtype)


@torch.library.register_fake("cupybnn::packed_linear", lib=_LIBRARY)
def _(x: Any, words: Any, popcounts: Any, dtype: Any) -> Any:
    return _fake_product(x, popcounts.shape[0], dtype)


@torch.library.register_fake("cupybnn::weight_scale", lib=_LIBRARY)
def _(weight: Any, ste: str) -> Any:
    return weight.new_empty(weight.shape[:1])


# Forward passes --------------------------------------------------------------------------------


def _as_signs(plus: Any, dtype: Any) -> Any:
    """Return +1 where `plus` and -1 elsewhere."""
    one = torch.ones((), dtype=dtype, device=plus.device)
    return torch.where(plus, one, -one)


def _sign_forward(x: Any, draws: Any, ste: str, progress: Any) -> Any:
    return _as_signs(quantizers.is_plus(ste, x, draws), x.dtype).contiguous()


def _scale_forward(weight: Any, ste: str) -> Any:
    factors = quantizers.scale(ste, weight)
    return weight.new_ones(weight.shape[:1]) if factors is None else factors.clone()


def as_rows(x: Any) -> Any:
    """Return a tensor as a matrix of its last axis; that may be empty, which ``-1`` cannot take."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def _as_numpy(x: Any) -> Any:
    """Return a tensor in host memory as a NumPy array with the same signs."""
    return (x if x.dtype in _NUMPY else x.float()).detach().numpy()


def _product_on_cpu(x: Any, right: Any, outputs: int, dtype: Any) -> Any:
    """Return the product of the signs of the rows of `x` with `right`, as NumPy's backend has it.

    Parameters
    ----------
    x : torch.Tensor, shape (..., in_features)
    right : ndarray or PackedMatrix, shape (in_features, outputs)
    outputs : int
    dtype : torch.dtype
        bfloat16 is rounded from float32, which holds the integers.
    """
    y = torch.empty((*x.shape[:-1], outputs), dtype=dtype if dtype in _NUMPY else torch.float32)
    if y.numel():
        backends.get(CPU).gemm(_as_numpy(as_rows(x)), right, as_rows(y).numpy(), None)
    return y.to(dtype)


def _xnor_cpu(x: Any, weight: Any, dtype: Any, input_ste: str, ste: str, progress: Any) -> Any:
    return _product_on_cpu(x, _as_numpy(weight).T, weight.shape[0], dtype)


def _packed_cpu(x: Any, words: Any, popcounts: Any, dtype: Any) -> Any:
    outputs, shape = popcounts.shape[0], (x.shape[-1], popcounts.shape[0])
    lines = words.numpy().view("<u8")
    right = PackedMatrix._of(lines, popcounts.numpy(), shape, -2, CPU)
    return _product_on_cpu(x, right, outputs, dtype)


def _xnor_cuda(x: Any, weight: Any, dtype: Any, input_ste: str, ste: str, progress: Any) -> Any:
    from cupybnn.torch import cuda

    return cuda.product(x, weight, dtype)


def _packed_cuda(x: Any, words: Any, popcounts: Any, dtype: Any) -> Any:
    from cupybnn.torch import cuda

    return cuda.packed_product(x, words, popcounts, dtype)


#: What computes `xnor_linear` and `packed_linear` on each kind of device.
KERNELS = {"cpu": (_xnor_cpu, _packed_cpu), "cuda": (_xnor_cuda, _packed_cuda)}

_LIBRARY.impl("sign_ste", _sign_forward, "CompositeExplicitAutograd")
_LIBRARY.impl("weight_scale", _scale_forward, "CompositeExplicitAutograd")
for _device, _kernels in KERNELS.items():
    for _name, _kernel in zip(("xnor_linear", "packed_linear"), _kernels, strict=True):
        _LIBRARY.impl(_name, _kernel, _device.upper())


# Backward passes -------------------------------------------------------------------------------


class _Once(torch.autograd.Function):
    """Return a gradient; a second differentiation, through it, is an error."""

    @staticmethod
    def forward(ctx: Any, result: Any, *sources: Any) -> Any:
        ctx.count = len(sources)
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        raise RuntimeError(
            "A straight-through gradient cannot be differentiated again, because it stands in for "
            "a derivative that is 0 almost everywhere; got a second backward pass through a layer "
            "of cupybnn.torch. Leave binary layers out of a gradient penalty, or use "
            "create_graph=False."
        )


def _once(result: Any, *sources: Any) -> Any:
    # Grad mode is on in a backward pass only with create_graph=True.
    return _Once.apply(result, *sources) if torch.is_grad_enabled() else result


def _save_sign(ctx: Any, inputs: Any, output: Any) -> None:
    x, _, ctx.ste, progress = inputs
    ctx.save_for_backward(x, progress)


def _sign_backward(ctx: Any, grad: Any) -> Any:
    x, progress = ctx.saved_tensors
    with torch.no_grad():
        result = quantizers.pseudo_gradient(ctx.ste, x, grad, progress)
    return _once(result, grad, x), None, None, None


def save_product(ctx: Any, inputs: Any, output: Any) -> None:
    """Save what the backward pass of `xnor_linear` needs, given its inputs."""
    x, weight, _, ctx.input_ste, ctx.ste, progress = inputs
    ctx.save_for_backward(x, weight, progress)


def product_backward(ctx: Any, grad: Any) -> Any:
    """Return the gradients of the inputs of `xnor_linear`."""
    x, weight, progress = ctx.saved_tensors
    grad_x = grad_weight = None
    with torch.no_grad():
        if ctx.needs_input_grad[0]:
            signs = _as_signs(weight >= 0, grad.dtype)
            grad_x = quantizers.pseudo_gradient(ctx.input_ste, x, grad @ signs, progress)
        if ctx.needs_input_grad[1]:
            signs = _as_signs(as_rows(x) >= 0, grad.dtype)
            product = as_rows(grad).T @ signs
            grad_weight = quantizers.pseudo_gradient(ctx.ste, weight, product, progress)
    if grad_x is not None:
        grad_x = _once(grad_x, grad, x, weight)
    if grad_weight is not None:
        grad_weight = _once(grad_weight, grad, x, weight)
    return grad_x, grad_weight, None, None, None, None


torch.library.register_autograd(
    "cupybnn::sign_ste", _sign_backward, setup_context=_save_sign, lib=_LIBRARY
)
torch.library.register_autograd(
    "cupybnn::xnor_linear", product_backward, setup_context=save_product, lib=_LIBRARY
)

"""Calls of the operators that pass by PyTorch's dispatcher where it has nothing to do.

From Python it takes longer than a small product, and longer still to record a gradient. It has
something to do for tensors of other kinds (subclasses, fake, sparse, batched by vmap, lazily
negated) and while a mode, a transformation, a tracer or a profiler watches. PyTorch has no public
way to ask; what is used here of its private interface is looked up once, and without it all calls
are dispatched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from cupybnn.torch import operators

__all__ = ["are_plain", "packed_linear", "xnor_linear"]


class _XnorLinear(torch.autograd.Function):
    """The operator and its gradients."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        operators.save_product(ctx, inputs, None)
        return operators.KERNELS[inputs[0].device.type][0](*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return operators.product_backward(ctx, grad)


def xnor_linear(x: Any, weight: Any, *arguments: Any) -> Any:
    """Call the operator ``cupybnn::xnor_linear``."""
    if torch.compiler.is_compiling() or not are_plain(x, weight):
        return operators.xnor_linear(x, weight, *arguments)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _XnorLinear.apply(x, weight, *arguments)
    return operators.KERNELS[x.device.type][0](x, weight, *arguments)


def packed_linear(x: Any, words: Any, popcounts: Any, dtype: Any) -> Any:
    """Call the operator ``cupybnn::packed_linear``."""
    if torch.compiler.is_compiling() or not are_plain(x, words):
        return operators.packed_linear(x, words, popcounts, dtype)
    return operators.KERNELS[x.device.type][1](x, words, popcounts, dtype)


def _bits(keys: Any) -> int:
    return int(keys.raw_repr())


try:
    _keys_of, _included = torch._C._dispatch_keys, torch._C._dispatch_tls_local_include_set
    _function_modes = torch._C._len_torch_function_stack
    _is_profiled = torch._C._autograd._profiler_enabled
    _example = torch.empty(0)
    _PLAIN = {_bits(_keys_of(_example))}
    with torch.inference_mode():
        _PLAIN.add(_bits(_keys_of(torch.empty(0))))
    # Keys that a thread may add to those of tensors without any effect on an operator of ours.
    _HARMLESS = _bits(_included())
    for _name in ("ADInplaceOrView", "AutocastCPU", "AutocastCUDA"):
        _key = getattr(torch._C.DispatchKey, _name)
        _HARMLESS |= _bits(torch._C.DispatchKeySet(_key))
    _known = True
except (AttributeError, TypeError, RuntimeError):
    _known = False


def are_plain(x: Any, y: Any) -> bool:
    """Whether an operator on two tensors may be computed without the dispatcher."""
    if not _known or (type(x) is not torch.Tensor) or x.device != y.device:
        return False
    keys = _bits(_keys_of(x))
    if keys not in _PLAIN and not _is_plain_on_gpu(x, keys):
        return False
    other = _bits(_keys_of(y))
    return (
        (other == keys or other in _PLAIN)
        and not _bits(_included()) & ~_HARMLESS
        and not _function_modes()
        and not _is_profiled()
        and forward_ad._current_level < 0
    )


def _is_plain_on_gpu(x: Any, keys: int) -> bool:
    """Whether the keys are those of any tensor of this kind on its GPU; once for each kind."""
    if not x.is_cuda:
        return False
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            _PLAIN.add(_bits(_keys_of(torch.empty(0, device=x.device))))
    return keys in _PLAIN

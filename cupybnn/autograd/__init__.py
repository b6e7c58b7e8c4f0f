"""Reverse-mode differentiation of NumPy and CuPy programs."""

from cupybnn.autograd import debug
from cupybnn.autograd.context import Context
from cupybnn.autograd.function import Function
from cupybnn.autograd.gradcheck import gradcheck
from cupybnn.autograd.state import is_grad_enabled, no_grad
from cupybnn.autograd.tensor import Tensor, tensor_or_number
from cupybnn.errors import GraphError, NonFiniteError

__all__ = [
    "Context",
    "Function",
    "GraphError",
    "NonFiniteError",
    "Tensor",
    "debug",
    "gradcheck",
    "is_grad_enabled",
    "no_grad",
    "tensor_or_number",
]

"""Differentiable operations on tensors: each a `Function` with forward and backward together."""

from cupybnn.ops.dropout import dropout, sign_dropout
from cupybnn.ops.elementwise import (
    absolute,
    add,
    clip,
    divide,
    exp,
    log,
    multiply,
    negative,
    power,
    relu,
    sqrt,
    subtract,
    tanh,
)
from cupybnn.ops.losses import bipolar_penalty, l1, softmax_cross_entropy, squared_hinge
from cupybnn.ops.matmul import binary_matmul, matmul
from cupybnn.ops.norm import batch_norm
from cupybnn.ops.quantizer import (
    Quantizer,
    get_quantizer,
    quantizer_names,
    register_quantizer,
)
from cupybnn.ops.quantizers import (
    ApproxSign,
    ClippedGrad,
    EdeSign,
    IdentitySign,
    MagnitudeAwareSign,
    SteSign,
    StochasticSign,
    SwishSign,
)
from cupybnn.ops.reduce import max, mean, min, sum
from cupybnn.ops.shape import index, reshape, to, transpose
from cupybnn.ops.sign import quantize, sign

__all__ = [
    "ApproxSign",
    "ClippedGrad",
    "EdeSign",
    "IdentitySign",
    "MagnitudeAwareSign",
    "Quantizer",
    "SteSign",
    "StochasticSign",
    "SwishSign",
    "absolute",
    "add",
    "batch_norm",
    "binary_matmul",
    "bipolar_penalty",
    "clip",
    "divide",
    "dropout",
    "exp",
    "get_quantizer",
    "index",
    "l1",
    "log",
    "matmul",
    "max",
    "mean",
    "min",
    "multiply",
    "negative",
    "power",
    "quantize",
    "quantizer_names",
    "register_quantizer",
    "relu",
    "reshape",
    "sign",
    "sign_dropout",
    "softmax_cross_entropy",
    "sqrt",
    "squared_hinge",
    "subtract",
    "sum",
    "tanh",
    "to",
    "transpose",
]

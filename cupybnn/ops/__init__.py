"""Differentiable operations on tensors: each a `Function` with forward and backward together."""

from cupybnn.ops.cast import astype
from cupybnn.ops.compare import (
    argmax,
    argmin,
    equal,
    greater,
    greater_equal,
    less,
    less_equal,
    not_equal,
)
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
from cupybnn.ops.gradient_levels import GradientLevels, GradientQuantizer, quantize_gradient
from cupybnn.ops.joining import concatenate, stack
from cupybnn.ops.losses import (
    mse,
    softmax_cross_entropy,
    softmax_divergence,
    squared_hinge,
)
from cupybnn.ops.matmul import binary_matmul, matmul
from cupybnn.ops.norm import batch_norm
from cupybnn.ops.penalties import bipolar_penalty, l1, l2
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
from cupybnn.ops.select import maximum, minimum, where
from cupybnn.ops.shape import index, reshape, to, transpose
from cupybnn.ops.sign import quantize, sign
from cupybnn.ops.softmax import log_softmax, sigmoid, softmax
from cupybnn.ops.virtual import of_length, virtual_adversarial

__all__ = [
    "ApproxSign",
    "ClippedGrad",
    "EdeSign",
    "GradientLevels",
    "GradientQuantizer",
    "IdentitySign",
    "MagnitudeAwareSign",
    "Quantizer",
    "SteSign",
    "StochasticSign",
    "SwishSign",
    "absolute",
    "add",
    "argmax",
    "argmin",
    "astype",
    "batch_norm",
    "binary_matmul",
    "bipolar_penalty",
    "clip",
    "concatenate",
    "divide",
    "dropout",
    "equal",
    "exp",
    "get_quantizer",
    "greater",
    "greater_equal",
    "index",
    "l1",
    "l2",
    "less",
    "less_equal",
    "log",
    "log_softmax",
    "matmul",
    "max",
    "maximum",
    "mean",
    "min",
    "minimum",
    "mse",
    "multiply",
    "negative",
    "not_equal",
    "of_length",
    "power",
    "quantize",
    "quantize_gradient",
    "quantizer_names",
    "register_quantizer",
    "relu",
    "reshape",
    "sigmoid",
    "sign",
    "sign_dropout",
    "softmax",
    "softmax_cross_entropy",
    "softmax_divergence",
    "sqrt",
    "squared_hinge",
    "stack",
    "subtract",
    "sum",
    "tanh",
    "to",
    "transpose",
    "virtual_adversarial",
    "where",
]

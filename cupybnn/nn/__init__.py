"""Layers, and the models made of them."""

from cupybnn.nn.layers import (
    BatchNorm,
    BinaryLinear,
    Dropout,
    Linear,
    ReLU,
    Sequential,
    Sign,
    SignDropout,
    glorot_uniform,
)
from cupybnn.nn.module import Module, Parameter
from cupybnn.nn.summary import Row, Summary

__all__ = [
    "BatchNorm",
    "BinaryLinear",
    "Dropout",
    "Linear",
    "Module",
    "Parameter",
    "ReLU",
    "Row",
    "Sequential",
    "Sign",
    "SignDropout",
    "Summary",
    "glorot_uniform",
]

"""Layers, and the models made of them."""

from cupybnn.nn.binary import BinaryLinear, Sign, SignDropout, set_progress
from cupybnn.nn.chain import Block, Chain, stages
from cupybnn.nn.layers import (
    BatchNorm,
    Dropout,
    Linear,
    ReLU,
    Sequential,
    glorot_uniform,
    refresh_statistics,
)
from cupybnn.nn.module import Module, Parameter
from cupybnn.nn.summary import Row, Summary

__all__ = [
    "BatchNorm",
    "BinaryLinear",
    "Block",
    "Chain",
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
    "refresh_statistics",
    "set_progress",
    "stages",
]

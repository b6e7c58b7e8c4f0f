"""Layers and models."""

from cupybnn.nn.binary import BinaryLinear, GradientRounding, Sign, SignDropout, set_progress
from cupybnn.nn.chain import Block, Chain, stages
from cupybnn.nn.containers import ModuleDict, ModuleList, Sequential
from cupybnn.nn.elementwise import Flatten, HardTanh, Identity, ReLU, Scale, Sigmoid, Tanh
from cupybnn.nn.layers import BatchNorm, Dropout, Linear, glorot_uniform, refresh_statistics
from cupybnn.nn.module import Module, Parameter
from cupybnn.nn.saving import load, read_state, save
from cupybnn.nn.summary import Row, Summary

__all__ = [
    "BatchNorm",
    "BinaryLinear",
    "Block",
    "Chain",
    "Dropout",
    "Flatten",
    "GradientRounding",
    "HardTanh",
    "Identity",
    "Linear",
    "Module",
    "ModuleDict",
    "ModuleList",
    "Parameter",
    "ReLU",
    "Row",
    "Scale",
    "Sequential",
    "Sigmoid",
    "Sign",
    "SignDropout",
    "Summary",
    "Tanh",
    "glorot_uniform",
    "load",
    "read_state",
    "refresh_statistics",
    "save",
    "set_progress",
    "stages",
]

"""Optimizers, learning-rate schedules, gradient clipping, weight averaging."""

from cupybnn.optim import schedules
from cupybnn.optim.adam import Adam, AdamW
from cupybnn.optim.averaging import WeightAverage
from cupybnn.optim.bop import Bop
from cupybnn.optim.clipping import clip_grad_norm
from cupybnn.optim.combined import Combined
from cupybnn.optim.groups import binarynet_scale, is_binary, parameter_groups
from cupybnn.optim.optimizer import Block, Optimizer
from cupybnn.optim.sgd import SGD

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Block",
    "Bop",
    "Combined",
    "Optimizer",
    "WeightAverage",
    "binarynet_scale",
    "clip_grad_norm",
    "is_binary",
    "parameter_groups",
    "schedules",
]

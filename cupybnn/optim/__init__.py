"""Optimisers, learning-rate schedules, weight averaging."""

from cupybnn.optim import schedules
from cupybnn.optim.adam import Adam, AdamW
from cupybnn.optim.optimizer import Optimizer
from cupybnn.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "Optimizer", "schedules"]

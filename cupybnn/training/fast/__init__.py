"""The fast training path: a step of fused kernels, captured as a CUDA graph.

`cupybnn.training.step.PlainStep` defines what a step is; `FusedStep` computes the same, on the
parameters' own memory.
"""

from cupybnn.training.fast.plan import NetworkPlan, obstacle
from cupybnn.training.fast.step import FusedStep

__all__ = ["FusedStep", "NetworkPlan", "obstacle"]

"""The fast training path: a step of fused kernels, captured as a CUDA graph.

`cupybnn.training.step.PlainStep` defines a step; `FusedStep` computes the same in place, on the
parameters' own memory.
"""

from cupybnn.training.fast.plan import NetworkPlan
from cupybnn.training.fast.step import FusedStep
from cupybnn.training.fast.supported import unsupported_reason

__all__ = ["FusedStep", "NetworkPlan", "unsupported_reason"]

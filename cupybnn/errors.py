"""Exceptions of cupybnn that a caller may want to catch by name."""

__all__ = ["CheckpointError", "DataError", "DeviceError", "GraphError", "NonFiniteError"]


class DeviceError(RuntimeError):
    """A device was asked for that cannot be used; the message says why."""


class DataError(RuntimeError):
    """A data set is missing, truncated, corrupt or mislabelled."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or does not fit the model or the options."""


class GraphError(RuntimeError):
    """A backward pass was asked for that would give a wrong gradient or none."""


class NonFiniteError(ArithmeticError):
    """A forward value or a gradient is NaN or infinite."""

"""Exceptions of cupybnn that a caller may want to catch by name."""

__all__ = [
    "CheckpointError",
    "DataError",
    "DeviceError",
    "GraphError",
    "NonFiniteError",
    "SettingError",
]


class SettingError(ValueError):
    """A setting or an option has a value that it cannot have; the message says why.

    Whatever the command line can set is checked with this class, and the command then ends with
    the message alone. Any other ValueError there is a bug, and keeps its traceback.
    """


class DeviceError(RuntimeError):
    """A device was asked for that cannot be used; the message says why."""


class DataError(RuntimeError):
    """A data set is missing, truncated, corrupt or mislabelled."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or does not fit the model or the options."""


class GraphError(RuntimeError):
    """A backward pass was asked for that would give a wrong gradient or none."""


class NonFiniteError(ArithmeticError):
    """A forward value or a gradient is NaN or infinite.

    Attributes
    ----------
    op : str
        The operation that made it.
    phase : str
        "forward value" or "gradient of ...".
    place : str
        The layer, as in "hidden.fc2"; empty outside of a model.
    shape : tuple of int
        Shape of the array.
    bad : int
        How many of its values are NaN or infinite.
    step : int or None
        The training step, where there is one; set by the trainer.
    """

    def __init__(self, op: str, phase: str, place: str, shape: tuple[int, ...], bad: int) -> None:
        self.op, self.phase, self.place, self.shape, self.bad = op, phase, place, shape, bad
        self.step: int | None = None
        where = f" in {place}" if place else ""
        super().__init__(
            f"{bad} value(s) of the {phase} of {op}{where}, shape {shape}, are NaN or infinite."
        )

"""Exceptions raised by cupybnn."""

__all__ = [
    "CheckpointError",
    "DataError",
    "DeviceError",
    "GraphError",
    "NonFiniteError",
    "RankError",
    "SettingError",
]


class SettingError(ValueError):
    """A setting or option has an invalid value; the message says why.

    Everything that the command line can set raises this class, and the command then exits with the
    message alone. Any other ValueError there is a bug and keeps its traceback.

    Attributes
    ----------
    report : bool
        False on ranks whose error another rank has, too, and prints.

    Examples
    --------
    >>> import cupybnn
    >>> from cupybnn.errors import SettingError
    >>> try:
    ...     cupybnn.TrainConfig(batch_size=0)
    ... except SettingError as error:
    ...     print(str(error).partition(";")[0])
    The 'batch_size' must be a whole number, at least 1
    """

    report = True


class DeviceError(RuntimeError):
    """A requested device cannot be used; the message says why.

    Examples
    --------
    >>> import cupybnn
    >>> from cupybnn.errors import DeviceError
    >>> try:
    ...     cupybnn.train(device="cuda:99", dataset="digits")
    ... except DeviceError:
    ...     print("no such device")
    no such device
    """


class DataError(RuntimeError):
    """A data set is missing, truncated, corrupt or mislabeled.

    Examples
    --------
    >>> from cupybnn.data import load
    >>> from cupybnn.errors import DataError
    >>> try:
    ...     load("mnist", "no/such/folder")
    ... except DataError:
    ...     print("no such folder")
    no such folder
    """


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or does not match the model or the options.

    Examples
    --------
    >>> import cupybnn
    >>> from cupybnn.errors import CheckpointError
    >>> try:
    ...     cupybnn.load_model("no/such/run")
    ... except CheckpointError:
    ...     print("no such run")
    no such run
    """


class GraphError(RuntimeError):
    """A requested backward pass would give a wrong gradient or none.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import ops
    >>> from cupybnn.autograd import Tensor
    >>> from cupybnn.errors import GraphError
    >>> try:
    ...     Tensor(np.ones(())).backward()  # nothing requires a gradient
    ... except GraphError:
    ...     print("no graph")
    no graph
    """


class NonFiniteError(ArithmeticError):
    """A forward value or a gradient is NaN or infinite.

    Attributes
    ----------
    op : str
        The operation that produced it.
    phase : str
        "forward value" or "gradient of ...".
    place : str
        The layer, as in "hidden.fc2"; empty outside a model.
    shape : tuple of int
        Shape of the array.
    bad : int
        Number of values that are NaN or infinite.
    step : int or None
        The training step, if any. Set by the trainer.
    report : bool
        Whether this rank is the one that should print the message, where every rank raises it.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import ops
    >>> from cupybnn.autograd import Tensor
    >>> from cupybnn.autograd import debug
    >>> from cupybnn.errors import NonFiniteError
    >>> try:
    ...     with debug.check_finite():
    ...         ops.log(Tensor(np.array([0.0])))
    ... except NonFiniteError as error:
    ...     print(error.op, error.bad)
    log 1
    """

    def __init__(self, op: str, phase: str, place: str, shape: tuple[int, ...], bad: int) -> None:
        self.op, self.phase, self.place, self.shape, self.bad = op, phase, place, shape, bad
        self.step: int | None = None
        self.report = True
        where = f" in {place}" if place else ""
        super().__init__(
            f"{bad} value(s) of the {phase} of {op}{where}, shape {shape}, are NaN or infinite."
        )


class RankError(RuntimeError):
    """A rank of a data-parallel run died, hung or differs; the message names it.

    Attributes
    ----------
    report : bool
        Whether this rank is the one that should print the message: every rank raises the same.

    Examples
    --------
    >>> from cupybnn import parallel
    >>> from cupybnn.errors import RankError
    >>> with parallel.connect("cpu") as ranks:
    ...     try:
    ...         ranks.check()
    ...     except RankError as error:
    ...         print(error)
    """

    def __init__(self, message: str, report: bool = True) -> None:
        super().__init__(message)
        self.report = report

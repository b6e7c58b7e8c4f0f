"""What a run reports, evaluations and a result, and the callbacks that it reports to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cupybnn import nn
    from cupybnn.training.config import TrainConfig
    from cupybnn.training.protocol import TrainingRun
    from cupybnn.training.step import StepOutput

__all__ = ["Callback", "Evaluation", "TrainResult", "closing"]


@dataclass(frozen=True)
class Evaluation:
    """The state of a run right after a step.

    Attributes
    ----------
    step : int
        The step, counted from 0.
    train_loss : float
        Loss plus penalty on the step's own batch, before its update.
    train_accuracy : float
        Accuracy on that batch, before the update.
    test_loss : float
        Mean loss over the whole test set plus penalty, after the update.
    test_accuracy : float
        Accuracy on the whole test set, after the update.
    examples_per_second : float
        Training examples a second since the previous evaluation, evaluation excluded.

    Examples
    --------
    >>> import cupybnn
    >>> result = cupybnn.train(dataset="digits", binary=True, n_hidden=32, max_steps=5)
    >>> result.final.step
    4
    """

    step: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    examples_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary that JSON can hold."""
        return asdict(self)


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Attributes
    ----------
    config : TrainConfig
    dataset : str
        Name of the data set that was trained on.
    fallback_reason : str or None
        Why "auto" used the digits instead of MNIST.
    steps : int
        Updates made, including those of earlier runs that were restored.
    history : tuple of Evaluation
        One for each step that is a multiple of `eval_every_n`.
    final : Evaluation
        After the last step.
    average_examples_per_second, median_examples_per_second : float
        Over this process's steps except the first, evaluation excluded.
    run_folder : Path or None
    stopped : bool
        Whether the run was asked to stop before ``max_steps``.
    notices : tuple of str
        The notices of the run.
    model : Module
        The trained model, in evaluation mode, with averaged weights if the configuration asks for
        them: the model that `final` evaluates. Its attribute `trained_on` is a `DataDescription`.

    Examples
    --------
    >>> import cupybnn
    >>> result = cupybnn.train(dataset="digits", binary=True, n_hidden=32, max_steps=5)
    >>> result.steps, result.dataset, len(result.history)
    (5, 'digits', 1)
    """

    config: TrainConfig
    dataset: str
    fallback_reason: str | None
    steps: int
    history: tuple[Evaluation, ...]
    final: Evaluation
    average_examples_per_second: float
    median_examples_per_second: float
    run_folder: Path | None
    stopped: bool
    notices: tuple[str, ...]
    model: nn.Module = field(repr=False, compare=False)

    def __repr__(self) -> str:
        folder = "" if self.run_folder is None else f", run_folder={str(self.run_folder)!r}"
        return (
            f"TrainResult(dataset={self.dataset!r}, steps={self.steps}, "
            f"final_accuracy={self.final_accuracy:.4f}{folder})"
        )

    @property
    def final_accuracy(self) -> float:
        """Accuracy over the whole test set after the last step."""
        return self.final.test_accuracy


class Callback:
    """Base class for training callbacks; each method does nothing unless overridden.

    An exception raised by a method ends the run.

    Attributes
    ----------
    on_every_rank : bool
        Whether, in a run of several ranks, each of them calls it, rather than rank 0 alone. All
        must then do the same: `on_step` may call `Trainer.evaluate` and `Trainer.state`, for which
        the ranks exchange arrays, and change options of the optimizer.

    Examples
    --------
    >>> import cupybnn
    >>> class Losses(cupybnn.training.Callback):
    ...     def __init__(self):
    ...         self.losses = []
    ...
    ...     def on_evaluate(self, trainer, evaluation):
    ...         self.losses.append(evaluation.test_loss)
    >>> config = cupybnn.TrainConfig(dataset="digits", binary=True, n_hidden=32, max_steps=5)
    >>> losses = Losses()
    >>> result = cupybnn.Trainer(config, [losses]).run()
    >>> len(losses.losses) > 0
    True
    """

    on_every_rank = False

    def on_notice(self, trainer: TrainingRun, sentence: str) -> None:
        """On something that the user should know, other than figures."""

    def on_start(self, trainer: TrainingRun) -> None:
        """Before the first step; the model is ready."""

    def on_step(self, trainer: TrainingRun, step: int, output: StepOutput) -> None:
        """After each step; `output` is on the device, and reading it waits for the device."""

    def on_evaluate(self, trainer: TrainingRun, evaluation: Evaluation) -> None:
        """After each evaluation except the final one; gradients are those of the last step."""

    def on_end(self, trainer: TrainingRun, result: TrainResult) -> None:
        """After the final evaluation, also if the run was stopped early."""

    def close(self) -> None:
        """Release resources; called at the end of every run, also after an error."""


@contextlib.contextmanager
def closing(callbacks: Sequence[Callback]) -> Iterator[None]:
    """Close every callback at the end; if several errors occur, raise the first.

    Callbacks that are added to `callbacks` within the context are closed too.
    """
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
    for callback in callbacks:
        try:
            callback.close()
        except BaseException as raised:
            error = raised if error is None else error
    if error is not None:
        raise error

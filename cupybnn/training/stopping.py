"""Stopping a run, or lowering its learning rate, once it no longer improves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cupybnn.training.records import Callback

if TYPE_CHECKING:
    import numpy as np

    from cupybnn.training.protocol import TrainingRun
    from cupybnn.training.step import StepOutput

__all__ = ["MONITORS", "EarlyStopping"]

MONITORS = ("loss", "accuracy")


class EarlyStopping(Callback):
    """Ends a run when a measure has not improved over several epochs.

    A batch can span two epochs; a step belongs to the epoch that ends in it, or else to the current
    one.

    Parameters
    ----------
    monitor : {"loss", "accuracy"}
        "loss": the mean loss, with the penalty, of an epoch's training batches. "accuracy": the
        accuracy on the test set, which is evaluated after each epoch.
    tol : float
        An epoch improves the measure if it exceeds the best one so far by `tol`, or, for the loss,
        falls below it by `tol`. With ``-inf`` every epoch does.
    patience : int
        The run stops after more than this many epochs in a row without improvement.
    keep_best : bool
        Whether to keep the weights of the best epoch in `best_state`.
    decay : float, optional
        Instead of stopping, divide the learning rate by `decay`, as long as it is above `least_lr`.
    least_lr : float
        Only with `decay`.

    Attributes
    ----------
    losses : list of float
        The mean training loss of each epoch.
    accuracies : list of float
        With "accuracy", the accuracy after each epoch.
    best : float or None
        The best value of the measure.
    best_state : dict of str to ndarray, or None
        The model's `state_dict` after the best epoch, with averaged weights if the run averages.
    triggered : bool
        Whether the run was asked to stop.

    Examples
    --------
    >>> from cupybnn import TrainConfig, Trainer
    >>> from cupybnn.training.stopping import EarlyStopping
    >>> stopping = EarlyStopping("accuracy", tol=1e-3, patience=3, keep_best=True)
    >>> config = TrainConfig(dataset="digits", max_steps=5000, device="cpu", n_hidden=16, lr=0.01)
    >>> trainer = Trainer(config, [stopping])
    >>> trainer.run().stopped
    True
    >>> trainer.model.load_state_dict(stopping.best_state)
    >>> trainer.evaluate()[1] == stopping.best == max(stopping.accuracies)
    True
    """

    on_every_rank = True

    def __init__(
        self,
        monitor: str = "loss",
        *,
        tol: float = 1e-4,
        patience: int = 10,
        keep_best: bool = False,
        decay: float | None = None,
        least_lr: float = 1e-6,
    ) -> None:
        if monitor not in MONITORS:
            raise ValueError(
                f"The 'monitor' of EarlyStopping must be one of {', '.join(MONITORS)}; got "
                f"{monitor!r}."
            )
        if decay is not None and not decay > 1:
            raise ValueError(f"The 'decay' must be None or greater than 1; got {decay!r}.")
        self.losses: list[float] = []
        self.accuracies: list[float] = []
        self.best: float | None = None
        self.best_state: dict[str, np.ndarray] | None = None
        self.triggered = False
        self._monitor, self._tol, self._patience = monitor, tol, patience
        self._keep_best, self._decay, self._least_lr = keep_best, decay, least_lr
        self._sum: Any = 0.0
        self._steps = self._epochs = self._idle = 0

    def on_start(self, trainer: TrainingRun) -> None:
        """Count epochs from the current step on."""
        self._epochs = trainer.epoch

    def on_step(self, trainer: TrainingRun, step: int, output: StepOutput) -> None:
        """Add the step's loss; at the end of an epoch, look whether it improved."""
        self._sum = self._sum + output.loss  # on the device, without waiting for it
        self._steps += 1
        if trainer.epoch == self._epochs:
            return
        self._epochs = trainer.epoch
        self.losses.append(float(self._sum) / self._steps)
        self._sum, self._steps = 0.0, 0
        self._judge(trainer)

    def _judge(self, trainer: TrainingRun) -> None:
        sign, measure = -1.0, self.losses[-1]
        if self._monitor == "accuracy":
            sign, measure = 1.0, trainer.evaluate()[1]
            self.accuracies.append(measure)
        best = self.best
        improved = best is None or sign * measure >= sign * best + self._tol
        self._idle = 0 if improved else self._idle + 1
        if best is None or sign * measure > sign * best:
            self.best = measure
            if self._keep_best:
                with trainer.averaged():
                    self.best_state = trainer.model.state_dict()
        if self._idle > self._patience and not self._decayed(trainer):
            self.triggered = True
            trainer.request_stop()

    def _decayed(self, trainer: TrainingRun) -> bool:
        """Divide the learning rate, unless it is at its least; return whether that was done."""
        groups = [group for group in trainer.optimizer.groups if "lr" in group]
        if self._decay is None or all(group["lr"] <= self._least_lr for group in groups):
            return False
        for group in groups:
            group["lr"] /= self._decay
        self._idle = 0
        return True

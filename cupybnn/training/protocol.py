"""What a callback sees of the `Trainer` that calls it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from cupybnn import nn, optim
from cupybnn.backends.devices import Device
from cupybnn.data import Dataset, DeviceData
from cupybnn.parallel import Ranks
from cupybnn.training.checkpoint import Checkpoint
from cupybnn.training.config import TrainConfig

__all__ = ["TrainingRun"]


class TrainingRun(Protocol):
    """A run as its callbacks see it; implemented by `Trainer`, which documents each member."""

    step: int
    run_folder: Path | None
    ranks: Ranks

    @property
    def epoch(self) -> int: ...
    @property
    def config(self) -> TrainConfig: ...
    @property
    def device(self) -> Device: ...
    @property
    def dataset(self) -> Dataset: ...
    @property
    def data(self) -> DeviceData: ...
    @property
    def model(self) -> nn.Module: ...
    @property
    def optimizer(self) -> optim.Optimizer: ...

    def notice(self, sentence: str) -> None: ...
    def request_stop(self) -> None: ...
    def evaluate(self) -> tuple[float, float]: ...
    def averaged(self) -> AbstractContextManager[None]: ...
    def state(self) -> Checkpoint: ...

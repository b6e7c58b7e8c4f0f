"""Callbacks that write into the run folder: checkpoints and TensorBoard records."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cupybnn import nn
from cupybnn.extras import to_install
from cupybnn.training.best import with_final
from cupybnn.training.checkpoint import CheckpointFolder
from cupybnn.training.event_file import EventFile
from cupybnn.training.histogram import Histogram
from cupybnn.training.measures import (
    FlipCounter,
    flipped,
    outside_window,
    sign_entropy,
    stages_of,
    weight_signs,
)
from cupybnn.training.records import Callback, Evaluation, TrainResult

if TYPE_CHECKING:
    from cupybnn.training.protocol import TrainingRun
    from cupybnn.training.step import StepOutput

__all__ = ["CheckpointWriter", "TensorBoardWriter"]


class CheckpointWriter(Callback):
    """Keeps the newest and the best checkpoint; `cupybnn.training.best` defines the best.

    The initial checkpoint, and the best one of the runs that this run continues, are written when
    the folder is made.

    Parameters
    ----------
    folder : Path
    best : float
        Best test accuracy of the runs that this run continues.
    """

    def __init__(self, folder: Path, best: float) -> None:
        self._checkpoints = CheckpointFolder(folder, best)

    def on_evaluate(self, trainer: TrainingRun, evaluation: Evaluation) -> None:
        """Save the state, and keep it as the best if it is."""
        self._checkpoints.save(trainer.state(), evaluation.test_accuracy)

    def on_end(self, trainer: TrainingRun, result: TrainResult) -> None:
        """Save the state after the last step; it can be the best only if the run is complete."""
        if result.stopped:
            self._checkpoints.save(trainer.state())
        else:
            state = with_final(trainer.state(), result.final)
            self._checkpoints.save(state, result.final_accuracy)


class TensorBoardWriter(Callback):
    """Scalars and histograms for TensorBoard, at each evaluation and at the end.

    Scalars, if finite: ``loss/train``, ``loss/test``, ``accuracy/train``, ``accuracy/test`` and
    ``examples_per_second``. Histograms, for each layer, for example ``fc2``: ``fc2/weight`` (the
    latent weights of a binary layer), ``fc2/weight_sign``, ``fc2/weight_gradient`` (from the last
    step), ``fc2/product`` and ``fc2/activation`` (before and after batch norm and non-linearity, on
    the first test images), and ``logits``.

    Binary layers also have, as fractions from 0 to 1, ``flips_at_step/fc2``, ``flips/fc2`` and
    ``flips_since_start/fc2`` (binary weights whose sign differs from before this step, from the
    previous record, and from the start of this process) and ``outside_window/fc2`` (latent weights
    that no longer get a gradient); and, in bits, ``sign_entropy/fc1`` (of the activations' signs,
    averaged over units). ``flips_at_step`` is missing for the step at which a run is stopped early.

    Parameters
    ----------
    folder : Path
    """

    _PROBE = 256  # images whose activations are recorded

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: EventFile | None = None
        self._flips: FlipCounter | None = None
        # Both with the number of a step that is recorded: the signs before it, and its flips.
        self._signs_before: tuple[int, dict[str, Any]] = (-1, {})
        self._flips_at: tuple[int, dict[str, float]] = (-1, {})
        self._last = -1

    def on_start(self, trainer: TrainingRun) -> None:
        """Open the event file, or report once what to install."""
        try:
            self._file = EventFile(self._folder)
        except ImportError:
            trainer.notice(
                f"TensorBoard records are not written because tensorboard is not installed; to "
                f"install it: {to_install('tensorboard')}. Checkpoints are still written."
            )
            return
        self._flips = FlipCounter(trainer.model)
        self._keep_signs(trainer, trainer.step)

    def on_step(self, trainer: TrainingRun, step: int, output: StepOutput) -> None:
        """Count the flips of a step that is recorded."""
        if self._file is None:
            return
        number, before = self._signs_before
        if number == step:
            self._flips_at = (step, flipped(trainer.model, before))
        self._keep_signs(trainer, step + 1)

    def _keep_signs(self, trainer: TrainingRun, step: int) -> None:
        """Keep the current signs if `step`, the next one, will be recorded."""
        config = trainer.config
        recorded = config.eval_every_n and step % config.eval_every_n == 0
        if recorded or step == config.max_steps - 1:
            self._signs_before = (step, weight_signs(trainer.model))

    def on_evaluate(self, trainer: TrainingRun, evaluation: Evaluation) -> None:
        """Write everything for the step of `evaluation`."""
        if self._file is None:
            return
        step = self._last = evaluation.step
        activations = self._activations(trainer)
        scalars = [
            ("loss/train", evaluation.train_loss),
            ("loss/test", evaluation.test_loss),
            ("accuracy/train", evaluation.train_accuracy),
            ("accuracy/test", evaluation.test_accuracy),
            ("examples_per_second", evaluation.examples_per_second),
            *self._measures(trainer.model, activations, step),
        ]
        # A run without any steps has no training loss.
        finite = [(tag, value) for tag, value in scalars if math.isfinite(value)]
        histograms = Histogram.of_all([*_weights_and_gradients(trainer.model), *activations])
        self._file.add(step, finite, histograms)

    def on_end(self, trainer: TrainingRun, result: TrainResult) -> None:
        """Write the state after the last step, unless it has just been written."""
        if result.final.step > self._last:
            self.on_evaluate(trainer, result.final)

    def close(self) -> None:
        """Close the event file."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _measures(
        self, model: nn.Module, activations: list[tuple[str, Any, bool]], step: int
    ) -> Iterator[tuple[str, float]]:
        """Yield (tag, value) for the measures of signs."""
        assert self._flips is not None
        number, shares = self._flips_at
        for name, share in shares.items() if number == step else ():
            yield f"flips_at_step/{name.removesuffix('.weight')}", share
        for name, flips in self._flips.update().items():
            layer = name.removesuffix(".weight")
            yield f"flips/{layer}", flips.since_last
            yield f"flips_since_start/{layer}", flips.since_start
        for name, share in outside_window(model).items():
            yield f"outside_window/{name.removesuffix('.weight')}", share
        for tag, array, two_valued in activations:
            if two_valued:
                yield f"sign_entropy/{tag.removesuffix('/activation')}", sign_entropy(array)

    def _activations(self, trainer: TrainingRun) -> list[tuple[str, Any, bool]]:
        stages = stages_of(trainer, self._PROBE)
        return [(tag, value.data, value.two_valued) for tag, value in stages]


def _weights_and_gradients(model: nn.Module) -> Iterator[tuple[str, Any, bool]]:
    """Yield (tag, array, whether to count signs) for each layer's weights and gradients."""
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.BinaryLinear)):
            continue
        weight = module.weight
        yield f"{name}/weight", weight.data, False
        if isinstance(module, nn.BinaryLinear):
            yield f"{name}/weight_sign", weight.data, True
        if weight.grad is not None:
            yield f"{name}/weight_gradient", weight.grad, False

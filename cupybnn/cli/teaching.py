"""The teachers of a recipe, trained before the network that learns from them."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cupybnn.cli.console import Progress
from cupybnn.cli.export import packed
from cupybnn.cli.signals import Signals
from cupybnn.data import Dataset
from cupybnn.training import Callback, TrainConfig, Trainer
from cupybnn.training.protocol import TrainingRun
from cupybnn.training.recipes import TeacherRecipe, load

if TYPE_CHECKING:
    from cupybnn.training.step import StepOutput

__all__ = ["train_teachers"]

#: What teachers have in common with the network that learns from them.
_SHARED = ("dataset", "data_dir", "validation", "device")


class _Watch(Callback):
    """Shows how far a teacher is, on standard error."""

    def __init__(self, steps: int, what: str) -> None:
        self._progress = Progress(steps, what=what)

    def on_notice(self, trainer: TrainingRun, sentence: str) -> None:
        """Print it."""
        self._progress.write(sentence, sys.stderr)

    def on_step(self, trainer: TrainingRun, step: int, output: StepOutput) -> None:
        """Advance the progress bar."""
        self._progress.update()

    def close(self) -> None:
        """Remove the progress bar."""
        self._progress.close()


def train_teachers(
    recipe: TeacherRecipe, config: TrainConfig, data: Dataset, folder: Path, signals: Signals
) -> TrainConfig | None:
    """Train the teachers of a recipe, each by one line of output.

    Parameters
    ----------
    recipe : TeacherRecipe
    config : TrainConfig
        Of the network that learns from them.
    data : Dataset
        What `config` names, before images are held out.
    folder : Path
        Receives their packed networks.
    signals : Signals

    Returns
    -------
    TrainConfig or None
        `config` with these teachers; None if training was stopped.
    """
    settings = load(recipe.recipe).settings
    shared = {name: getattr(config, name) for name in _SHARED}
    paths = []
    for number in range(recipe.count):
        seed = config.seed * recipe.count + number
        settings = {**settings, **shared, "seed": seed}
        teacher = TrainConfig.from_mapping(settings, source=f"recipe {recipe.recipe}")
        teacher = replace(teacher, eval_every_n=max(teacher.max_steps, 1))
        of = f"teacher {number + 1} of {recipe.count}"
        print(
            f"Training {of}: recipe {recipe.recipe}, {teacher.max_steps:,} steps",
            file=sys.stderr,
            flush=True,
        )
        begun = time.perf_counter()
        with contextlib.closing(_Watch(teacher.max_steps, of)) as watch:
            trainer = Trainer(teacher, [watch], data=data)
            signals.training_begins(trainer)
            result = trainer.run()
        if result.stopped:
            print("Stopped while training a teacher", flush=True)
            return None
        kind = "validation" if trainer.dataset.test_is_validation else "test"
        print(
            f"{of.capitalize()}: recipe {recipe.recipe}, seed {seed}, {kind} accuracy "
            f"{result.final_accuracy:.4f}, {time.perf_counter() - begun:.1f} s",
            flush=True,
        )
        path = folder / f"{Path(recipe.recipe).stem}-{seed}.npz"
        packed(result.model, trainer.dataset).save(path)
        paths.append(str(path))
    return replace(config, teacher=tuple(paths))

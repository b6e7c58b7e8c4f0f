"""The teachers of a recipe, trained before the network that learns from them."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from cupybnn.cli.console import Progress
from cupybnn.cli.export import packed
from cupybnn.cli.signals import Signals
from cupybnn.data import Dataset
from cupybnn.parallel import Ranks
from cupybnn.training import Callback, TrainConfig, Trainer
from cupybnn.training.protocol import TrainingRun
from cupybnn.training.recipes import TeacherRecipe, load

if TYPE_CHECKING:
    from cupybnn.training.step import StepOutput

__all__ = ["train_teachers"]

#: What teachers have in common with the network that learns from them.
_SHARED = ("dataset", "data_dir", "validation", "device", "sync_batch_norm")


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
    recipe: TeacherRecipe,
    config: TrainConfig,
    data: Dataset,
    folder: Path,
    signals: Signals,
    ranks: Ranks,
) -> TrainConfig | None:
    """Train the teachers of a recipe on all ranks; rank 0 prints one line about each.

    Parameters
    ----------
    recipe : TeacherRecipe
    config : TrainConfig
        Of the network that learns from them.
    data : Dataset
        What `config` names, before images are held out.
    folder : Path
        Receives their packed networks: each rank has its own copies, which are equal.
    signals : Signals
    ranks : Ranks

    Returns
    -------
    TrainConfig or None
        `config` with these teachers; None if training was stopped.
    """

    def say(sentence: str, stream: TextIO | None = None) -> None:
        if ranks.rank == 0:
            print(sentence, file=stream, flush=True)

    settings = load(recipe.recipe).settings
    shared = {name: getattr(config, name) for name in _SHARED}
    paths = []
    for number in range(recipe.count):
        seed = config.seed * recipe.count + number
        settings = {**settings, **shared, "seed": seed}
        teacher = TrainConfig.from_mapping(settings, source=f"recipe {recipe.recipe}")
        teacher = replace(teacher, eval_every_n=max(teacher.max_steps, 1))
        of = f"teacher {number + 1} of {recipe.count}"
        say(f"Training {of}: recipe {recipe.recipe}, {teacher.max_steps:,} steps", sys.stderr)
        begun = time.perf_counter()
        with contextlib.ExitStack() as stack:
            callbacks = []
            if ranks.rank == 0:
                watch = _Watch(teacher.max_steps, of)
                callbacks.append(stack.enter_context(contextlib.closing(watch)))
            trainer = Trainer(teacher, callbacks, data=data, ranks=ranks)
            signals.training_begins(trainer)
            result = trainer.run()
        if result.stopped:
            say("Stopped while training a teacher")
            return None
        kind = "validation" if trainer.dataset.test_is_validation else "test"
        say(
            f"{of.capitalize()}: recipe {recipe.recipe}, seed {seed}, {kind} accuracy "
            f"{result.final_accuracy:.4f}, {time.perf_counter() - begun:.1f} s"
        )
        path = folder / f"{Path(recipe.recipe).stem}-{seed}.npz"
        with ranks.busy():
            packed(result.model, trainer.dataset).save(path)
        paths.append(str(path))
    return replace(config, teacher=tuple(paths))

"""The teachers of a recipe, trained before the network that learns from them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from cupybnn.cli.export import packed
from cupybnn.cli.signals import Signals
from cupybnn.data import Dataset
from cupybnn.parallel import Ranks
from cupybnn.training import Callback, TrainConfig, Trainer
from cupybnn.training.protocol import TrainingRun
from cupybnn.training.recipes import TeacherRecipe, load

__all__ = ["train_teachers"]

#: What teachers have in common with the network that learns from them.
_SHARED = ("dataset", "data_dir", "validation", "device", "sync_batch_norm")


class _Notices(Callback):
    def on_notice(self, trainer: TrainingRun, sentence: str) -> None:
        """Print it on standard error."""
        print(sentence, file=sys.stderr, flush=True)


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

    def say(sentence: str) -> None:
        if ranks.rank == 0:
            print(sentence, flush=True)

    settings = load(recipe.recipe).settings
    shared = {name: getattr(config, name) for name in _SHARED}
    paths = []
    for number in range(recipe.count):
        seed = config.seed * recipe.count + number
        settings = {**settings, **shared, "seed": seed}
        teacher = TrainConfig.from_mapping(settings, source=f"recipe {recipe.recipe}")
        teacher = replace(teacher, eval_every_n=max(teacher.max_steps, 1))
        trainer = Trainer(teacher, [_Notices()], data=data, ranks=ranks)
        signals.training_begins(trainer)
        result = trainer.run()
        if result.stopped:
            say("Stopped while training a teacher")
            return None
        kind = "validation" if trainer.dataset.test_is_validation else "test"
        say(
            f"Teacher {number + 1} of {recipe.count}: recipe {recipe.recipe}, seed {seed}, {kind} "
            f"accuracy {result.final_accuracy:.4f}"
        )
        path = folder / f"{Path(recipe.recipe).stem}-{seed}.npz"
        with ranks.busy():
            packed(result.model, trainer.dataset).save(path)
        paths.append(str(path))
    return replace(config, teacher=tuple(paths))

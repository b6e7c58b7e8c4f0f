"""What ``cupybnn train`` says of recipes: the list of them, and a line as a run by one ends."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from cupybnn.training import TrainConfig, TrainResult, recipes
from cupybnn.training.declaration import declared
from cupybnn.training.recipes import Recipe

__all__ = ["ended", "listing"]

_WIDTH = 100
#: Settings that may differ from the recipe's without changing what a run should reach.
_FREE = (
    *("data_dir", "device", "dtype", "xnor", "fused", "graph", "debug", "rank_timeout"),
    *("log_dir", "eval_every_n", "seed"),
)


def listing() -> Iterator[str]:
    """Yield the lines of the list of recipes: name and summary, and what each reached."""
    for name in recipes.names():
        recipe = recipes.load(name)
        paragraphs = [f"{name}: {recipe.summary}"]
        if recipe.accuracy:
            paragraphs.append(f"  test accuracy {recipe.accuracy} ({recipe.measured})")
        if recipe.teachers is not None:
            count, of = recipe.teachers.count, recipe.teachers.recipe
            what = f"{count} teachers" if count > 1 else "its teacher"
            paragraphs.append(f"  trains {what} first, by the recipe {of}")
        for paragraph in paragraphs:
            yield from textwrap.wrap(paragraph, _WIDTH, subsequent_indent="    ")


def ended(recipe: Recipe, result: TrainResult, seconds: float, teachers: float) -> str:
    """Return a line about a run that is over.

    Parameters
    ----------
    recipe : Recipe
    result : TrainResult
    seconds, teachers : float
        Time since the command began, and that of training the teachers.
    """
    kind = "validation" if result.config.validation else "test"
    line = (
        f"Recipe {recipe.name}: {kind} accuracy {result.final_accuracy:.4f} after {seconds:.1f} s"
    )
    if teachers:
        line += f", {teachers:.1f} s of them for teachers"
    taught = recipe.teachers is None or teachers > 0  # by the recipe's, not by others or none
    if recipe.accuracy and taught and _as_published(recipe, result.config):
        line += f"; published: {recipe.accuracy} ({recipe.measured})"
    return line


def _as_published(recipe: Recipe, config: TrainConfig) -> bool:
    """Whether a run has all settings of the recipe that decide what it should reach."""
    published = TrainConfig.from_mapping(recipe.settings)
    free = {*_FREE, *(("teacher",) if recipe.teachers is not None else ())}
    return all(
        getattr(config, name) == getattr(published, name)
        for name in declared(TrainConfig)
        if name not in free
    )

"""Recipes: small TOML files of settings, in this folder or anywhere else.

A recipe has a one-line ``summary`` and a table ``[settings]`` with fields of `TrainConfig`. It may
have a table ``[teachers]``: the ``recipe`` by which its teachers are trained first, and their
``count``; the test ``accuracy`` that it reached; and how that was ``measured``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cupybnn.paths import user_path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from cupybnn.errors import SettingError

__all__ = ["Recipe", "TeacherRecipe", "load", "names"]

_FOLDER = Path(__file__).parent
_TEXTS = ("summary", "accuracy", "measured")


@dataclass(frozen=True)
class TeacherRecipe:
    """How the teachers of a recipe are trained.

    Attributes
    ----------
    recipe : str
        Name of their recipe.
    count : int
        How many; with seed s, their seeds are ``s * count`` to ``s * count + count - 1``.
    """

    recipe: str
    count: int


@dataclass(frozen=True)
class Recipe:
    """Settings with a name.

    Attributes
    ----------
    name : str
    summary : str
        What it trains, in one line.
    settings : dict
        Fields of `TrainConfig`; fields that are missing have their defaults.
    teachers : TeacherRecipe or None
        Teachers that ``cupybnn train`` trains first, unless ``--teacher`` names others.
    accuracy, measured : str
        What it reached on the test images, such as "0.9859 ± 0.0056", and by how many runs, in
        what time; "" if that is not known.
    """

    name: str
    summary: str
    settings: dict[str, Any]
    teachers: TeacherRecipe | None = None
    accuracy: str = ""
    measured: str = ""


def names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load(name: str) -> Recipe:
    """Read a recipe.

    Parameters
    ----------
    name : str
        One of `names`, or the path of a ``.toml`` file.

    Raises
    ------
    ValueError
        If there is no such recipe, or the file is not a recipe. The settings themselves are checked
        by `TrainConfig`.
    """
    is_file = name.endswith(".toml") and user_path(name).is_file()
    path = user_path(name) if is_file else _FOLDER / f"{name}.toml"
    if not is_file and name not in names():
        what = f"there is no file {name!r}" if name.endswith(".toml") else f"got {name!r}"
        raise SettingError(
            f"The 'recipe' must be one of {', '.join(names())}, or a .toml file; {what}."
        )
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors write a BOM
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"The recipe {path} is not TOML: {error}.") from error
    settings = content.get("settings")
    if not isinstance(settings, dict) or set(content) - {*_TEXTS, "settings", "teachers"}:
        raise SettingError(
            f"The recipe {path} must contain its settings below a line [settings]; there may be "
            f"a table [teachers] and, above both, a 'summary', an 'accuracy' and how it was "
            f"'measured', but nothing else; got {', '.join(content) or 'nothing'}."
        )
    texts = {name: content.get(name, "") for name in _TEXTS}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise SettingError(f"The {name!r} of the recipe {path} must be text; got {text!r}.")
    teachers = _teachers(path, content["teachers"]) if "teachers" in content else None
    return Recipe(path.stem, settings=settings, teachers=teachers, **texts)


def _teachers(path: Path, table: Any) -> TeacherRecipe:
    """Return the table [teachers], checked."""
    wanted = {"recipe": str, "count": int}
    fits = isinstance(table, dict) and table.keys() == wanted.keys()
    if not fits or any(type(table[n]) is not kind for n, kind in wanted.items()):
        raise SettingError(
            f"The table [teachers] of the recipe {path} must have a 'recipe', the name of one, and "
            f"a 'count', a whole number; got {table!r}."
        )
    if table["count"] < 1 or load(table["recipe"]).teachers is not None:
        raise SettingError(
            f"The [teachers] of the recipe {path} must be at least one, by a recipe without "
            f"teachers of its own; got {table!r}."
        )
    return TeacherRecipe(**table)

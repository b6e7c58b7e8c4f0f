"""Recipes: small TOML files of settings, in this folder or anywhere else.

A recipe has a one-line ``summary`` and a table ``[settings]`` with fields of `TrainConfig`.
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

__all__ = ["Recipe", "load", "names"]

_FOLDER = Path(__file__).parent


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
    """

    name: str
    summary: str
    settings: dict[str, Any]


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
    if not isinstance(settings, dict) or set(content) - {"summary", "settings"}:
        raise SettingError(
            f"The recipe {path} must contain a 'summary' and a table [settings], nothing else; got "
            f"{', '.join(content) or 'nothing'}."
        )
    return Recipe(path.stem, str(content.get("summary", "")), settings)

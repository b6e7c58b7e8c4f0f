"""Recipes: small TOML files of settings, beside this module or anywhere else.

A recipe has a ``summary`` in one line and a table ``[settings]`` with fields of `TrainConfig`.
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
        Fields of `TrainConfig`; those that are not in it have their defaults.
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
        One of `names`, or the path of a file that ends with ``.toml``.

    Raises
    ------
    ValueError
        If there is no such recipe, or the file is not a recipe. Bad settings are noticed when a
        `TrainConfig` is made of them.
    """
    own = name.endswith(".toml") and user_path(name).is_file()
    path = user_path(name) if own else _FOLDER / f"{name}.toml"
    if not own and name not in names():
        what = f"there is no file {name!r}" if name.endswith(".toml") else f"got {name!r}"
        raise ValueError(
            f"The 'recipe' must be one of {', '.join(names())}, or a .toml file; {what}."
        )
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors write a mark
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"The recipe {path} is not TOML: {error}.") from error
    settings = content.get("settings")
    if not isinstance(settings, dict) or set(content) - {"summary", "settings"}:
        raise ValueError(
            f"The recipe {path} must hold a 'summary' and a table [settings], nothing else; got "
            f"{', '.join(content) or 'nothing'}."
        )
    return Recipe(path.stem, str(content.get("summary", "")), settings)

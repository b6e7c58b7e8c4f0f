"""The CUDA sources: finding them, and assembling self-contained translation units."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path

import cupybnn

__all__ = ["kernel_names", "kernels_dir", "translation_unit"]

_INCLUDE = re.compile(r'\s*#include "([^"]+)"')


@lru_cache(maxsize=1)
def kernels_dir() -> Path:
    """Return the folder of the CUDA sources.

    It is inside an installed package, or next to the package in a source tree or an editable
    install.

    Raises
    ------
    FileNotFoundError
        If it is in neither place.
    """
    package = Path(cupybnn.__file__).resolve().parent
    for folder in (package / "kernels", package.parent / "kernels"):
        if (folder / "include").is_dir():
            return folder
    raise FileNotFoundError(
        f"The CUDA sources should be in {package / 'kernels'} or {package.parent / 'kernels'}; "
        f"neither has them. Reinstall cupybnn."
    )


def kernel_names() -> list[str]:
    """Return the names of the source files, without extension: "smxx_pack", ..."""
    return sorted(path.stem for path in kernels_dir().glob("*.cu"))


@cache
def _file(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def translation_unit(name: str, defines: Mapping[str, int | str] | None = None) -> str:
    """Return the source of kernel file `name` with headers inlined and `defines` on top.

    A unit includes nothing, so its text alone determines what is compiled: a cache keyed by the
    text, like CuPy's, cannot be stale.
    """
    placed: set[str] = set()

    def expand(path: Path) -> str:
        lines = []
        for number, line in enumerate(_file(path).splitlines(), 1):
            include = _INCLUDE.match(line)
            if include is None:
                if line.strip() != "#pragma once":
                    lines.append(line)
            elif include[1] not in placed:
                placed.add(include[1])
                lines.append(f'#line 1 "{include[1]}"')
                lines.append(expand(kernels_dir() / "include" / include[1]))
                lines.append(f'#line {number + 1} "{path.name}"')
        return "\n".join(lines)

    head = "".join(f"#define {key} {value}\n" for key, value in sorted((defines or {}).items()))
    return f'{head}#line 1 "{name}.cu"\n{expand(kernels_dir() / f"{name}.cu")}\n'

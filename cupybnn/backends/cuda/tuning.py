"""The fastest configurations measured on this GPU, stored on disk.

`cupybnn.benchmark.tuning` finds them. They are a JSON file in the cache folder, one per GPU model
and version of the kernel sources: a table measured with other kernels is never read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import warnings
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from cupybnn import settings
from cupybnn.backends.cuda import architectures, configs
from cupybnn.backends.cuda.configs import Config
from cupybnn.backends.cuda.sources import kernels_dir
from cupybnn.files import atomic_write
from cupybnn.schema import (
    Check,
    SchemaError,
    anything,
    boolean,
    integer,
    list_of,
    mapping_of,
    parse,
    record,
    text,
)

__all__ = ["save", "sources_digest", "table_path", "winners"]


@lru_cache(maxsize=1)
def sources_digest() -> str:
    """Return a digest of everything that determines what a configuration compiles to."""
    digest = hashlib.sha256()
    modules = sorted(Path(architectures.__file__).parent.glob("*.py"))
    for path in [*sorted(kernels_dir().rglob("*.cu*")), Path(configs.__file__), *modules]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def table_path(device: int) -> Path:
    """Return the file of the winners for the model of a CUDA device."""
    import cupy

    name = cupy.cuda.runtime.getDeviceProperties(device)["name"].decode()
    model = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()
    return settings.cache_dir() / f"tuned-{model}-{sources_digest()}.json"


@cache
def winners(device: int) -> dict[str, Config]:
    """Return the measured winners by `Problem.key`; empty if nothing was tuned.

    A table that cannot be read, or is not valid, is ignored with one warning: the built-in choice
    is used instead, and ``cupybnn bench --tune`` rewrites the file.
    """
    path = None
    try:
        path = table_path(device)
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise SchemaError(f"it must have at most {_MOST_BYTES:,} bytes")
        entries = parse(content)
        _TABLE(entries, "")
        return {key: _config(**fields) for key, fields in entries.items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        what = "The cache folder" if path is None else f"The tuned table {path}"
        warnings.warn(
            f"{what} is ignored: {error}. 'cupybnn bench --tune' rewrites the table.",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}


_MOST_BYTES = 1 << 24
_DEFINES = list_of(list_of(anything, least=2, most=2), most=32)
_define_name, _define_value = text(r"[A-Z][A-Z0-9_]*", 40), integer(0, 2**16)


def _defines(value: Any, place: str) -> None:
    _DEFINES(value, place)
    for i, (name, number) in enumerate(value):
        _define_name(name, f"{place}[{i}][0]")
        _define_value(number, f"{place}[{i}][1]")


def _field_check(field: dataclasses.Field[Any]) -> Check:
    """Return the check for a field of `Config`, by its name and type."""
    if field.name in ("kernel", "defines"):
        return text(r"sm(\d\d+|xx)") if field.name == "kernel" else _defines
    if field.type in ("bool", bool):
        return boolean
    # Bytes and slots of shared memory may be 0; all other numbers are at least 1.
    return integer(int(not re.search("slot|stage|shared", field.name)), 2**20)


_TABLE = mapping_of(
    record({field.name: _field_check(field) for field in dataclasses.fields(Config)}),
    key=text(r"\d+x\d+x\d+x\d+p?", 60),
)


def _config(*, defines: list[list[Any]], **fields: Any) -> Config:
    return Config(defines=tuple((name, value) for name, value in defines), **fields)


def save(device: int, found: dict[str, Config]) -> Path:
    """Write the winners for a CUDA device, replacing any earlier table."""
    path = table_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {key: dataclasses.asdict(config) for key, config in sorted(found.items())}
    with atomic_write(path) as file:
        file.write(json.dumps(entries, indent=1).encode())
    winners.cache_clear()
    return path

"""The configurations that were found fastest on this GPU, kept on disk.

`cupybnn.benchmark.tuning` finds them. They are a JSON file in the cache folder, one for each model
of GPU and each state of the kernels' sources: a table that was measured with other kernels is never
read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from cupybnn import settings
from cupybnn.backends.cuda import architectures, configs
from cupybnn.backends.cuda.configs import Config
from cupybnn.backends.cuda.sources import kernels_dir
from cupybnn.files import atomic_write

__all__ = ["save", "sources_digest", "table_path", "winners"]


@lru_cache(maxsize=1)
def sources_digest() -> str:
    """Digest of everything that decides what a configuration compiles to."""
    digest = hashlib.sha256()
    modules = sorted(Path(architectures.__file__).parent.glob("*.py"))
    for path in [*sorted(kernels_dir().rglob("*.cu*")), Path(configs.__file__), *modules]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def table_path(device: int) -> Path:
    """File of the winners for the model of CUDA device number `device`."""
    import cupy

    name = cupy.cuda.runtime.getDeviceProperties(device)["name"].decode()
    model = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()
    return settings.cache_dir() / f"tuned-{model}-{sources_digest()}.json"


@cache
def winners(device: int) -> dict[str, Config]:
    """Return the measured winners by `Problem.key`; empty where nothing was tuned."""
    try:
        entries = json.loads(table_path(device).read_text(encoding="utf-8"))
        return {key: _config(**fields) for key, fields in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        # Without a table, or with a damaged one, the built-in choice serves; `--tune` repairs it.
        return {}


def _config(*, defines: list[list[Any]], **fields: Any) -> Config:
    return Config(defines=tuple((str(name), int(value)) for name, value in defines), **fields)


def save(device: int, found: dict[str, Config]) -> Path:
    """Write the winners of CUDA device number `device` in place of what was kept."""
    path = table_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {key: dataclasses.asdict(config) for key, config in sorted(found.items())}
    with atomic_write(path) as file:
        file.write(json.dumps(entries, indent=1).encode())
    winners.cache_clear()
    return path

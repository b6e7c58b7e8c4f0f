"""Environment variables, read here and nowhere else."""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from pathlib import Path

__all__ = [
    "cache_dir",
    "cpu_threads",
    "data_dir",
    "debug",
    "kernel_override",
    "rest_blas_threads",
    "scikit_learn_data",
    "variables_set",
]

_FALSE = {"", "0", "false", "no", "off"}


def debug() -> bool:
    """Whether ``CUPYBNN_DEBUG`` asks for the kernel choices to be printed."""
    return os.environ.get("CUPYBNN_DEBUG", "").strip().lower() not in _FALSE


def cache_dir() -> Path:
    """Folder for tuned kernel tables: ``CUPYBNN_CACHE_DIR`` or the system's cache folder."""
    given = os.environ.get("CUPYBNN_CACHE_DIR")
    if given:
        return Path(given).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "cupybnn"


@lru_cache(maxsize=1)
def cpu_threads() -> int:
    """Threads for NumPy's elementwise work: ``OMP_NUM_THREADS``, else the usable cores, 8 at most.

    The variable is the one by which most BLAS libraries, and so NumPy's matmul, are limited too.
    """
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if given.isdecimal() and int(given) > 0:
        return int(given)
    affinity = getattr(os, "sched_getaffinity", None)
    return min(8, len(affinity(0)) if affinity else os.cpu_count() or 1)


def data_dir() -> Path:
    """Folder for fetched data sets: ``CUPYBNN_DATA_DIR`` or ``data`` in the cache folder."""
    given = os.environ.get("CUPYBNN_DATA_DIR")
    return Path(given).expanduser() if given else cache_dir() / "data"


def kernel_override() -> str | None:
    """Name of the product kernel that ``CUPYBNN_KERNEL`` asks for, or None to let shapes decide."""
    return os.environ.get("CUPYBNN_KERNEL") or None


def rest_blas_threads() -> None:
    """Have OpenBLAS's threads sleep 2**16 clock ticks after a product, not 2**26 (20 ms).

    Until then they spin, on the very cores that elementwise work between two products wants, and
    in every gap of a training step. OpenBLAS looks at ``OPENBLAS_THREAD_TIMEOUT`` when NumPy is
    imported: later than that this does nothing. A value that is set already stays.
    """
    if "numpy" not in sys.modules:
        os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "16")


def scikit_learn_data() -> Path:
    """Folder where scikit-learn keeps what it fetched: ``SCIKIT_LEARN_DATA`` or its default."""
    given = os.environ.get("SCIKIT_LEARN_DATA")
    return Path(given or "~/scikit_learn_data").expanduser()


def variables_set() -> dict[str, str]:
    """Return the environment variables of cupybnn that are set, by name."""
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith("CUPYBNN_")}

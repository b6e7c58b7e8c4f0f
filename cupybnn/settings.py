"""Environment variables: the only module that reads them."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from cupybnn.errors import SettingError
from cupybnn.paths import home, user_path

__all__ = [
    "VARIABLES",
    "cache_dir",
    "cpu_kernels",
    "cpu_threads",
    "data_dir",
    "debug",
    "gpus_read_each_other",
    "kernel_override",
    "kernel_threads",
    "launch_variables",
    "rendezvous",
    "resting_blas_threads",
    "scikit_learn_data",
    "variables_set",
]

#: Every environment variable that is read, and its meaning: the table in the pages.
VARIABLES = {
    "CUPYBNN_CACHE_DIR": "folder of tuned kernel tables and, below it, data; default: `cupybnn` in "
    "the system's cache folder (`XDG_CACHE_HOME`, `~/.cache`, `~/Library/Caches`, `LOCALAPPDATA`)",
    "CUPYBNN_CPU_KERNELS": "`0`: compute on a CPU with NumPy alone, even where Numba is installed",
    "CUPYBNN_DATA_DIR": "folder of downloaded data sets; default: `data` in the cache folder",
    "CUPYBNN_DEBUG": "`1`: on a GPU, print once for each shape which kernel and tile was chosen, "
    "and for each training how its backward pass works",
    "CUPYBNN_KERNEL": "use this kernel for every product on a GPU; `cupybnn info` lists them",
    "CUPYBNN_RENDEZVOUS": "folder in which the ranks of a run meet, where they are on several "
    "hosts: one that all of them see; default: --log_dir, or the host's temporary folder",
    "CUPYBNN_TEST_DATA": "for the tests: folder with `mnist/` (the IDX files) and `openml_home/`",
    "SCIKIT_LEARN_DATA": "scikit-learn's own data folder, which is searched for MNIST, too",
    "NCCL_P2P_DISABLE": "NCCL's own: `1` keeps GPUs from reading each other's memory, also where "
    "they exchange without NCCL",
    "NUMBA_CACHE_DIR": "Numba's own: folder of compiled CPU kernels",
    "NUMBA_NUM_THREADS": "lowers the number of threads of compiled CPU kernels",
    "OMP_NUM_THREADS": "number of threads of products on a CPU and of elementwise work",
    "OPENBLAS_THREAD_TIMEOUT": "OpenBLAS's own: its threads spin after a product, 2 to the power "
    "of this many clock ticks. The command line imports NumPy with 16, unless the variable is set",
}

#: More cores than any machine has; each thread takes memory.
_MOST_THREADS = 1024
_FALSE = {"", "0", "false", "no", "off"}


def debug() -> bool:
    """Whether ``CUPYBNN_DEBUG`` is set, which prints kernel choices."""
    return os.environ.get("CUPYBNN_DEBUG", "").strip().lower() not in _FALSE


def _folder(variable: str, given: str) -> Path:
    try:
        return user_path(given)
    except ValueError as error:
        raise SettingError(
            f"The environment variable {variable} cannot be used: {error}"
        ) from error


def cache_dir() -> Path:
    """Return the folder of tuned kernel tables: ``CUPYBNN_CACHE_DIR`` or the system's cache folder.

    Raises
    ------
    SettingError
        If the variable names a home folder that does not exist.
    """
    given = os.environ.get("CUPYBNN_CACHE_DIR")
    if given:
        return _folder("CUPYBNN_CACHE_DIR", given)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home() / ".cache")
    return base / "cupybnn"


@lru_cache(maxsize=1)
def cpu_kernels() -> bool:
    """Whether kernels compiled by Numba may be used: unless ``CUPYBNN_CPU_KERNELS`` is 0."""
    given = os.environ.get("CUPYBNN_CPU_KERNELS")
    return given is None or given.strip().lower() not in _FALSE - {""}


def _threads(variable: str) -> int | None:
    """Return the number of threads that an environment variable gives; None without one."""
    given = os.environ.get(variable, "").partition(",")[0].strip()
    if re.fullmatch("0*[1-9][0-9]{0,8}", given):
        return min(int(given), _MOST_THREADS)
    return None


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@lru_cache(maxsize=1)
def cpu_threads() -> int:
    """Return the threads for NumPy's elementwise work: ``OMP_NUM_THREADS`` or at most 8 cores.

    Most BLAS libraries, and so NumPy's matmul, respect the same variable.
    """
    return _threads("OMP_NUM_THREADS") or min(8, _cores())


@lru_cache(maxsize=1)
def kernel_threads() -> int:
    """Return the threads of compiled kernels: ``OMP_NUM_THREADS``, or a core each.

    ``NUMBA_NUM_THREADS`` lowers either.
    """
    threads = _threads("OMP_NUM_THREADS") or _cores()
    return min(threads, _threads("NUMBA_NUM_THREADS") or threads)


def data_dir() -> Path:
    """Return the folder of data sets: ``CUPYBNN_DATA_DIR`` or ``data`` in the cache folder."""
    given = os.environ.get("CUPYBNN_DATA_DIR")
    return _folder("CUPYBNN_DATA_DIR", given) if given else cache_dir() / "data"


def kernel_override() -> str | None:
    """Return the product kernel named by ``CUPYBNN_KERNEL``; None to choose by shape."""
    return os.environ.get("CUPYBNN_KERNEL") or None


@contextlib.contextmanager
def resting_blas_threads() -> Iterator[None]:
    """Make an OpenBLAS imported within put its threads to sleep 2**16 clock ticks after a product.

    By default they spin for 2**26 (20 ms) on the cores that elementwise work between two products
    needs, in every gap of a training step. OpenBLAS reads ``OPENBLAS_THREAD_TIMEOUT`` once, when
    NumPy is imported; afterwards the environment is restored. An existing value is kept.
    """
    name = "OPENBLAS_THREAD_TIMEOUT"
    if name in os.environ or "numpy" in sys.modules:
        yield
        return
    os.environ[name] = "16"
    try:
        yield
    finally:
        os.environ.pop(name, None)


def launch_variables() -> dict[str, str]:
    """Return the variables by which a launcher tells a process its rank; see `cupybnn.parallel`."""
    prefixes = ("OMPI_", "PMI_", "PMIX_", "MPI_LOCAL", "SLURM_", "TORCHELASTIC_", "MASTER_")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    return {k: v for k, v in os.environ.items() if k in names or k.startswith(prefixes)}


def gpus_read_each_other() -> bool:
    """Whether a GPU may read another one's memory: unless ``NCCL_P2P_DISABLE`` is 1."""
    return os.environ.get("NCCL_P2P_DISABLE", "").strip().lower() in _FALSE


def rendezvous() -> Path | None:
    """Return the folder in which the ranks of a run meet, ``CUPYBNN_RENDEZVOUS``, if it is set."""
    given = os.environ.get("CUPYBNN_RENDEZVOUS")
    return _folder("CUPYBNN_RENDEZVOUS", given) if given else None


def scikit_learn_data() -> Path:
    """Return scikit-learn's data folder: ``SCIKIT_LEARN_DATA`` or its default."""
    given = os.environ.get("SCIKIT_LEARN_DATA")
    return _folder("SCIKIT_LEARN_DATA", given) if given else home() / "scikit_learn_data"


def variables_set() -> dict[str, str]:
    """Return cupybnn's environment variables that are set, by name."""
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith("CUPYBNN_")}

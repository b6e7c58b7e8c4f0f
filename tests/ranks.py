"""Ranks for tests: threads of this process, or processes that a launcher starts."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import threading
import traceback
from pathlib import Path

import pytest

from cupybnn.parallel.files import FileRanks
from cupybnn.parallel.meeting import Meeting

# The one beside this Python is that of the mpi4py installed there.
_BESIDE = Path(sys.executable).parent / "mpiexec"
MPIEXEC = str(_BESIDE) if _BESIDE.exists() else shutil.which("mpiexec")
_missing = "mpiexec" if MPIEXEC is None else ""
_missing = _missing or ("" if importlib.util.find_spec("mpi4py") else "mpi4py")
needs_mpi = pytest.mark.skipif(
    bool(_missing), reason=f"needs {_missing}: pip install mpi4py mpich, or Debian's packages"
)


def need_gpus(count):
    """Skip unless there are so many GPUs, and NCCL."""
    from cupybnn.backends.devices import cuda_status
    from cupybnn.errors import DeviceError
    from cupybnn.parallel.nccl import new_id

    if cuda_status().device_count < count:
        pytest.skip(f"needs {count} GPUs; there is {cuda_status().device_count}")
    try:
        new_id()
    except DeviceError as error:
        pytest.skip(str(error))


def in_threads(size, function):
    """Call ``function(rank)`` in a thread each; return results, or what was raised."""
    results = [None] * size

    def run(rank):
        try:
            results[rank] = function(rank)
        except Exception as error:
            traceback.print_exc()  # shown where a test fails
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def together(folder, size, function, seconds=20.0):
    """Call ``function(ranks)`` as each of `size` ranks, in a thread each; return the results.

    A rank that raises ends as a process would, and its exception is its result.
    """

    def run(rank):
        with FileRanks(Meeting(Path(folder) / "ranks", rank, size, seconds)) as ranks:
            return function(ranks)

    return in_threads(size, run)

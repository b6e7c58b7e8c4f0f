"""Ranks for tests: threads of this process, or processes that a launcher starts."""

from __future__ import annotations

import shutil
import threading
import traceback
from pathlib import Path

import pytest

from cupybnn.parallel.files import FileRanks
from cupybnn.parallel.meeting import Meeting

needs_mpi = pytest.mark.skipif(
    shutil.which("mpiexec") is None
    and not (Path(__import__("sys").executable).parent / "mpiexec").exists(),
    reason="needs mpiexec: pip install mpich, or a package such as Debian's mpich",
)


def together(folder, size, function, seconds=20.0):
    """Call ``function(ranks)`` as each of `size` ranks, in a thread each; return the results.

    A rank that raises ends as a process would, and its exception is its result.
    """
    results = [None] * size

    def run(rank):
        ranks = None
        try:
            with FileRanks(Meeting(Path(folder) / "ranks", rank, size, seconds)) as ranks:
                results[rank] = function(ranks)
        except Exception as error:
            traceback.print_exc()  # shown where a test fails
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results

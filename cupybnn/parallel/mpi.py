"""Exchanges through MPI, by mpi4py: for CPUs of one host or many."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np

from cupybnn.errors import SettingError
from cupybnn.extras import to_install
from cupybnn.parallel.launch import Launch
from cupybnn.parallel.meeting import Meeting
from cupybnn.parallel.ranks import Pending, Ranks, padded, total, written

__all__ = ["MpiRanks", "world"]

#: Arrays up to this size are sent whole and added by every rank: one message less to wait for.
_SMALL = 1 << 14  # bytes
_SPINS = 100  # polls without a pause
_LONGEST_PAUSE = 0.001  # seconds
_TIME_TO_PRINT = 3.0  # seconds
_MPICH_MEMORY = re.compile(r"/dev/shm/mpich_shm_\w+$", re.MULTILINE)


def world(launch: Launch) -> Any:
    """Return mpi4py's communicator of all processes that `launch` counts.

    Raises
    ------
    SettingError
        If mpi4py is missing, or belongs to another MPI than the launcher.
    """
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise SettingError(
            f"Ranks that mpirun started need mpi4py, which cannot be imported: {error}. To "
            f"install it: {to_install('mpi')}."
        ) from error
    found = MPI.COMM_WORLD.Get_size()
    if found != launch.size:
        raise SettingError(
            f"mpi4py must belong to the MPI of the launcher, which started {launch.size} "
            f"processes; it finds {found} ({MPI.Get_library_version().split(chr(10))[0]}). Use the "
            f"mpirun of that MPI, or install mpi4py for the other."
        )
    _forget_shared_memory(MPI.COMM_WORLD)
    return MPI.COMM_WORLD


def _forget_shared_memory(communicator: Any) -> None:
    """Remove the name of the memory that MPICH shares among the ranks of a host.

    They keep the memory itself. MPICH removes the name at its end only, so it would stay if a rank
    were killed, or called abort. It is kept if a rank of this host has not opened it yet.
    """
    try:
        names = _MPICH_MEMORY.findall(Path("/proc/self/maps").read_text(errors="replace"))
    except OSError:  # not Linux
        names = []
    mine = [socket.gethostname(), sorted(set(names))]
    if all(other == mine for other in communicator.allgather(mine) if other[0] == mine[0]):
        for name in names:
            with contextlib.suppress(OSError):  # another rank was faster
                os.unlink(name)


class MpiRanks(Ranks):
    """Ranks on CPUs that MPI connects.

    Sums are made here, of the arrays that MPI brings, so that their order is fixed. Waiting is
    polling with pauses: a rank that waits leaves its processor to others, and notices when one is
    lost.

    Parameters
    ----------
    communicator : mpi4py.MPI.Comm
    meeting : Meeting or None
        None where the ranks share no folder: then only the launcher notices a rank that dies.
    """

    device = "cpu"

    def __init__(self, communicator: Any, meeting: Meeting | None) -> None:
        self._communicator, self._meeting = communicator, meeting
        self.rank, self.size = communicator.Get_rank(), communicator.Get_size()
        self._begun = 0

    def _number(self) -> int:
        """Count the exchange that begins now."""
        self.check()
        self._begun += 1
        if self._meeting is not None:
            self._meeting.begun = self._begun
        return self._begun

    def _await(self, request: Any, number: int) -> None:
        for _ in range(_SPINS):
            if request.Test():
                return
        if self._meeting is None:
            self._poll(request)
        else:
            with self._meeting.waiting(number):
                self._poll(request)

    def _poll(self, request: Any) -> None:
        pause = 2e-5
        while not request.Test():
            self.check()
            time.sleep(pause)
            pause = min(1.2 * pause, _LONGEST_PAUSE)

    def all_reduce(self, array: Any, *, out: Any = None, bfloat16: bool = False) -> Pending:
        if array.nbytes <= _SMALL:
            gathered = self.all_gather(array)
            return Pending(lambda: written(total(gathered.wait(), bfloat16), out))
        scattered = self.reduce_scatter(padded(array, self.size), bfloat16=bfloat16)

        def finish() -> np.ndarray:
            parts = self.all_gather(scattered.wait()).wait()
            return written(parts.reshape(-1)[: array.size].reshape(array.shape), out)  # type: ignore[no-any-return]

        return Pending(finish)

    def reduce_scatter(self, array: Any, *, out: Any = None, bfloat16: bool = False) -> Pending:
        sent = np.ascontiguousarray(array).reshape(self.size, -1)
        received = np.empty_like(sent)
        number = self._number()
        request = self._communicator.Ialltoall(_bytes(sent), _bytes(received))

        def finish() -> np.ndarray:
            self._await(request, number)
            return written(total(received, bfloat16), out)  # type: ignore[no-any-return]

        return Pending(finish)

    def all_gather(self, array: Any, *, out: Any = None) -> Pending:
        sent = np.ascontiguousarray(array)
        received = np.empty((self.size, *array.shape), array.dtype)
        number = self._number()
        request = self._communicator.Iallgather(_bytes(sent), _bytes(received))

        def finish() -> np.ndarray:
            self._await(request, number)
            return written(received, out)  # type: ignore[no-any-return]

        return Pending(finish)

    def broadcast(self, array: np.ndarray) -> Pending:
        content = np.array(array, order="C")
        number = self._number()
        request = self._communicator.Ibcast(_bytes(content), 0)

        def finish() -> np.ndarray:
            self._await(request, number)
            return content

        return Pending(finish)

    def close(self, error: BaseException | None = None) -> None:
        super().close(error)
        if error is not None:
            # Python's exit would wait in MPI_Finalize for ranks that never come. This runs before,
            # and after the error has been printed.
            atexit.register(self._abort, error)

    def _abort(self, error: BaseException) -> None:
        """End all ranks; one that need not print the error leaves time to the one that does."""
        if not getattr(error, "report", True):
            time.sleep(_TIME_TO_PRINT)
        if self._meeting is not None:
            self._meeting.remove()
        self._communicator.Abort(2 if isinstance(error, SettingError) else 1)


def _bytes(array: np.ndarray) -> np.ndarray:
    """Return an array's memory as bytes: MPI then needs to know no dtype."""
    return array.reshape(-1).view(np.uint8)

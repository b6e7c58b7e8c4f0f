"""Exchanges through files in the folder where the ranks meet: for CPUs, without MPI."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from cupybnn.parallel.meeting import Meeting
from cupybnn.parallel.ranks import Pending, Ranks, total, written

__all__ = ["FileRanks"]

_POLL = 0.0002  # seconds


class FileRanks(Ranks):
    """Ranks on CPUs that share a folder, as those of one machine do.

    Each rank writes what it gives into a file, after the number of exchanges that it has ended,
    and reads the others' when they are there. So each knows which of its files are of no use to
    anyone, and removes them.

    Parameters
    ----------
    meeting : Meeting
    """

    device = "cpu"

    def __init__(self, meeting: Meeting) -> None:
        self._meeting: Meeting = meeting
        self.rank, self.size = meeting.rank, meeting.size
        self._written: dict[int, Path] = {}
        self._pending: set[int] = set()
        self._ended = [0] * self.size  # by rank: it has ended all exchanges below this number

    def _begin(self, array: np.ndarray) -> int:
        """Give `array` to the next exchange; return its number."""
        self._meeting.check()
        number = self._meeting.begun
        self._pending.add(number)
        path = self._path(number, self.rank)
        part = path.with_suffix(".part")
        with open(part, "wb") as file:
            file.write(np.int64(min(self._pending)).tobytes())
            file.write(np.ascontiguousarray(array).data)
        os.rename(part, path)
        self._meeting.begun += 1
        self._written[number] = path
        return number

    def _path(self, number: int, rank: int) -> Path:
        return self._meeting.folder / f"exchange-{number}-{rank}"

    def _end(self, number: int, like: np.ndarray, start: int, count: int) -> list[np.ndarray]:
        """Return elements `start` to ``start + count`` of what each rank gave, in their order."""
        parts = []
        for rank in range(self.size):
            path = self._path(number, rank)
            self._await(path, number)
            with open(path, "rb") as file:
                self._ended[rank] = int(np.fromfile(file, np.int64, 1)[0])
                parts.append(np.fromfile(file, like.dtype, count, offset=start * like.itemsize))
        self._pending.remove(number)
        for old in [n for n in self._written if n < min(self._ended)]:
            with contextlib.suppress(OSError):
                self._written.pop(old).unlink()
        return parts

    def _await(self, path: Path, number: int) -> None:
        if path.exists():
            return
        with self._meeting.waiting(number + 1):
            while not path.exists():
                self._meeting.check()
                time.sleep(_POLL)

    def all_reduce(self, array: Any, *, out: Any = None, bfloat16: bool = False) -> Pending:
        number = self._begin(array)

        def finish() -> np.ndarray:
            parts = self._end(number, array, 0, array.size)
            return written(total(parts, bfloat16).reshape(array.shape), out)  # type: ignore[no-any-return]

        return Pending(finish)

    def reduce_scatter(self, array: Any, *, out: Any = None, bfloat16: bool = False) -> Pending:
        number, count = self._begin(array), array.size // self.size

        def finish() -> np.ndarray:
            parts = self._end(number, array, self.rank * count, count)
            return written(total(parts, bfloat16), out)  # type: ignore[no-any-return]

        return Pending(finish)

    def all_gather(self, array: Any, *, out: Any = None) -> Pending:
        number = self._begin(array)

        def finish() -> np.ndarray:
            parts = self._end(number, array, 0, array.size)
            return written(np.stack(parts).reshape(self.size, *array.shape), out)  # type: ignore[no-any-return]

        return Pending(finish)

    def broadcast(self, array: np.ndarray) -> Pending:
        number = self._begin(array if self.rank == 0 else np.empty(0, array.dtype))
        return Pending(lambda: self._end(number, array, 0, array.size)[0].reshape(array.shape))

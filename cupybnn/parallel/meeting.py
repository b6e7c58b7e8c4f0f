"""A folder in which the ranks of a run find each other."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cupybnn.errors import RankError
from cupybnn.parallel.locks import LAUNCHER, WAITING, is_held, read, write
from cupybnn.parallel.watching import Watch

__all__ = ["Meeting"]

_CURRENT = "current"  # names the session of the ranks that are meeting
#: Ranks may come this many times later than they may hang: starting Python on a loaded host.
_START = 10


class Meeting(Watch):
    """The ranks of one run in a folder that they all see.

    They find each other there, and watch each other from then on.

    Parameters
    ----------
    base : Path
        The same for all ranks of this run and, while they meet, of no other; made if it is not
        there.
    rank, size : int
    seconds : float
        How long a rank may give no sign of life, or keep the others waiting. The ranks wait for
        each other to come for up to ten times as long.
    last_resort : callable, optional
        See `cupybnn.parallel.watching.Watch`.

    Raises
    ------
    RankError
        If a rank does not come.

    Attributes
    ----------
    folder : Path
        The folder of this session within `base`.

    See Also
    --------
    cupybnn.parallel.watching.Watch : The other attributes.
    """

    def __init__(
        self,
        base: Path,
        rank: int,
        size: int,
        seconds: float,
        last_resort: Callable[[RankError], Any] | None = None,
    ) -> None:
        self.base = base
        folder = _open_session(base, rank, size, seconds)
        super().__init__(folder, rank, size, seconds, last_resort)
        if rank == 0:
            write(base / _CURRENT, folder.name.encode())
        try:
            self._await_all()
        except BaseException as error:
            self.close(error)
            raise
        self.start()

    def _await_all(self) -> None:
        def missing() -> list[int]:
            return [r for r in range(self.size) if not self._file(r).exists()]

        def found() -> Path | None:
            return None if missing() else self.folder

        _await(found, missing, self.base, self.rank, self.size, self.seconds)

    def share(self, name: str, make: Callable[[], bytes]) -> bytes:
        """Return what `make` returns on rank 0, on every rank."""
        path = self.folder / name
        if self.rank == 0:
            write(path, make())
        while (content := read(path)) is None:
            self.check()
            time.sleep(0.002)
        return content

    def gather(self, name: str, content: bytes) -> list[bytes]:
        """Return the small contents of all ranks, in their order."""
        write(self.folder / f"{name}-{self.rank}", content)
        found = []
        for rank in range(self.size):
            while (content_of := read(self.folder / f"{name}-{rank}")) is None:
                self.check()
                time.sleep(0.002)
            found.append(content_of)
        return found

    def remove(self) -> None:
        """Remove the folder of this session, and `base` if nothing else is in it.

        Also `base` if the process that made it and would remove it has been killed.
        """
        if (self.base / LAUNCHER).exists() and not is_held(self.base / LAUNCHER):
            shutil.rmtree(self.base, ignore_errors=True)
        super().remove()
        if read(self.base / _CURRENT) == self.folder.name.encode():
            with contextlib.suppress(OSError):
                os.unlink(self.base / _CURRENT)
        with contextlib.suppress(OSError):  # not empty: other ranks
            self.base.rmdir()


def _open_session(base: Path, rank: int, size: int, seconds: float) -> Path:
    """Make the folder of this session, as rank 0, or wait for it."""
    base.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        for old in base.glob("session-*"):  # of ranks that were all killed
            if not is_held(old / "rank-0.lock"):
                shutil.rmtree(old, ignore_errors=True)
        folder = base / f"session-{secrets.token_hex(6)}"
        folder.mkdir(mode=0o700)
        return folder

    def current() -> Path | None:
        name = read(base / _CURRENT)
        if name is None or not name.decode().startswith("session-"):
            return None
        folder = base / name.decode()
        there = (folder / "rank-0.lock").exists() and is_held(folder / "rank-0.lock")
        return folder if there else None

    waiting = base / WAITING
    waiting.touch()
    try:
        found = _await(current, lambda: [0], base, rank, size, seconds)
    except BaseException as error:
        first = _removed(waiting)
        if isinstance(error, RankError):
            error.report = first
        with contextlib.suppress(OSError):  # not empty: other ranks
            base.rmdir()
        raise
    _removed(waiting)
    return found


def _await(
    find: Callable[[], Path | None],
    missing: Callable[[], list[int]],
    base: Path,
    rank: int,
    size: int,
    seconds: float,
) -> Path:
    """Return what `find` finds; RankError names the ranks that are `missing` for too long."""
    began, limit = time.monotonic(), _START * seconds
    while (found := find()) is None:
        waited = time.monotonic() - began
        if waited > limit or not is_held(base / LAUNCHER):
            absent = missing()
            raise RankError(
                f"Rank {', '.join(map(str, absent))} did not come to {base} within "
                f"{waited:.0f} seconds. All {size} ranks must be started, and see this folder; "
                f"on several hosts, choose one that they share with --log_dir or "
                f"CUPYBNN_RENDEZVOUS.",
                report=rank == next((r for r in range(size) if r not in absent), rank),
            )
        time.sleep(0.005)
    return found


def _removed(path: Path) -> bool:
    """Remove a file; return whether it was there."""
    try:
        os.unlink(path)
    except OSError:
        return False
    return True

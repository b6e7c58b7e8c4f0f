"""Temporary files and folders, locked by the process that created them while it lives."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from cupybnn.paths import checked_path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["is_temporary", "new_folder", "new_temporary", "remove_leftovers"]

_TEMPORARY = re.compile(r"\.cupybnn-[0-9a-f]{12}\.tmp")
#: Without file locks, a file unchanged for this many seconds is considered abandoned.
_A_DAY = 24 * 3600.0


def is_temporary(path: str | os.PathLike[str]) -> bool:
    """Whether a path has a name from `new_temporary` or `new_folder`."""
    return _TEMPORARY.fullmatch(Path(path).name) is not None


def new_temporary(folder: Path, private: bool) -> tuple[Path, int]:
    """Create a file with a name that `remove_leftovers` knows; return its path and descriptor.

    Only its owner can read a private one.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    while True:
        path = folder / f".cupybnn-{secrets.token_hex(6)}.tmp"
        descriptor = os.open(path, flags, 0o600 if private else 0o666)
        if _claim(path, descriptor):
            return path, descriptor
        os.close(descriptor)


def _claim(path: Path, descriptor: int) -> bool:
    """Lock a file or folder just created; False if another process has already removed it."""
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def new_folder(parent: str | os.PathLike[str]) -> Iterator[Path]:
    """Create a hidden folder in `parent`, to be filled and renamed, or discarded.

    Unless it was renamed, it is removed with its contents when the block ends. If the process is
    killed, the next `new_folder` or `atomic_write` in `parent` removes it.

    Parameters
    ----------
    parent : path-like
        An existing folder.

    Yields
    ------
    Path
    """
    parent = checked_path(parent)
    remove_leftovers(parent)
    descriptor = None
    while True:
        folder = parent / f".cupybnn-{secrets.token_hex(6)}.tmp"
        folder.mkdir()
        if fcntl is None:
            break
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(folder, os.O_RDONLY)
            if _claim(folder, descriptor):
                break
            os.close(descriptor)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove temporary files and folders that killed writers have left in `folder`.

    Those of live processes, including on other machines, are locked and stay. On a file system
    without locks, those changed within the last day stay.
    """
    try:
        names = [name for name in os.listdir(folder) if _TEMPORARY.fullmatch(name)]
    except OSError:
        return  # an unreadable folder; a write to it reports the error
    for name in names:
        path = Path(folder, name)
        with contextlib.suppress(OSError):  # removed by another process, or not permitted
            _remove_if_dead(path)


def _remove_if_dead(path: Path) -> None:
    mode = path.lstat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return
    descriptor = None
    try:
        locked = False
        if fcntl is not None:
            access = os.O_RDWR if stat.S_ISREG(mode) else os.O_RDONLY  # NFS locks need write access
            descriptor = os.open(path, access | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
            except BlockingIOError:
                return
            except OSError:
                pass
        if not locked and time.time() - path.lstat().st_mtime < _A_DAY:
            return
        if stat.S_ISDIR(mode):
            shutil.rmtree(path)
        else:
            path.unlink()
    finally:
        if descriptor is not None:
            os.close(descriptor)

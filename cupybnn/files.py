"""Atomic file writes: a reader finds either the old content or the new."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from cupybnn.npz import read_npz
from cupybnn.paths import checked_path
from cupybnn.temporary import is_temporary, new_folder, new_temporary, remove_leftovers

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["atomic_write", "is_stream", "new_folder", "read_npz", "remove_leftovers"]

#: Errors for files that cannot be replaced but may be writable: the folder is read-only, or the
#: file is a mount point.
_NOT_REPLACEABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV}


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a temporary file and rename it to `path` when the block succeeds.

    The file is flushed to disk before it is renamed, so that a system crash leaves either the old
    content or the new. If the block raises, `path` is untouched and the temporary file is removed.
    A killed process leaves one behind; the next write to the folder removes it.

    * A symbolic link is followed: its target is replaced.
    * An existing file keeps its mode, and its owner and group if the process may set them. A
      read-only file is not replaced.
    * A file that can be written but not replaced, because its folder is read-only or it is a mount
      point, is overwritten once the whole content is ready and there is space for it.
    * A pipe, a terminal or another character device receives the content when the block ends.

    Parameters
    ----------
    path : path-like
        The file to write; its folder must exist.

    Yields
    ------
    binary file, open for writing and seekable

    Raises
    ------
    OSError
        If `path` cannot be written, or is a folder, a socket or a block device.
    ValueError
        If `path` is not a path.
    """
    text, path = os.fspath(path), checked_path(path)
    if text.endswith(tuple(filter(None, (os.sep, os.altsep)))):  # which a Path drops
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), text)
    try:
        target = _resolve(path)
        if target is None:
            with tempfile.TemporaryFile() as file:
                yield file
                _send(file, path)
            return
        with _replacement(target) as file:
            yield file
    except OSError as error:
        # Report the path that the caller passed, of a full disk, too, which names no file.
        nameless = error.filename is None and error.errno is not None
        if nameless or (isinstance(error.filename, str) and is_temporary(error.filename)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a pipe or device, to which each `atomic_write` appends."""
    return _resolve(checked_path(path)) is None


def _resolve(path: Path) -> Path | None:
    """Follow links to the file to replace; None if `path` is not a regular file."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        kind = "block device" if stat.S_ISBLK(mode) else "socket"
        raise OSError(errno.EINVAL, f"Is a {kind}, not a file", str(path))
    if not stat.S_ISREG(mode):
        return None
    for _ in range(64):
        folder = os.path.realpath(path.parent)
        path = Path(folder, path.name)
        if _descriptor(path) is not None:
            return None
        if not path.is_symlink():
            return path
        path = Path(folder, os.readlink(path))
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def _descriptor(path: Path) -> int | None:
    """Return the descriptor of this process that a resolved path such as /dev/fd/1 refers to."""
    ours = str(path.parent) in (f"/proc/{os.getpid()}/fd", "/dev/fd")
    return int(path.name) if ours and path.name.isdecimal() else None


def _send(file: IO[bytes], path: Path) -> None:
    """Write the whole of `file` to a pipe, a device or an open file of this process."""
    link = path
    while (number := _descriptor(Path(os.path.realpath(link.parent), link.name))) is None:
        if not link.is_symlink():
            break
        link = Path(os.path.realpath(link.parent), os.readlink(link))
    # Use an open file directly: reopening it would start at the beginning.
    where: int | Path = path if number is None else os.dup(number)
    file.seek(0)
    with open(where, "wb", buffering=0) as out:
        shutil.copyfileobj(file, out)


@contextlib.contextmanager
def _replacement(target: Path) -> Iterator[IO[bytes]]:
    """Yield a new file that replaces `target` when the block succeeds."""
    before = os.stat(target) if target.exists() else None
    if before is not None and not os.access(target, os.W_OK):  # replacing it would ignore its mode
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
    remove_leftovers(target.parent)
    temporary = None
    try:
        temporary, descriptor = new_temporary(target.parent, before is not None)
    except OSError as error:
        if before is None or error.errno not in _NOT_REPLACEABLE:
            raise
    if temporary is None:
        with tempfile.TemporaryFile() as file:
            yield file
            _overwrite(target, file)
        return
    try:
        with open(descriptor, "w+b") as file:
            yield file
            file.flush()
            if before is not None:
                _keep_owner_and_mode(temporary, descriptor, before)
            os.fsync(descriptor)
            if fcntl is None:
                file.close()  # Windows cannot rename an open file; elsewhere, keep the lock
            try:
                os.replace(temporary, target)
            except OSError as error:
                if before is None or error.errno not in _NOT_REPLACEABLE or file.closed:
                    raise
                _overwrite(target, file)
                temporary.unlink()
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _keep_owner_and_mode(temporary: Path, descriptor: int, before: os.stat_result) -> None:
    if fcntl is None:
        os.chmod(temporary, before.st_mode)
        return
    for owner, group in ((before.st_uid, before.st_gid), (-1, before.st_gid)):
        with contextlib.suppress(PermissionError):
            os.fchown(descriptor, owner, group)
            break
    os.fchmod(descriptor, before.st_mode & 0o777)


def _overwrite(target: Path, file: IO[bytes]) -> None:
    """Overwrite `target` in place with the content of `file`, if there is space for it."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    with open(target, "r+b", buffering=0) as out:
        before = os.fstat(out.fileno()).st_size
        if size > before and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(out.fileno(), 0, size)
            except OSError:
                os.ftruncate(out.fileno(), before)
                raise
        shutil.copyfileobj(file, out)
        os.ftruncate(out.fileno(), size)
        os.fsync(out.fileno())

"""Files: written so that a reader finds the old content or the new, .npz read without pickle."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

__all__ = ["A_DAY", "atomic_write", "read_npz", "remove_leftovers", "temporary_path"]

A_DAY = 24 * 3600.0  # seconds; nothing is being written for so long


def temporary_path(path: Path) -> Path:
    """Return a name beside `path` for what is being made, which `remove_leftovers` knows."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` and move it into place when the block ends well.

    The file is flushed to the disk before it gets its name, so that a crash of the machine leaves
    the old content or the new. If the block raises, `path` is untouched and the temporary file is
    removed; a killed process leaves one behind, named ``.<name>.<random>.tmp``, which
    `remove_leftovers` clears away.

    Parameters
    ----------
    path : path-like
        The file to write; its folder must exist.

    Yields
    ------
    binary file, open for writing and seekable
    """
    path = Path(path)
    temporary = temporary_path(path)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename = str(path)  # the name that the caller knows
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(path: str | os.PathLike[str], unchanged_for: float = 0.0) -> None:
    """Remove what killed writers of `path` left behind: files or folders ``.<name>.*.tmp``.

    Call it without `unchanged_for` only where no other process can be writing the same file.

    Parameters
    ----------
    path : path-like
    unchanged_for : float
        Remove only what has not changed for so many seconds. `A_DAY` spares whatever a living
        process is writing, also one on another machine or in another container, where its number
        would say nothing, and also where clocks and time zones disagree.
    """
    path = Path(path)
    now = time.time()
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(OSError):  # another process was quicker, or may and we may not
            if unchanged_for and now - leftover.lstat().st_mtime < unchanged_for:
                continue
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def read_npz(
    path: str | os.PathLike[str], names: tuple[str, ...] | None = None
) -> dict[str, np.ndarray]:
    """Read entries of an .npz file, without pickle; the checksum of each is compared on the way.

    Parameters
    ----------
    path : path-like
    names : tuple of str, optional
        Only these entries, those of them that are there; default: all.

    Raises
    ------
    FileNotFoundError, IsADirectoryError, PermissionError
        If the file cannot be opened.
    ValueError
        If it is no .npz file or is damaged; the message is the cause alone, without the path.
    """
    with open(path, "rb") as file:
        # Asked first: NumPy takes what it does not know for a pickle and tells how to load that.
        magic = file.read(4)
        if magic[:2] != b"PK":
            raise ValueError(f"not an .npz file, it begins with {magic!r}")
        file.seek(0)
        try:
            with np.load(file, allow_pickle=False) as loaded:
                wanted = loaded.files if names is None else set(names).intersection(loaded.files)
                return {name: loaded[name] for name in wanted}
        except Exception as error:  # a wrong bit makes zipfile and NumPy raise a dozen kinds
            raise ValueError(str(error) or type(error).__name__) from error

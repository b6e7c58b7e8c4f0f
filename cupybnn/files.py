"""Write files so that a reader finds either the old content or the new, never half of it."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO

__all__ = ["atomic_write", "remove_leftovers"]


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
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Remove the temporary files that killed writers of `path` left behind.

    Call it only where no other process can be writing the same file.
    """
    path = Path(path)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(OSError):
            leftover.unlink()

"""Files by which ranks see whether a process lives, and small ones that they leave each other."""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "LAUNCHER",
    "WAITING",
    "hold",
    "is_held",
    "read",
    "release",
    "remove_abandoned",
    "user_prefix",
    "write",
]

#: The file that a process holds which ends all ranks when it ends itself.
LAUNCHER = "launcher.lock"
#: There while ranks wait for rank 0; if it does not come, the first of them to remove it says so.
WAITING = "waiting"
_A_MINUTE = 60.0


def hold(path: Path) -> int:
    """Create and lock a file for the rest of this process's life; return its descriptor."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks: only signs of life count
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def release(descriptor: int) -> None:
    """Let go of a file that `hold` locked; it stays open."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)


def is_held(path: Path) -> bool:
    """Whether the process that called `hold` lives; True if that cannot be known."""
    if fcntl is None:
        return True
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return True  # not there yet, or no longer: other rules notice
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)


def write(path: Path, content: bytes) -> None:
    """Write a small file that only this user can read; a reader finds all of it or nothing."""
    part = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
    os.replace(part, path)


def read(path: Path) -> bytes | None:
    """Return a file's content, or None if it is not there (yet)."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def user_prefix() -> str:
    """Return how the names of meeting folders begin among temporary files."""
    # Not a name alone, which a container's user may lack.
    user = os.geteuid() if hasattr(os, "geteuid") else getpass.getuser()
    return f"cupybnn-ranks-{user}-"


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove the meeting folders of ranks that were all killed, as mpirun does when it loses one.

    Their locks are free, and they have given no sign of life for a minute.
    """
    for base in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            files = [*base.glob("session-*/rank-*")]
            files += [base / name for name in (LAUNCHER, WAITING) if (base / name).exists()]
            old = [file.stat().st_mtime < time.time() - _A_MINUTE for file in files]
            if files and all(old) and not any(map(is_held, files)):
                shutil.rmtree(base, ignore_errors=True)

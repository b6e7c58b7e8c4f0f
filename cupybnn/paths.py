"""User paths: expands ``~`` and refuses names that no file system accepts."""

from __future__ import annotations

import os
from pathlib import Path

from cupybnn.errors import SettingError

__all__ = ["checked_path", "home", "user_path"]


def checked_path(path: str | os.PathLike[str]) -> Path:
    """Return `path` as a Path.

    Raises
    ------
    SettingError
        If it is empty or has a character that no file name can have, such as NUL.
    """
    text = os.fspath(path)
    try:
        possible = bool(text) and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise SettingError(f"A path must be a name without NUL characters; got {text!r}.")
    return Path(text)


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return `path` as a Path, with a leading ``~`` or ``~user`` replaced by that home folder.

    Raises
    ------
    SettingError
        If there is no such user or no home folder, or `path` has a NUL character.
    """
    path = checked_path(path)
    try:
        return path.expanduser()
    except RuntimeError as error:
        first = path.parts[0]
        whose = f"the user {first[1:]!r}" if len(first) > 1 else "this user"
        raise SettingError(
            f"The path {str(path)!r} begins with a home folder, but {whose} has none on this "
            f"machine. Write the path in full."
        ) from error


def home() -> Path:
    """Return the user's home folder, or a temporary folder if there is none.

    In a container, for example, a process may run without ``HOME`` under a UID that has no user.
    """
    try:
        return Path.home()
    except RuntimeError:
        import tempfile  # here, to keep `import cupybnn` fast

        user = os.getuid() if hasattr(os, "getuid") else "user"
        return Path(tempfile.gettempdir()) / f"cupybnn-{user}"

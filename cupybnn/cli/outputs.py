"""Files that a command is going to write, checked before it works for minutes."""

from __future__ import annotations

from pathlib import Path

from cupybnn.errors import SettingError
from cupybnn.files import is_stream

__all__ = ["check_chart", "check_output"]


def check_output(option: str, path: Path) -> None:
    """Check that a file can be made.

    Raises
    ------
    SettingError
        If its folder does not exist, or it is a folder; the message names `option`.
    """
    if not path.resolve().parent.is_dir():
        raise SettingError(f"The '{option}' must be in an existing folder; got '{path}'.")
    if path.is_dir():
        raise SettingError(f"The '{option}' must be a file; got the folder '{path}'.")


def check_chart(path: Path) -> None:
    """Check that the files of ``--chart`` can be made; see `check_output`."""
    check_output("--chart", path)
    if is_stream(path):
        raise SettingError(f"The '--chart' must be a file name; got the device or pipe '{path}'.")

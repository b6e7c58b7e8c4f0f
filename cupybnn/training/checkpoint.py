"""Checkpoints: .npz files without pickle, replaced in one move, the newest and the best kept."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cupybnn.errors import CheckpointError
from cupybnn.files import atomic_write, read_npz, remove_leftovers
from cupybnn.paths import user_path

__all__ = ["BEST", "NEWEST", "Checkpoint", "CheckpointFolder", "find", "load", "load_info", "save"]

NEWEST = "newest.npz"
BEST = "best.npz"
_FORMAT = "cupybnn-checkpoint"
_VERSION = 1
_HEADER = "header"  # member with the JSON text; arrays are in members named "array/<name>"
_PREFIX = "array/"


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on.

    Attributes
    ----------
    step : int
        Number of updates made.
    arrays : mapping of str to ndarray
        Weights, running statistics and optimiser state, on the host.
    info : mapping of str to JSON values
        The configuration, random states that are not arrays, the evaluations so far.
    """

    step: int
    arrays: Mapping[str, np.ndarray]
    info: Mapping[str, Any]


def save(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write `checkpoint` to `path`, in one move: a reader finds the old file or the new.

    Raises
    ------
    CheckpointError
        If the file cannot be written (a full disk, say); what was there before is untouched.
    """
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "step": checkpoint.step,
        "info": checkpoint.info,
        "arrays": sorted(checkpoint.arrays),
    }
    members = {_PREFIX + name: np.asarray(array) for name, array in checkpoint.arrays.items()}
    try:
        with atomic_write(path) as file:
            np.savez(file, allow_pickle=False, **{_HEADER: np.array(json.dumps(header))}, **members)
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint {os.fspath(path)} cannot be written: {error.strerror or error}."
        ) from error


def find(path: str | os.PathLike[str]) -> Path:
    """Return the checkpoint file that `path` means: a file itself, or a run folder's newest.

    Raises
    ------
    CheckpointError
        If there is none.
    """
    try:
        path = user_path(path)
    except ValueError as error:
        raise CheckpointError(f"The checkpoint to restore cannot be found: {error}") from error
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"The checkpoint to restore, {path}, does not exist.")
    for name in (NEWEST, BEST):
        if (path / name).is_file():
            return path / name
    # Not in hidden folders: those are runs that are being made, or were left half made.
    below = sorted(p for p in path.rglob(NEWEST) if not p.parent.name.startswith("."))
    hint = f" There are some below it; one is {below[-1].parent}." if below else ""
    raise CheckpointError(
        f"The folder {path} holds no checkpoint: expected {NEWEST} or {BEST} in it.{hint}"
    )


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint.

    Parameters
    ----------
    path : path-like
        A checkpoint file, or a run folder (its newest checkpoint is taken).

    Raises
    ------
    CheckpointError
        If there is none, or it is damaged, or not a checkpoint of cupybnn, or of a newer version.
    """
    path = find(path)
    entries = _entries(path)
    header = _header(path, entries)
    try:
        arrays = {name: entries[_PREFIX + name] for name in header["arrays"]}
        return Checkpoint(int(header["step"]), arrays, header["info"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"The checkpoint {path} is damaged: {error}.") from error


def load_info(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Read a checkpoint's `info` alone; arguments and errors as for `load`."""
    path = find(path)
    info: Mapping[str, Any] = _header(path, _entries(path, (_HEADER,)))["info"]
    return info


def _entries(path: Path, names: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
    try:
        return read_npz(path, names)
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be read: {error.strerror or error}."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"The checkpoint {path} is damaged: {error}.") from error


def _header(path: Path, entries: Mapping[str, np.ndarray]) -> dict[str, Any]:
    try:
        header = json.loads(str(entries[_HEADER]))
        version = header["version"] if header["format"] == _FORMAT else None
    except (KeyError, TypeError, ValueError):
        version = None
    if not isinstance(version, int):
        raise CheckpointError(f"{path} is not a checkpoint of cupybnn.")
    if version > _VERSION:
        raise CheckpointError(
            f"{path} is a checkpoint of version {version}; this cupybnn reads versions up to "
            f"{_VERSION}. Update cupybnn."
        )
    if not isinstance(header.get("info"), dict):
        raise CheckpointError(f"The checkpoint {path} is damaged: its header has no 'info'.")
    return dict(header)


class CheckpointFolder:
    """The two checkpoints of a run: the newest, and the best so far.

    Parameters
    ----------
    folder : path-like
        The run folder. It belongs to one running process.
    best : float, optional
        Test accuracy of the best checkpoint that is already there.
    """

    def __init__(self, folder: str | os.PathLike[str], best: float = -1.0) -> None:
        self.folder = Path(folder)
        self.best = best
        remove_leftovers(self.folder)

    def save(self, checkpoint: Checkpoint, accuracy: float | None = None) -> None:
        """Replace the newest checkpoint, and the best if `accuracy` is greater than its."""
        save(self.folder / NEWEST, checkpoint)
        if accuracy is not None and accuracy > self.best:
            self.best = accuracy
            self._newest_is_best()

    def _newest_is_best(self) -> None:
        # A copy, not a second name for the same file: what damages one must not damage both.
        best = self.folder / BEST
        try:
            with open(self.folder / NEWEST, "rb") as newest, atomic_write(best) as file:
                shutil.copyfileobj(newest, file, 1 << 20)
        except OSError as error:
            raise CheckpointError(
                f"The checkpoint {best} cannot be written: {error.strerror or error}."
            ) from error

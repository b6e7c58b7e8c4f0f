"""Checkpoints: .npz files without pickle, replaced in one move, the newest and the best kept."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cupybnn.errors import CheckpointError
from cupybnn.files import atomic_write, remove_leftovers

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
    path = Path(path).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"The checkpoint to restore, {path}, does not exist.")
    for name in (NEWEST, BEST):
        if (path / name).is_file():
            return path / name
    below = sorted(path.rglob(NEWEST))
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
    with _opened(path) as stored:
        header = _header(path, stored)
        # Reading a member to its end checks its CRC.
        arrays = {name: stored[_PREFIX + name] for name in header["arrays"]}
        return Checkpoint(int(header["step"]), arrays, header["info"])


def load_info(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Read a checkpoint's `info` alone; arguments and errors as for `load`."""
    path = find(path)
    with _opened(path) as stored:
        info: Mapping[str, Any] = _header(path, stored)["info"]
        return info


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a .npz file; what goes wrong with it in the block becomes a `CheckpointError`."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            yield stored
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"The checkpoint {path} is damaged: {error}.") from error


def _header(path: Path, stored: Any) -> dict[str, Any]:
    named = _HEADER in getattr(stored, "files", ())
    header = json.loads(str(stored[_HEADER])) if named else None
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of cupybnn.")
    if header["version"] > _VERSION:
        raise CheckpointError(
            f"{path} is a checkpoint of version {header['version']}; this cupybnn reads versions "
            f"up to {_VERSION}. Update cupybnn."
        )
    return header


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
        for name in (NEWEST, BEST):
            remove_leftovers(self.folder / name)

    def save(self, checkpoint: Checkpoint, accuracy: float | None = None) -> None:
        """Replace the newest checkpoint, and the best if `accuracy` is greater than its."""
        save(self.folder / NEWEST, checkpoint)
        if accuracy is not None and accuracy > self.best:
            self.best = accuracy
            self._newest_is_best()

    def _newest_is_best(self) -> None:
        # A second name for the same file costs nothing; where links are impossible, a copy.
        temporary = self.folder / f".{BEST}.{secrets.token_hex(6)}.tmp"
        try:
            try:
                os.link(self.folder / NEWEST, temporary)
            except OSError:
                shutil.copyfile(self.folder / NEWEST, temporary)
            os.replace(temporary, self.folder / BEST)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise CheckpointError(
                f"The checkpoint {self.folder / BEST} cannot be written: {error.strerror or error}."
            ) from error

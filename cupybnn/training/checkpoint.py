"""Checkpoints: .npz files without pickle, written atomically; a run keeps its newest and best."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cupybnn.errors import CheckpointError
from cupybnn.files import atomic_write, remove_leftovers
from cupybnn.npz import NpzFile, open_npz
from cupybnn.paths import user_path
from cupybnn.schema import (
    SchemaError,
    anything,
    integer,
    list_of,
    mapping_of,
    nullable,
    number,
    one_of,
    parse,
    real,
    record,
    text,
)
from cupybnn.temporary import is_temporary

__all__ = [
    "BEST",
    "NEWEST",
    "Checkpoint",
    "CheckpointFolder",
    "find",
    "load",
    "load_info",
    "load_run",
    "save",
]

NEWEST = "newest.npz"
BEST = "best.npz"
_FORMAT = "cupybnn-checkpoint"
_VERSION = 1
_HEADER = "header"  # member with the JSON text; arrays are in members named "array/<name>"
_PREFIX = "array/"
_MOST_FOLDERS = 1000  # searched for a hint


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to continue.

    Attributes
    ----------
    step : int
        Number of updates made.
    arrays : mapping of str to ndarray
        Weights, running statistics and optimizer state, on the host.
    info : mapping of str to JSON values
        The configuration, random states that are not arrays, and the evaluations so far.
    """

    step: int
    arrays: Mapping[str, np.ndarray]
    info: Mapping[str, Any]


def save(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write `checkpoint` to `path` atomically: a reader sees either the old file or the new one.

    Raises
    ------
    CheckpointError
        If the file cannot be written (a full disk, say); an existing file is left untouched.
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
        shown = Path(path)
        if is_temporary(shown.parent):  # of a run that has no number yet
            shown = shown.parent.parent / shown.name
        raise CheckpointError(
            f"The checkpoint {shown} cannot be written: {error.strerror or error}."
        ) from error


def find(path: str | os.PathLike[str]) -> Path:
    """Return the checkpoint file at `path`: the file itself, or the newest of a run folder.

    Raises
    ------
    CheckpointError
        If there is none.
    """
    try:
        path = user_path(path)
    except ValueError as error:
        raise CheckpointError(f"The checkpoint to restore cannot be found: {error}") from error
    try:
        if path.is_file():
            return path
        if not path.is_dir():
            raise CheckpointError(f"The checkpoint to restore, {path}, does not exist.")
        for name in (NEWEST, BEST):
            if (path / name).is_file():
                return path / name
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint to restore, {path}, cannot be read: {error.strerror or error}."
        ) from error
    below = _run_below(path)
    hint = "" if below is None else f" Did you mean {below}?"
    raise CheckpointError(
        f"The folder {path} contains no checkpoint; expected {NEWEST} or {BEST}.{hint}"
    )


def _run_below(folder: Path) -> Path | None:
    """Return the last run folder among the first thousand folders below `folder`, if any."""
    # Hidden folders are skipped: they are unfinished runs.
    runs, folders = [], [str(folder)]
    for where in folders:  # grows during the loop
        with contextlib.suppress(OSError), os.scandir(where) as entries:
            for entry in entries:
                if entry.name == NEWEST:
                    runs.append(Path(where))
                elif len(folders) >= _MOST_FOLDERS or entry.name.startswith("."):
                    continue
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
    return max(runs, default=None)


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint.

    Parameters
    ----------
    path : path-like
        A checkpoint file, or a run folder, whose newest checkpoint is read.

    Raises
    ------
    CheckpointError
        If there is no checkpoint, or the file is damaged, is not a cupybnn checkpoint, comes from a
        newer version, or contains values that no run can have written. The message names the first
        fault.
    """
    path = find(path)
    with _opened(path) as file:
        header = _header(path, file)
        arrays = {name: file.read(_PREFIX + name) for name in header["arrays"]}
        for name, array in arrays.items():
            _check_array(name, array)
    return Checkpoint(header["step"], arrays, header["info"])


def load_run(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint as `load` does, and check that a run can continue from it."""
    stored = load(path)
    try:
        _RUN(stored.info, "info")
    except SchemaError as error:
        raise CheckpointError(
            f"The checkpoint {path} is damaged: {error}. A run cannot continue from it."
        ) from error
    return stored


def load_info(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Read only a checkpoint's `info`; arguments and errors are those of `load`."""
    path = find(path)
    with _opened(path) as file:
        info: Mapping[str, Any] = _header(path, file)["info"]
        return info


# --- what a file must contain

_FIGURES = {
    "step": integer(),
    "train_loss": real,
    "train_accuracy": number(0, 1),
    "test_loss": real,
    "test_accuracy": number(0, 1),
    "examples_per_second": real,
}
_RUN = record(
    {
        "config": mapping_of(anything),
        "dataset": text(),
        "history": list_of(record(_FIGURES)),
    },
    others=True,
)
_HEADER_RULE = record(
    {
        "format": one_of(_FORMAT),
        "version": integer(1, _VERSION),
        "step": integer(),
        "info": record(
            {},
            {
                "config": mapping_of(anything),
                "dataset": text(),
                "history": list_of(record({}, _FIGURES, others=True)),
                "final": nullable(record({"step": integer(), "test_accuracy": number(0, 1)})),
            },
            others=True,
        ),
        "arrays": list_of(text(most=1000), most=100_000),
    }
)
_MOST_HEADER_BYTES = 1 << 28


def _check_array(name: str, array: np.ndarray) -> None:
    if array.dtype.kind not in "biuf":
        raise ValueError(f"the array {name!r} must contain real numbers; got {array.dtype}")
    kind, _, rest = name.partition("/")
    if name in ("optimizer/steps", "average/updates"):
        if array.dtype.kind not in "iu" or array.shape != () or not 0 <= array <= 2**53:
            raise ValueError(
                f"the array {name!r} must be one integer from 0 to 2**53; got {array.dtype} of "
                f"shape {array.shape}" + (f", {array}" if array.shape == () else "")
            )
    elif kind == "optimizer":
        if not np.isfinite(array).all():
            raise ValueError(
                f"the array {name!r} contains NaN or infinite values: the run had diverged. An "
                f"earlier checkpoint, such as {BEST}, may be usable"
            )
        if rest.endswith(".square") and (array < 0).any():
            raise ValueError(f"the array {name!r} must be a mean of squares; got negative values")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[NpzFile]:
    """Open a checkpoint; within the block, whatever is wrong with it raises CheckpointError."""
    try:
        with open_npz(path) as file:
            yield file
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be read: {error.strerror or error}."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"The checkpoint {path} is damaged: {error}.") from error


def _header(path: Path, file: NpzFile) -> dict[str, Any]:
    foreign = CheckpointError(f"{path} is not a cupybnn checkpoint.")
    if _HEADER not in file.names:
        raise foreign
    content = file.read(_HEADER, _MOST_HEADER_BYTES)
    if content.dtype.kind != "U" or content.shape != ():
        raise foreign
    header = parse(str(content), constants=True)
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise foreign
    version = header.get("version")
    if isinstance(version, int) and version > _VERSION:
        raise CheckpointError(
            f"{path} is a version {version} checkpoint; this cupybnn reads versions up to "
            f"{_VERSION}. Update cupybnn."
        )
    _HEADER_RULE(header, "")
    return header


class CheckpointFolder:
    """The two checkpoints of a run: the newest, and the best so far.

    Parameters
    ----------
    folder : path-like
        The run folder; only one running process may use it.
    best : float, optional
        Test accuracy of the best checkpoint that is already in the folder.
    """

    def __init__(self, folder: str | os.PathLike[str], best: float = -1.0) -> None:
        self.folder = Path(folder)
        self.best = best
        remove_leftovers(self.folder)

    def save(self, checkpoint: Checkpoint, accuracy: float | None = None) -> None:
        """Replace the newest checkpoint, and the best one if `accuracy` is higher."""
        save(self.folder / NEWEST, checkpoint)
        if accuracy is not None and accuracy > self.best:
            self.best = accuracy
            self._newest_is_best()

    def _newest_is_best(self) -> None:
        # A copy, not a hard link: damage to one file must not damage both.
        best = self.folder / BEST
        try:
            with open(self.folder / NEWEST, "rb") as newest, atomic_write(best) as file:
                shutil.copyfileobj(newest, file, 1 << 20)
        except OSError as error:
            raise CheckpointError(
                f"The checkpoint {best} cannot be written: {error.strerror or error}."
            ) from error

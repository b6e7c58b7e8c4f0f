"""Data sets of MNIST's form: fetched from OpenML by scikit-learn, kept as one checked file each."""

from __future__ import annotations

import hashlib
import shutil
import socket
import tempfile
import warnings
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cupybnn import settings
from cupybnn.data.dataset import Dataset
from cupybnn.errors import DataError
from cupybnn.files import atomic_write, new_folder, read_npz

__all__ = ["MEMBERS", "Source", "check", "fetch", "is_kept", "load", "scratch_folder"]

#: Arrays of a data set and their shapes, of uint8.
MEMBERS = {
    "train_images": (60_000, 784),
    "train_labels": (60_000,),
    "test_images": (10_000, 784),
    "test_labels": (10_000,),
}
_TIMEOUT = 20.0  # seconds that a connection may stall


@dataclass(frozen=True)
class Source:
    """A data set of 28×28 pixels and ten classes, and where it comes from.

    Attributes
    ----------
    name : str
        A choice of ``--dataset``.
    title : str
        Its name in messages.
    cache_name : str
        File name in the data folder.
    openml_name : str
    openml_ids : tuple of str
        OpenML's IDs of the data set and of its data file.
    size : str
        Of the download.
    sha256 : str or None
        SHA-256 of all training images, training labels, test images and test labels, in that
        order, one byte per pixel and label.
    balanced : bool
        Whether each class has a tenth of the training images and of the test images. It shows that
        the rows are in the order of the original files, where there is no hash.
    class_names : tuple of str, optional
    package : str
        The package of Debian and Ubuntu that has its files; "" if there is none.
    """

    name: str
    title: str
    cache_name: str
    openml_name: str
    openml_ids: tuple[str, str]
    size: str
    sha256: str | None = None
    balanced: bool = False
    class_names: tuple[str, ...] | None = None
    package: str = ""


def is_kept(source: Source) -> bool:
    """Whether the data folder has a copy of a data set, which may not be valid."""
    try:
        return (settings.data_dir() / source.cache_name).exists()
    except ValueError:  # an environment variable that is not a folder
        return False


def load(
    source: Source,
    fetched: Callable[[Path], dict[str, np.ndarray]],
    *,
    notify: Callable[[str], None] | None = None,
) -> Dataset:
    """Load a data set from the data folder, or fetch it and keep it there.

    Parameters
    ----------
    source : Source
    fetched : callable
        Fetches it, with a folder for temporary files.
    notify : callable, optional
        Called with a sentence before the fetch, which takes about 11 s and 1 GB of memory.

    Raises
    ------
    DataError
        If the data folder has no valid copy and none can be fetched; the message gives the cause,
        the folders searched and the alternatives.
    """
    say = notify or (lambda sentence: None)
    try:
        path = settings.data_dir() / source.cache_name
        settings.scikit_learn_data()
    except ValueError as error:  # an environment variable that is not a folder
        raise DataError(str(error)) from error
    trouble = ""
    if path.exists():
        try:
            return _dataset(source, _read_cache(source, path))
        except DataError as error:
            trouble = f"{error} "
            say(f"{error} It will be fetched again.")
    say(
        f"Fetching {source.title} from OpenML with scikit-learn ({source.size}, once; it will be "
        f"kept in {path})."
    )
    try:
        arrays = fetched(path.parent)
    except Exception as error:  # whatever urllib, http, json and scikit-learn raise
        raise DataError(
            f"{trouble}{source.title} cannot be fetched from OpenML: {_cause(error)}. Looked in "
            f"{path.parent} for {source.cache_name} and in {settings.scikit_learn_data()} for "
            f"scikit-learn's copy. Two ways out: name a folder with {source.title}'s four IDX "
            f"files (cupybnn train FOLDER, or data_dir=FOLDER in Python){_by_package(source)}, or "
            f"use the bundled digits (--dataset digits, or dataset='digits')."
        ) from error
    check(source, arrays, f"The {source.title} from OpenML")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            np.savez(file, allow_pickle=False, **arrays)
    except OSError as error:
        say(f"{source.title} could not be kept in {path} ({error.strerror or error}).")
    return _dataset(source, arrays)


def _by_package(source: Source) -> str:
    if not source.package:
        return ""
    return f", on Debian and Ubuntu also apt install {source.package}"


def _cause(error: BaseException) -> str:
    """Summarise the error; urllib wraps the useful one in `reason`."""
    reason = getattr(error, "reason", None)
    text = str(reason if reason is not None else error).strip().rstrip(".")
    return text.splitlines()[0] if text else type(error).__name__


def _read_cache(source: Source, path: Path) -> dict[str, np.ndarray]:
    try:
        arrays = read_npz(path, tuple(MEMBERS))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is corrupt: {_cause(error)}.") from error
    if missing := [name for name in MEMBERS if name not in arrays]:
        raise DataError(f"{path} is corrupt: it has no entry '{missing[0]}'.")
    check(source, arrays, str(path))
    return arrays


def check(source: Source, arrays: dict[str, np.ndarray], what: str) -> None:
    """Raise DataError unless arrays are what `source` describes; `what` begins the message."""
    digest = hashlib.sha256()
    for name, shape in MEMBERS.items():
        array = arrays[name]
        if array.dtype != np.uint8 or array.shape != shape:
            raise DataError(
                f"{what} is not valid: expected {name} as uint8 {shape}, found "
                f"{array.dtype} {array.shape}."
            )
        digest.update(np.ascontiguousarray(array).data)
    if source.sha256 is not None and digest.hexdigest() != source.sha256:
        raise DataError(
            f"{what} is not valid: expected the SHA-256 {source.sha256}, found "
            f"{digest.hexdigest()}."
        )
    for part in ("train", "test") if source.balanced else ():
        labels = arrays[f"{part}_labels"]
        counts = np.bincount(labels, minlength=10)
        if counts.size > 10 or (counts != len(labels) // 10).any():
            raise DataError(
                f"{what} is not valid: expected {len(labels) // 10} {part} images of each of 10 "
                f"classes, found {', '.join(map(str, counts))}."
            )


def _dataset(source: Source, arrays: dict[str, np.ndarray]) -> Dataset:
    return Dataset(
        name=source.name,
        image_shape=(28, 28),
        pixel_max=255,
        class_names=source.class_names,
        **arrays,  # type: ignore[arg-type]
    )


def fetch(source: Source, folder: Path) -> dict[str, np.ndarray]:
    """Load a data set with scikit-learn, in a scratch folder.

    scikit-learn deletes files in its data home that it cannot parse and fetches them again.
    Therefore it gets a copy of the user's files of this data set, never the data home itself.
    """
    from sklearn.datasets import fetch_openml

    with scratch_folder(folder) as scratch:
        _copy_openml(source, settings.scikit_learn_data() / "openml", scratch / "openml")
        with warnings.catch_warnings(), _socket_timeout(_TIMEOUT):
            warnings.simplefilter("ignore")  # its retries warn; we report a failure in one message
            bunch: Any = fetch_openml(
                source.openml_name,
                version=1,
                as_frame=False,
                parser="liac-arff",  # "auto" needs pandas
                data_home=str(scratch),
                n_retries=1,
            )
    images = np.asarray(bunch.data)
    labels = np.asarray(bunch.target)
    train = MEMBERS["train_images"][0]
    pixels = images.astype(np.uint8)
    classes = labels.astype(np.uint8)
    return {
        "train_images": pixels[:train],
        "train_labels": classes[:train],
        "test_images": pixels[train:],
        "test_labels": classes[train:],
    }


@contextmanager
def scratch_folder(folder: Path) -> Any:
    """A temporary folder in `folder`, or in the system's if `folder` is not writable."""
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            scratch = stack.enter_context(new_folder(folder))
        except OSError:
            scratch = stack.enter_context(new_folder(tempfile.gettempdir()))
        yield scratch


@contextmanager
def _socket_timeout(seconds: float) -> Any:
    """Set a socket timeout, so that a network that drops packets does not block for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _copy_openml(source: Source, cache: Path, target: Path) -> None:
    """Copy the files of `cache`, scikit-learn's of OpenML, that belong to a data set."""
    if not cache.is_dir():
        return
    for path in cache.rglob("*"):
        relative = path.relative_to(cache)
        ours = source.openml_name.lower() in str(relative).lower() or any(
            part.split(".")[0] in source.openml_ids for part in relative.parts
        )
        if ours and path.is_file():
            copy = target / relative
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)

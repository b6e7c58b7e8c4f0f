"""MNIST, fetched from OpenML by scikit-learn and kept as one verified file in the data folder."""

from __future__ import annotations

import hashlib
import shutil
import socket
import tempfile
import warnings
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cupybnn import settings
from cupybnn.data.dataset import Dataset
from cupybnn.errors import DataError
from cupybnn.files import atomic_write, new_folder, read_npz

__all__ = ["CACHE_NAME", "load"]

CACHE_NAME = "mnist_784.npz"
#: SHA-256 of all training images, training labels, test images and test labels, in that order,
#: one byte per pixel and label: the content of MNIST's four original files without their headers.
_SHA256 = "06b0d1f124c4e5fa796686ade41a9b778edacc8622f2195a352ef479ad44fc16"
_MEMBERS = {
    "train_images": (60_000, 784),
    "train_labels": (60_000,),
    "test_images": (10_000, 784),
    "test_labels": (10_000,),
}
#: OpenML's IDs of the data set and of its data file.
_OPENML_IDS = ("554", "52667")
_TIMEOUT = 20.0  # seconds that a connection may stall


def load(*, notify: Callable[[str], None] | None = None) -> Dataset:
    """Load MNIST from the data folder, or fetch it and keep it there.

    Parameters
    ----------
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
        path = settings.data_dir() / CACHE_NAME
        settings.scikit_learn_data()
    except ValueError as error:  # an environment variable that is not a folder
        raise DataError(str(error)) from error
    trouble = ""
    if path.exists():
        try:
            return _dataset(_read_cache(path))
        except DataError as error:
            trouble = f"{error} "
            say(f"{error} It will be fetched again.")
    say(f"Fetching MNIST from OpenML with scikit-learn (15 MB, once; it will be kept in {path}).")
    try:
        arrays = _fetch(path.parent)
    except Exception as error:  # whatever urllib, http, json and scikit-learn raise
        raise DataError(
            f"{trouble}MNIST cannot be fetched from OpenML: {_cause(error)}. Looked in "
            f"{path.parent} for {CACHE_NAME} and in {settings.scikit_learn_data()} for "
            f"scikit-learn's copy. Two ways out: give a folder with MNIST's four IDX files as the "
            f"data directory, or take the bundled digits: --dataset digits."
        ) from error
    _check(arrays, "The MNIST from OpenML")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            np.savez(file, allow_pickle=False, **arrays)
    except OSError as error:
        say(f"MNIST could not be kept in {path} ({error.strerror or error}).")
    return _dataset(arrays)


def _cause(error: BaseException) -> str:
    """Summarise the error; urllib wraps the useful one in `reason`."""
    reason = getattr(error, "reason", None)
    text = str(reason if reason is not None else error).strip().rstrip(".")
    return text.splitlines()[0] if text else type(error).__name__


def _read_cache(path: Path) -> dict[str, np.ndarray]:
    try:
        arrays = read_npz(path, tuple(_MEMBERS))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is corrupt: {_cause(error)}.") from error
    if missing := [name for name in _MEMBERS if name not in arrays]:
        raise DataError(f"{path} is corrupt: it has no entry '{missing[0]}'.")
    _check(arrays, str(path))
    return arrays


def _check(arrays: dict[str, np.ndarray], what: str) -> None:
    digest = hashlib.sha256()
    for name, shape in _MEMBERS.items():
        array = arrays[name]
        if array.dtype != np.uint8 or array.shape != shape:
            raise DataError(
                f"{what} is not valid: expected {name} as uint8 {shape}, found "
                f"{array.dtype} {array.shape}."
            )
        digest.update(np.ascontiguousarray(array).data)
    if digest.hexdigest() != _SHA256:
        raise DataError(
            f"{what} is not valid: expected the SHA-256 {_SHA256}, found {digest.hexdigest()}."
        )


def _dataset(arrays: dict[str, np.ndarray]) -> Dataset:
    return Dataset(name="mnist", image_shape=(28, 28), pixel_max=255, **arrays)  # type: ignore[arg-type]


def _fetch(folder: Path) -> dict[str, np.ndarray]:
    """Load MNIST with scikit-learn, in a scratch folder.

    scikit-learn deletes files in its data home that it cannot parse and fetches them again.
    Therefore it gets a copy of the user's MNIST files, never the data home itself.
    """
    from sklearn.datasets import fetch_openml

    with _scratch_folder(folder) as scratch:
        _copy_openml(settings.scikit_learn_data() / "openml", scratch / "openml")
        with warnings.catch_warnings(), _socket_timeout(_TIMEOUT):
            warnings.simplefilter("ignore")  # its retries warn; we report a failure in one message
            bunch: Any = fetch_openml(
                "mnist_784",
                version=1,
                as_frame=False,
                parser="liac-arff",  # "auto" needs pandas
                data_home=str(scratch),
                n_retries=1,
            )
    images = np.asarray(bunch.data)
    labels = np.asarray(bunch.target)
    train = _MEMBERS["train_images"][0]
    pixels = images.astype(np.uint8)
    classes = labels.astype(np.uint8)
    return {
        "train_images": pixels[:train],
        "train_labels": classes[:train],
        "test_images": pixels[train:],
        "test_labels": classes[train:],
    }


@contextmanager
def _scratch_folder(folder: Path) -> Any:
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


def _copy_openml(source: Path, target: Path) -> None:
    """Copy the files of `source`, a scikit-learn OpenML cache, that belong to MNIST."""
    if not source.is_dir():
        return
    for path in source.rglob("*"):
        relative = path.relative_to(source)
        ours = "mnist_784" in str(relative) or any(
            part.split(".")[0] in _OPENML_IDS for part in relative.parts
        )
        if ours and path.is_file():
            copy = target / relative
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)

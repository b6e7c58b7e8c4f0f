"""Data sets by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from cupybnn.data import digits, fashion, idx, mnist
from cupybnn.data.dataset import Dataset
from cupybnn.errors import DataError, SettingError

__all__ = ["DATASETS", "load"]

#: The choices of ``--dataset``.
DATASETS = ("auto", "mnist", "fashion", "digits")


def load(
    name: str = "auto",
    data_dir: str | os.PathLike[str] | None = None,
    *,
    notify: Callable[[str], None] | None = None,
) -> Dataset:
    """Load a data set.

    Parameters
    ----------
    name : {"auto", "mnist", "fashion", "digits"}
        "mnist": the IDX files in `data_dir` if given; otherwise the copy in the data folder
        (``CUPYBNN_DATA_DIR``); otherwise scikit-learn fetches it once from OpenML, and it is kept
        there. "fashion": Fashion-MNIST, likewise; the package dataset-fashion-mnist of Debian and
        Ubuntu is found, too. "digits": scikit-learn's bundled 8×8 digits,
        which need no download. "auto": MNIST if available, otherwise the digits, with the reason in
        ``Dataset.fallback_reason``; with a `data_dir`, the same as "mnist".
    data_dir : path-like, optional
        A folder with the four IDX files of MNIST, or of a data set in the same format such as
        EMNIST, plain or .gz, with any of the usual names; see `cupybnn.data.idx.find_files`.
    notify : callable, optional
        Called with a sentence before a slow operation, and if the files in `data_dir` do not have
        MNIST's size.

    Raises
    ------
    DataError
        If the data are not available, or a file is truncated, corrupt or mislabeled.
    ValueError
        If `name` is unknown, or a `data_dir` is given for "digits".

    Examples
    --------
    >>> from cupybnn import data
    >>> digits = data.load("digits")
    >>> digits.train_images.shape, digits.test_images.shape
    ((1442, 64), (355, 64))
    """
    if name not in DATASETS:
        raise SettingError(f"The 'dataset' must be one of {', '.join(DATASETS)}; got {name!r}.")
    if name == "digits":
        if data_dir is not None:
            raise SettingError(
                f"The dataset 'digits' comes with scikit-learn and reads no data directory; got "
                f"the data directory {os.fspath(data_dir)!r}. Leave out one of the two."
            )
        return digits.load()
    if data_dir is not None:
        read = fashion.load_folder if name == "fashion" else idx.load_folder
        return read(data_dir, notify=notify)
    if name == "fashion":
        return fashion.load(notify=notify)
    try:
        return mnist.load(notify=notify)
    except DataError as error:
        if name == "mnist":
            raise
        return replace(digits.load(), fallback_reason=str(error))

"""MNIST, fetched from OpenML by scikit-learn and kept as one verified file in the data folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from cupybnn.data import openml
from cupybnn.data.dataset import Dataset

__all__ = ["CACHE_NAME", "load"]

CACHE_NAME = "mnist_784.npz"
#: The hash is that of the content of MNIST's four original files without their headers.
SOURCE = openml.Source(
    name="mnist",
    title="MNIST",
    cache_name=CACHE_NAME,
    openml_name="mnist_784",
    openml_ids=("554", "52667"),
    size="15 MB",
    sha256="06b0d1f124c4e5fa796686ade41a9b778edacc8622f2195a352ef479ad44fc16",
)


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
    return openml.load(SOURCE, lambda folder: _fetch(folder), notify=notify)


def _fetch(folder: Path) -> dict[str, np.ndarray]:
    return openml.fetch(SOURCE, folder)

"""The 8×8 digits that come with scikit-learn."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np

from cupybnn.data.dataset import Dataset

__all__ = ["load"]


def load() -> Dataset:
    """Load scikit-learn's 1,797 bundled digits, with a split that never changes.

    Within each class, in file order, every fifth image is a test image: 1,442 training and 355 test
    images, with each class in the same proportion. The split uses no random numbers, so it is the
    same with every library version. The training images are then interleaved over the file, so
    that the last ones are a fair validation set.

    All 13 writers appear in both sets: unlike MNIST's, the test images are by known writers.
    """
    images, labels = _bundled()
    place = np.empty(len(labels), dtype=np.int64)  # index of an image within its class
    for c in range(10):
        members = np.flatnonzero(labels == c)
        place[members] = np.arange(len(members))
    test = place % 5 == 4
    train = np.flatnonzero(~test)
    # Strided order: 0, 7, 14, ... then 1, 8, 15, ...: any range of it spans the whole file.
    train = np.concatenate([train[start::7] for start in range(7)])
    return Dataset(
        name="digits",
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
        image_shape=(8, 8),
        pixel_max=16,
    )


def _bundled() -> tuple[np.ndarray, np.ndarray]:
    """Return pixels (integers from 0 to 16) and labels, uint8.

    They are read from scikit-learn's folder without importing it: the import takes a second, and
    fails while the interpreter shuts down.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is not None and spec.origin is not None:
        file = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            with gzip.open(file, "rt", encoding="ascii") as text:
                table = np.loadtxt(text, np.uint8, delimiter=",")
            return np.ascontiguousarray(table[:, :-1]), table[:, -1].copy()
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.data.astype(np.uint8), bunch.target.astype(np.uint8)

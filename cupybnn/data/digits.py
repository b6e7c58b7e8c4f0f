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

    Within each class, in the order of the file, every fifth image is a test image: 1,442 images
    to train and 355 to test, each class in the same proportion. No random numbers decide the
    split, so it is the same with every version of every library. The training images are then
    interleaved over the file, so that the last ones are a fair validation part.

    The file has the images of 13 writers who are in both parts: unlike MNIST's, the test images
    are by known hands.
    """
    images, labels = _bundled()
    place = np.empty(len(labels), dtype=np.int64)  # of an image among those of its class
    for c in range(10):
        members = np.flatnonzero(labels == c)
        place[members] = np.arange(len(members))
    test = place % 5 == 4
    train = np.flatnonzero(~test)
    # Strided order: 0, 7, 14, ... then 1, 8, 15, ...: any stretch of it spans the whole file.
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
    """Return pixels (whole numbers from 0 to 16) and labels, uint8.

    They are read from scikit-learn's folder without importing scikit-learn: that takes a second,
    and is impossible in an interpreter that is ending.
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

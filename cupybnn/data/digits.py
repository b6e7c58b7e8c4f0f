"""The 8×8 digits that come with scikit-learn."""

from __future__ import annotations

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
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = bunch.data.astype(np.uint8)  # whole numbers from 0 to 16
    labels = bunch.target.astype(np.uint8)
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

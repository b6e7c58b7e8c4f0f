"""A classification data set in host memory, and the one function that loads one by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from cupybnn.errors import DataError, SettingError

__all__ = ["DATASETS", "Dataset", "load"]

#: What ``--dataset`` may be.
DATASETS = ("auto", "mnist", "digits")


@dataclass(frozen=True)
class Dataset:
    """Images and labels, split into a training and a test part.

    Attributes
    ----------
    name : str
        "mnist" or "digits".
    train_images, test_images : ndarray of uint8, shape (images, pixels)
        One flattened image a row.
    train_labels, test_labels : ndarray of uint8, shape (images,)
        The class of each image, from 0 to ``classes - 1``.
    image_shape : tuple of int
        (height, width); their product is the number of pixels.
    pixel_max : int
        The pixel value that means full brightness; a network is fed ``pixel / pixel_max``,
        numbers from 0 to 1.
    classes : int
        Number of classes.
    fallback_reason : str or None
        Set where "auto" could not have MNIST: the reason, for the user to read.
    test_is_validation : bool
        Whether the test part was cut from the training images by `with_validation`.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    image_shape: tuple[int, int]
    pixel_max: int
    classes: int = 10
    fallback_reason: str | None = None
    test_is_validation: bool = False

    def __post_init__(self) -> None:
        pixels = self.image_shape[0] * self.image_shape[1]
        for part in ("train", "test"):
            images = getattr(self, f"{part}_images")
            labels = getattr(self, f"{part}_labels")
            if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != pixels:
                raise ValueError(
                    f"The '{part}_images' of a Dataset must be uint8 of shape (images, {pixels}) "
                    f"for images of {self.image_shape}; got {images.dtype} {images.shape}."
                )
            if labels.dtype != np.uint8 or labels.shape != images.shape[:1]:
                raise ValueError(
                    f"The '{part}_labels' of a Dataset must be uint8, one for each of the "
                    f"{len(images)} images; got {labels.dtype} {labels.shape}."
                )
            if len(labels) == 0 or labels.max() >= self.classes:
                raise ValueError(
                    f"The '{part}_labels' of a Dataset must hold classes from 0 to "
                    f"{self.classes - 1}, at least one image; got "
                    f"{'none' if len(labels) == 0 else int(labels.max())}."
                )

    @property
    def features(self) -> int:
        """Number of pixels in an image."""
        return int(self.train_images.shape[1])

    def with_validation(self, images: int) -> Dataset:
        """Return a data set whose test part is the last `images` training images.

        The real test part is not in the result, so that a choice made on it cannot leak.
        """
        if not 0 < images < len(self.train_images):
            raise SettingError(
                f"The 'validation' must be a number of training images to hold out, from 1 to "
                f"{len(self.train_images) - 1} for {self.name}; got {images}."
            )
        return replace(
            self,
            train_images=self.train_images[:-images],
            train_labels=self.train_labels[:-images],
            test_images=self.train_images[-images:],
            test_labels=self.train_labels[-images:],
            test_is_validation=True,
        )


def load(
    name: str = "auto",
    data_dir: str | os.PathLike[str] | None = None,
    *,
    notify: Callable[[str], None] | None = None,
) -> Dataset:
    """Load a data set.

    Parameters
    ----------
    name : {"auto", "mnist", "digits"}
        "mnist": the IDX files in `data_dir` if one is given; else the copy in the data folder
        (``CUPYBNN_DATA_DIR``); else fetched once by scikit-learn from OpenML and kept there.
        "digits": scikit-learn's bundled 8×8 digits, which need nothing. "auto": MNIST where it
        can be had, else the digits, with the reason in ``Dataset.fallback_reason``; with a
        `data_dir`, the same as "mnist".
    data_dir : path-like, optional
        A folder with MNIST's four IDX files, plain or .gz, of any usual names.
    notify : callable, optional
        Called with a sentence before something that takes long, and where the files in `data_dir`
        are not of MNIST's size.

    Raises
    ------
    DataError
        If the data cannot be had, or a file is truncated, corrupt or mislabelled.
    ValueError
        If `name` is unknown, or a `data_dir` is given for "digits".
    """
    from cupybnn.data import digits, idx, mnist

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
        return idx.load_folder(data_dir, notify=notify)
    try:
        return mnist.load(notify=notify)
    except DataError as error:
        if name == "mnist":
            raise
        return replace(digits.load(), fallback_reason=str(error))

"""A classification data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cupybnn.data import arrays
from cupybnn.errors import SettingError

__all__ = ["Dataset"]


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Labeled examples, split into a training and a test set.

    Use `from_arrays` for your own arrays, `cupybnn.data.load` for data sets by name.

    Attributes
    ----------
    name : str
        For example "mnist" or "digits".
    train_images, test_images : array of uint8, float32 or float64, shape (examples, features)
        One example per row: the pixels of an image, or any other features. In host memory, or
        CuPy arrays on the device that trains. The test set may be empty.
    train_labels, test_labels : ndarray of integers, shape (examples,)
        The class of each example, from 0 to ``classes - 1``. Some classes may not occur.
    image_shape : tuple of int or None
        (height, width), if the features are the pixels of an image, row by row.
    pixel_max : float or None
        The pixel value of full brightness: the network's input is ``pixel / pixel_max``, from 0 to
        1. None for float features, which are used unchanged.
    classes : int
        Number of classes.
    fallback_reason : str or None
        Why "auto" fell back to the digits, as a sentence for the user.
    test_is_validation : bool
        Whether the test set was split off the training examples by `with_validation`.
    class_names : tuple of str or None
        A name for each class; None: they are numbers.
    train_weights : ndarray of float64, shape (examples,), or None
        How often each training example occurs in an epoch, on average, compared with the others:
        see `cupybnn.data.BatchOrder`. None: all alike.

    Raises
    ------
    ValueError
        If arrays, shapes and classes are inconsistent, or a feature is NaN or infinite.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn.data import Dataset
    >>> images, labels = np.zeros((20, 16), np.uint8), np.arange(20, dtype=np.uint8) % 10
    >>> Dataset("blank", images[:15], labels[:15], images[15:], labels[15:], (4, 4), 255).features
    16
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    image_shape: tuple[int, int] | None
    pixel_max: float | None
    classes: int = 10
    fallback_reason: str | None = None
    test_is_validation: bool = False
    class_names: tuple[str, ...] | None = None
    train_weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.class_names is not None and len(self.class_names) != self.classes:
            raise ValueError(
                f"The 'class_names' of a Dataset must be one for each of its {self.classes} "
                f"classes; got {len(self.class_names)}."
            )
        for name, count in Counter(self.class_names or ()).items():
            if count > 1:
                raise ValueError(
                    f"The 'class_names' of a Dataset must be different names; got {name!r} more "
                    f"than once."
                )
        if self.pixel_max is not None and not 0 < self.pixel_max < float("inf"):
            raise ValueError(
                f"The 'pixel_max' of a Dataset must be None or a positive number; got "
                f"{self.pixel_max!r}."
            )
        train = self.train_images
        features = train.shape[1] if train.ndim == 2 else 0
        if self.image_shape is not None:
            features = self.image_shape[0] * self.image_shape[1]
        for part in ("train", "test"):
            images = getattr(self, f"{part}_images")
            labels = getattr(self, f"{part}_labels")
            kinds = ("float32", "float64") if self.pixel_max is None else ("uint8",)
            if images.dtype.name not in kinds or images.ndim != 2 or images.shape[1] != features:
                what = f" for images of {self.image_shape}" if self.image_shape else ""
                raise ValueError(
                    f"The '{part}_images' of a Dataset must be {' or '.join(kinds)} of shape "
                    f"(images, {features}){what}; got {images.dtype} {images.shape}."
                )
            if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
                raise ValueError(
                    f"The '{part}_labels' of a Dataset must be integers, one for each of the "
                    f"{len(images)} images; got {labels.dtype} {labels.shape}."
                )
            if len(labels) == 0 and part == "test":
                continue
            if images.size == 0 or labels.min() < 0 or labels.max() >= self.classes:
                wrong = labels[(labels < 0) | (labels >= self.classes)]
                raise ValueError(
                    f"The '{part}_labels' of a Dataset must hold classes from 0 to "
                    f"{self.classes - 1}, at least one image; got "
                    f"{int(wrong[0]) if len(wrong) else 'none'}."
                )
            arrays.check_finite(f"'{part}_images' of a Dataset", images)
        if self.train_weights is not None:
            arrays.check_weights("train_weights", self.train_weights, len(self.train_labels))

    @classmethod
    def from_arrays(
        cls,
        train_x: Any,
        train_y: Any,
        test_x: Any = None,
        test_y: Any = None,
        classes: int | None = None,
        name: str = "arrays",
        *,
        pixel_max: float = 255,
        weights: Any = None,
        class_names: Iterable[str] | None = None,
    ) -> Dataset:
        """Make a data set from arrays.

        Parameters
        ----------
        train_x : array_like, shape (examples, ...)
            Features, as a NumPy or CuPy array or anything that NumPy converts; they are flattened.
            With shape (examples, height, width) they are images, which training can deform. uint8
            features are pixels, see `pixel_max`. float32 and float64 features keep their dtype,
            without a copy if contiguous; all other numbers become float32.
        train_y : array_like of integers, shape (examples,)
            Class of each example, from 0. Classes that never occur still get an output: labels
            from 1 to 26 give 27 classes.
        test_x, test_y : array_like, optional
            The test set. Without it, hold out training examples with `with_validation` or the
            setting ``validation``.
        classes : int, optional
            Number of classes; by default, the largest label of both sets plus 1.
        name : str
            Name of the data set, stored in checkpoints: a run must be restored with data of the
            same name.
        pixel_max : float
            Divisor of uint8 features.
        weights : array_like of numbers, shape (examples,), optional
            Weights of the training examples, at least 0 and not all 0. An example of weight 2 is
            trained on as two copies of it would be; see `cupybnn.data.BatchOrder`.
        class_names : iterable of str, optional
            A name for each class, in their order: reports and packed networks use them.

        Returns
        -------
        Dataset

        Raises
        ------
        TypeError
            If the features are not real numbers or the labels are not integers.
        ValueError
            If shapes do not match, a set is empty, a label is out of range, or a feature or weight
            is NaN or infinite.

        Examples
        --------
        >>> import numpy as np
        >>> from cupybnn import TrainConfig, Trainer
        >>> from cupybnn.data import Dataset
        >>> rng = np.random.default_rng(0)
        >>> x = rng.standard_normal((1000, 8))
        >>> y = (x[:, 0] > 0).astype(int) + (x[:, 1] > 0)
        >>> data = Dataset.from_arrays(x[:800], y[:800], x[800:], y[800:])
        >>> data
        Dataset('arrays', train=800, test=200, shape=(8,), dtype=float64, classes=3)
        >>> config = TrainConfig(n_hidden=32, reg=0.0, max_steps=300, device="cpu")
        >>> Trainer(config, data=data).run().final_accuracy > 0.85
        True
        """
        if (test_x is None) != (test_y is None):
            given, missing = ("test_y", "test_x") if test_x is None else ("test_x", "test_y")
            raise ValueError(
                f"The 'test_x' and 'test_y' of from_arrays must be given together; got {given!r} "
                f"without {missing!r}."
            )
        x = arrays.features("train_x", train_x)
        y = arrays.labels("train_y", train_y, len(x))
        if test_x is None:
            other, other_y = x[:0], y[:0]
        else:
            other = arrays.features("test_x", test_x)
            other_y = arrays.labels("test_y", test_y, len(other))
            if other.shape[1:] != x.shape[1:] or (other.dtype == np.uint8) != (x.dtype == np.uint8):
                raise ValueError(
                    f"The 'test_x' of from_arrays must be examples like those of 'train_x', "
                    f"{x.dtype} of shape {x.shape[1:]}; got {other.dtype} of shape "
                    f"{other.shape[1:]}."
                )
        names = None if class_names is None else tuple(map(str, class_names))
        if classes is None and names is not None:
            classes = len(names)
        count = arrays.count_classes(classes, {"train_y": y, "test_y": other_y})
        return cls(
            name=name,
            train_images=x.reshape(len(x), -1),
            train_labels=y,
            test_images=other.reshape(len(other), int(np.prod(x.shape[1:]))),
            test_labels=other_y,
            image_shape=(x.shape[1], x.shape[2]) if x.ndim == 3 else None,
            pixel_max=float(pixel_max) if x.dtype == np.uint8 else None,
            classes=count,
            class_names=names,
            train_weights=None if weights is None else arrays.weights("weights", weights, len(x)),
        )

    def __repr__(self) -> str:
        test = "validation" if self.test_is_validation else "test"
        fallback = ", instead of MNIST" if self.fallback_reason else ""
        return (
            f"Dataset({self.name!r}, train={len(self.train_labels)}, {test}="
            f"{len(self.test_labels)}, shape={self.image_shape or (self.features,)}, "
            f"dtype={self.train_images.dtype}, classes={self.classes}{fallback})"
        )

    @property
    def features(self) -> int:
        """Number of features per example, such as the pixels of an image."""
        return int(self.train_images.shape[1])

    def with_validation(self, images: int) -> Dataset:
        """Return a data set whose test set is the last `images` training images.

        The real test set is dropped, so that nothing chosen on the result can leak from it. Shuffle
        sorted examples (by class, for example) first.
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
            train_weights=None if self.train_weights is None else self.train_weights[:-images],
        )

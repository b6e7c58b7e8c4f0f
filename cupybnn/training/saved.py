"""Loading trained models from run folders, without their data set."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from cupybnn import nn
from cupybnn.backends.devices import CPU, device_of, resolve, to_device
from cupybnn.data import Dataset
from cupybnn.errors import CheckpointError, SettingError
from cupybnn.paths import user_path
from cupybnn.training import checkpoint as checkpoints
from cupybnn.training.network import build_network
from cupybnn.training.restore import stored_config
from cupybnn.training.state import part

__all__ = ["DataDescription", "load_model"]

_WHICH = {"newest": checkpoints.NEWEST, "best": checkpoints.BEST}


@dataclass(frozen=True)
class DataDescription:
    """A checkpoint's description of the images that its model was trained on.

    Attributes
    ----------
    name : str
    features, classes : int
    image_shape : tuple of int or None
        (height, width).
    pixel_max : float or None
        The network's inputs are ``pixel / pixel_max``.
    train_images, test_images : int or None
        Number of images.
    sha256 : str or None
        Hash of all images, labels and weights.
    class_names : tuple of str or None

    Examples
    --------
    >>> import cupybnn
    >>> result = cupybnn.train(
    ...     dataset="digits", binary=True, n_hidden=32, max_steps=5, log_dir="runs"
    ... )
    >>> cupybnn.load_model(result.run_folder).trained_on.classes
    10
    """

    name: str
    features: int
    classes: int
    image_shape: tuple[int, ...] | None = None
    pixel_max: float | None = None
    train_images: int | None = None
    test_images: int | None = None
    sha256: str | None = None
    class_names: tuple[str, ...] | None = None

    @classmethod
    def of(cls, dataset: Dataset, *, hashed: bool = True) -> DataDescription:
        """Describe a data set; the hash reads all of it."""
        digest = hashlib.sha256()
        for split in ("train", "test") if hashed else ():
            for kind in ("images", "labels"):
                array = to_device(getattr(dataset, f"{split}_{kind}"), CPU)
                digest.update(np.ascontiguousarray(array).data)
        if hashed and dataset.train_weights is not None:
            digest.update(np.ascontiguousarray(dataset.train_weights).data)
        shape = getattr(dataset, "image_shape", None)
        return cls(
            name=dataset.name,
            features=dataset.features,
            classes=dataset.classes,
            image_shape=None if shape is None else tuple(shape),
            pixel_max=getattr(dataset, "pixel_max", None),
            train_images=len(dataset.train_labels),
            test_images=len(dataset.test_labels),
            sha256=digest.hexdigest() if hashed else None,
            class_names=dataset.class_names,
        )

    @classmethod
    def stored(cls, checkpoint: checkpoints.Checkpoint) -> DataDescription:
        """Read a checkpoint's description; for an old checkpoint, infer it from the arrays.

        Raises
        ------
        CheckpointError
            If neither is possible.
        """
        found = checkpoint.info.get("data")
        try:
            if found is None:
                return cls(
                    name=checkpoint.info["dataset"],
                    features=checkpoint.arrays["model/fc1.weight"].shape[0],
                    classes=checkpoint.arrays["model/fcout.weight"].shape[1],
                )
            known = {field.name for field in fields(cls)}
            settings = {name: value for name, value in found.items() if name in known}
            for name in ("image_shape", "class_names"):
                if settings.get(name) is not None:
                    settings[name] = tuple(settings[name])
            return cls(**settings)
        except (AttributeError, KeyError, IndexError, TypeError) as error:
            raise CheckpointError(
                f"The checkpoint does not say what its model was trained on: {error!r}."
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary that JSON can hold."""
        return asdict(self)

    def difference(self, now: DataDescription) -> str | None:
        """Return a sentence if a run continues with different images; None if not, or unknown."""
        if self.sha256 is None or self.sha256 == now.sha256:
            return None
        what = "as many images, but different ones"
        before = (self.train_images, self.test_images)
        if before != (now.train_images, now.test_images):
            what = f"{now.train_images:,} training and {now.test_images:,} test images"
        return (
            f"The images differ from the checkpoint's {self.train_images:,} training and "
            f"{self.test_images:,} test images of {self.name}: this run has {what}. Its results "
            f"will differ from those of an uninterrupted run."
        )

    def scale(self, images: Any) -> np.ndarray:
        """Return pixels as network inputs: float32, shape (images, features).

        Parameters
        ----------
        images : array_like, shape (images, ...)
            Raw pixels, from 0 to `pixel_max`.

        Raises
        ------
        ValueError
            If an image does not have `features` pixels.
        """
        pixels = np.asarray(images)
        if pixels.ndim < 2 or np.prod(pixels.shape[1:], dtype=int) != self.features:
            raise ValueError(
                f"The 'images' must be an array of images with {self.features} pixels each; got "
                f"shape {pixels.shape}."
            )
        flat = pixels.reshape(len(pixels), self.features).astype(np.float32)
        return flat if self.pixel_max is None else flat / np.float32(self.pixel_max)


def load_model(
    run: str | os.PathLike[str],
    *,
    which: str = "newest",
    device: str = "auto",
    model: nn.Module | None = None,
) -> nn.Module:
    """Load a trained model, without the data that it was trained on.

    Parameters
    ----------
    run : path-like
        A run folder, or a checkpoint file.
    which : {"newest", "best"}
        Which checkpoint of a folder: the last one, or the one with the best accuracy on the
        validation images; on the test images in a run without ``validation``.
    device : str
        "auto", "cpu", "cuda" or "cuda:N".
    model : Module, optional
        The weights are loaded into it: for a run whose model was given to ``Trainer(model=...)``,
        one made in the same way. By default the network that the run's settings describe is built.

    Returns
    -------
    Module
        `model`, where it is given. In evaluation mode, with averaged weights if the run averaged.
        Its attribute `trained_on` is a `DataDescription`, which scales images as the model wants
        them.

    Raises
    ------
    CheckpointError
        If there is no such checkpoint, it cannot be read or does not fit the model, or the run
        trained a model of its own and `model` is not given.
    DeviceError
        If the device cannot be used.
    TypeError
        If `model` is no Module.

    Examples
    --------
    >>> import tempfile
    >>> import cupybnn
    >>> from cupybnn.autograd import Tensor
    >>> folder = tempfile.TemporaryDirectory()
    >>> settings = {"dataset": "digits", "binary": True, "max_steps": 10, "device": "cpu"}
    >>> result = cupybnn.train(**settings, log_dir=folder.name)
    >>> model = cupybnn.load_model(result.run_folder, device="cpu")
    >>> images = model.trained_on.scale([[8] * 64, [16] * 64])
    >>> model(Tensor(images)).shape
    (2, 10)
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"The 'model' must be an nn.Module; got {type(model).__name__}.")
    target = resolve(device)
    stored = checkpoints.load(checkpoint_file(run, which))
    config = stored_config(stored.info)
    description = DataDescription.stored(stored)
    fits = "the given model" if model is not None else "its network"
    if model is None:
        if stored.info.get("given_model"):
            raise CheckpointError(
                f"The run {run} trained a model that was given to Trainer(model=...), which its "
                f"checkpoint cannot build. Make the same model and pass it: "
                f"load_model(run, model=my_model)."
            )
        model = build_network(config, description.features, description.classes)
    try:
        model.load_state_dict(part(stored.arrays, "model/"))
        _load_averages(model, stored.arrays)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"The checkpoint {run} does not fit {fits}: {error}") from error
    model.to(target)
    model.eval()
    object.__setattr__(model, "trained_on", description)
    return model


def checkpoint_file(run: str | os.PathLike[str], which: str) -> Path:
    """Return the file of a run's newest or best checkpoint; `run` may be the file itself.

    Raises
    ------
    CheckpointError
        If there is none.
    SettingError
        If `which` is neither "newest" nor "best".
    """
    if which not in _WHICH:
        raise SettingError(f"The 'which' must be one of {', '.join(_WHICH)}; got {which!r}.")
    path = user_path(run)
    if path.is_dir() and which == "best":
        path = path / _WHICH[which]
    return checkpoints.find(path)


def _load_averages(model: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Load averaged weights and their statistics into a model, if there are any.

    Checkpoints of earlier versions have averages without statistics; a model with batch norm then
    keeps its training weights.
    """
    average, statistics = part(arrays, "average/"), part(arrays, "averaged/")
    buffers = dict(model.named_buffers())
    if int(average.get("updates", 0)) == 0 or buffers.keys() != statistics.keys():
        return
    for i, parameter in enumerate(model.parameters()):
        array = parameter.write()
        array[...] = to_device(average[str(i)], device_of(array))
    for name, buffer in buffers.items():
        buffer[...] = statistics[name]

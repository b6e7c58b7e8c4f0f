"""IDX, MNIST's file format: finds, reads and validates a folder of four files.

An IDX file (http://yann.lecun.com/exdb/mnist, "file formats") is a big-endian header, two zero
bytes, a type code (8: unsigned byte), the number of dimensions, each dimension as 32 bits, and
then the elements, last dimension fastest.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cupybnn.data.dataset import Dataset
from cupybnn.errors import DataError
from cupybnn.paths import user_path

__all__ = ["find_files", "load_folder", "read_idx", "read_idx_stream"]

_UNSIGNED_BYTE = 8
_CLASSES = 10
#: EMNIST's data sets, which have their own file names, and their classes. Letters are numbered from
#: 1, so that class 0 never occurs.
_EMNIST = {"balanced": 47, "byclass": 62, "bymerge": 47, "digits": 10, "letters": 27, "mnist": 10}
#: The size of MNIST, and of Fashion-MNIST: training and test images, and their shape.
_MNIST_IMAGES = (60_000, 10_000)
_MNIST_SHAPE = (28, 28)
#: Subfolders that other programs use for the files.
_SUBFOLDERS = ("", "raw", "MNIST/raw", "mnist", "MNIST", "EMNIST/raw", "emnist", "gzip")
_NAME = re.compile(
    rf"(?:emnist[-_.](?P<emnist>{'|'.join(_EMNIST)})[-_.])?"
    r"(?P<part>train|t10k|test)[-_.]?(?P<kind>images|labels)"
    r"(?:[-_.]?idx[13])?(?:[-_.]?ubyte)?(?:\.idx[13]?)?(?:\.gz)?",
    re.IGNORECASE,
)
_ROLES = ("train images", "train labels", "test images", "test labels")


def find_files(folder: str | os.PathLike[str], *, title: str = "MNIST") -> dict[str, Path]:
    """Find the four files of MNIST, or of a data set in the same format, in `folder`.

    Accepted names: train or t10k or test, images or labels, with or without ``idx3``/``idx1`` and
    ``ubyte``, joined by ``-``, ``_`` or ``.``, with or without ``.gz``; optionally preceded by
    ``emnist`` and an EMNIST data set, such as ``emnist-letters-train-images-idx3-ubyte.gz``. The
    subfolders ``raw``, ``MNIST/raw``, ``mnist``, ``MNIST``, ``EMNIST/raw``, ``emnist`` and ``gzip``
    are searched too, and a file may be in its own folder of such a name. Plain files take
    precedence over .gz files, and MNIST's names over EMNIST's.

    Parameters
    ----------
    folder : path-like
    title : str
        The name of the data set in messages: "MNIST", or one whose files have the same names.

    Returns
    -------
    dict
        Paths by "train images", "train labels", "test images", "test labels".

    Raises
    ------
    DataError
        If the folder or one of the files is missing, or there are several EMNIST data sets.
    """
    try:
        root = user_path(folder)
    except ValueError as error:
        raise DataError(f"The data directory cannot be used: {error}") from error
    if not root.is_dir():
        if not root.exists():
            raise DataError(f"The data directory {root} does not exist.")
        raise DataError(
            f"The data directory {root} is a file, not a folder. Name the folder of {title}'s four "
            f"IDX files. Data of another form, such as .npz or CSV, is passed in Python: "
            f"cupybnn.data.Dataset.from_arrays."
        )
    try:
        sets = [paths for name in _SUBFOLDERS for paths in _data_sets(root / name).values()]
        there = sorted(p.name for p in root.iterdir())
    except OSError as error:
        raise DataError(
            f"The data directory {root} cannot be read: {error.strerror or error}."
        ) from error
    found = max(sets, key=lambda paths: (len(paths), _name_of(paths) == "mnist"))
    names = sorted({_name_of(paths) for paths in sets if len(paths) == len(_ROLES)})
    if len(names) > 1 and "mnist" not in names:
        raise DataError(
            f"The data directory {root} must hold the files of one data set; it holds those of "
            f"{', '.join(names)}. Put the four files of one of them into a separate folder."
        )
    missing = [role for role in _ROLES if role not in found]
    if missing:
        listing = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "") if there else "nothing"
        folders = [n for n in there if _NAME.fullmatch(n) and (root / n).is_dir()]
        hint = f" A file is needed, but {folders[0]} is a folder without one." if folders else ""
        raise DataError(
            f"The data directory {root} must hold {title}'s four IDX files, such as "
            f"train-images-idx3-ubyte or train-images-idx3-ubyte.gz; missing: "
            f"{', '.join(missing)}. It holds: {listing}.{hint}"
        )
    return found


def _data_sets(folder: Path) -> dict[str, dict[str, Path]]:
    """Return the paths in `folder` by role, for each data set that has a file there."""
    sets: dict[str, dict[str, Path]] = {"mnist": {}}  # first, so that it takes precedence
    if not folder.is_dir():
        return sets
    named = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    files = [path for path in named if path.is_file()]
    # Some archives have each file in a folder of the same name.
    inner = [p for path in named if path.is_dir() for p in path.iterdir() if p.is_file()]
    for group in (files, inner):
        for path in sorted(group, key=lambda p: (p.suffix.lower() == ".gz", p.name)):
            if match := _NAME.fullmatch(path.name):
                part = "train" if match["part"].lower() == "train" else "test"
                role = f"{part} {match['kind'].lower()}"
                sets.setdefault(_name_of({role: path}), {}).setdefault(role, path)
    return sets


def _name_of(paths: dict[str, Path]) -> str:
    """Return the data set that files belong to: "mnist", or one such as "emnist-letters"."""
    match = _NAME.fullmatch(next(iter(paths.values())).name) if paths else None
    return f"emnist-{match['emnist'].lower()}" if match and match["emnist"] else "mnist"


def read_idx(path: str | os.PathLike[str], dimensions: int) -> np.ndarray:
    """Read one IDX file of unsigned bytes; gzip is detected by content, not by name.

    Parameters
    ----------
    path : path-like
    dimensions : int
        Number of dimensions that the file must have: 3 for images, 1 for labels.

    Returns
    -------
    ndarray of uint8, of the shape in the header

    Raises
    ------
    DataError
        If the file is not IDX of that kind, or shorter or longer than its header says; the message
        names the file, what was expected and what was found.
    """
    path = Path(path)
    try:
        with open(path, "rb") as raw:
            return read_idx_stream(raw, dimensions, path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_idx_stream(raw: Any, dimensions: int, path: str | os.PathLike[str]) -> np.ndarray:
    """Read an IDX file that is open, for `read_idx`; `path` is its name in messages."""
    kind = {1: "labels", 3: "images"}.get(dimensions, f"{dimensions}-dimensional data")
    try:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream: io.BufferedIOBase = gzip.GzipFile(fileobj=raw) if zipped else raw
        length = 4 + 4 * dimensions
        header, _ = _read(stream, length)
        magic, expected = int.from_bytes(header[:4], "big"), (_UNSIGNED_BYTE << 8) | dimensions
        if len(header) >= 4 and magic != expected:
            of_kinds = {0x801: " (a file of labels)", 0x803: " (a file of images)"}
            raise DataError(
                f"{path} is not an IDX file of {kind}: expected the magic number "
                f"0x{expected:08x}, found 0x{magic:08x}{of_kinds.get(magic, '')}."
            )
        if len(header) < length:
            raise DataError(
                f"{path} is truncated: expected a header of {length} bytes, found {len(header)}."
            )
        shape = struct.unpack_from(f">{dimensions}I", header, 4)
        size = math.prod(shape)
        # Reading one byte past the expected end detects extra data, and makes gzip verify its
        # checksum, which it does at the end of the stream.
        data, cut_off = _read(stream, size + 1)
        if zipped and len(data) > size:
            # A damaged stream may yield extra bytes: read on, so that its checksum fails.
            _read(stream, size + (1 << 20))
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is corrupt: {error}. Fetch it again.") from error
    elements = f"{size:,} bytes for {' × '.join(map(str, shape))} {kind}"
    if len(data) != size:
        found = f"{len(data):,}" if len(data) < size else "more"
        wrong = "truncated" if len(data) < size else "longer than its header says"
        raise DataError(f"{path} is {wrong}: expected {elements}, found {found}.")
    if cut_off:
        raise DataError(
            f"{path} is truncated: expected a checksum after the {elements}, found the end of the "
            f"file. Fetch it again."
        )
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _read(stream: io.BufferedIOBase, size: int) -> tuple[bytes, bool]:
    """Read up to `size` bytes; also return whether a gzip stream was cut off."""
    chunks: list[bytes] = []
    left = size
    while left > 0:
        try:
            # One raw read at a time: a longer read would lose the data before an early end.
            chunk = stream.read1(min(left, 1 << 20))
        except EOFError:
            return b"".join(chunks), True
        if not chunk:
            break
        chunks.append(chunk)
        left -= len(chunk)
    return b"".join(chunks), False


def load_folder(
    folder: str | os.PathLike[str],
    *,
    title: str = "MNIST",
    notify: Callable[[str], None] | None = None,
) -> Dataset:
    """Read the four IDX files in `folder` as a `Dataset`.

    Parameters
    ----------
    folder : path-like
    title : str
        The data set that these files should be, in messages: "MNIST", or one of its size whose
        files have the same names.
    notify : callable, optional
        Called with a sentence if the data do not have MNIST's size: a subset or another data set
        is allowed, but may be a mistake.

    Raises
    ------
    DataError
        If a file is missing, truncated, corrupt or mislabeled, if the numbers of images
        and labels differ, if training and test images differ in size, or if a label is out of
        range.
    """
    paths = find_files(folder, title=title)
    name = _name_of(paths)
    classes = _EMNIST.get(name.removeprefix("emnist-"), _CLASSES)
    arrays = {role: read_idx(path, 3 if "images" in role else 1) for role, path in paths.items()}
    for part in ("train", "test"):
        images, labels = arrays[f"{part} images"], arrays[f"{part} labels"]
        image_path, label_path = paths[f"{part} images"], paths[f"{part} labels"]
        if len(images) != len(labels):
            raise DataError(
                f"{label_path} does not belong to {image_path}: expected {len(images):,} labels, "
                f"one per image, found {len(labels):,}."
            )
        if images.size == 0:
            raise DataError(
                f"{image_path} is empty: expected at least one image of one pixel, found "
                f"{' × '.join(map(str, images.shape))}."
            )
        if labels.max() >= classes:
            first = int(np.argmax(labels >= classes))
            raise DataError(
                f"{label_path} is mislabeled: expected labels from 0 to {classes - 1}, found "
                f"{int(labels[first])} for image {first}."
            )
    train, test = arrays["train images"], arrays["test images"]
    if train.shape[1:] != test.shape[1:]:
        raise DataError(
            f"{paths['test images']} does not belong to {paths['train images']}: expected images "
            f"of {train.shape[1]}×{train.shape[2]} pixels, found {test.shape[1]}×{test.shape[2]}."
        )
    if name != "mnist":
        train, test = train.transpose(0, 2, 1), test.transpose(0, 2, 1)
    data = Dataset(
        name=name,
        train_images=train.reshape(len(train), -1),
        train_labels=arrays["train labels"],
        test_images=test.reshape(len(test), -1),
        test_labels=arrays["test labels"],
        image_shape=(train.shape[1], train.shape[2]),
        pixel_max=255,
        classes=classes,
    )
    sentence = _size_difference(data, folder, title)
    if name != "mnist":
        sentence = (
            f"The files in {os.fspath(folder)} are {name}: {classes} classes, and images with rows "
            f"and columns swapped, which are transposed back."
        )
    if notify is not None and sentence:
        notify(sentence)
    return data


def _size_difference(data: Dataset, folder: str | os.PathLike[str], title: str) -> str | None:
    """Describe how the size of `data` differs from that of `title`; None if it does not."""
    train, test = len(data.train_labels), len(data.test_labels)
    classes = len(np.unique(data.train_labels))
    if (train, test, data.image_shape, classes) == (*_MNIST_IMAGES, _MNIST_SHAPE, _CLASSES):
        return None
    found, expected = "", ""
    if classes != _CLASSES:
        found, expected = f" in {classes} classes", f" in {_CLASSES} classes"
    assert data.image_shape is not None
    (height, width), (mnist_height, mnist_width) = data.image_shape, _MNIST_SHAPE
    sentence = (
        f"The data in {os.fspath(folder)} are not of {title}'s size: found {train:,} training and "
        f"{test:,} test images of {height}×{width} pixels{found}; {title} has {_MNIST_IMAGES[0]:,} "
        f"and {_MNIST_IMAGES[1]:,} of {mnist_height}×{mnist_width}{expected}."
    )
    if train < test:
        sentence += (
            " There are fewer training than test images: the names of the train and t10k files may "
            "have been swapped."
        )
    return sentence

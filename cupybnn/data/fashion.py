"""Fashion-MNIST: pictures of clothes, of MNIST's form; fetched and kept like MNIST.

Xiao, Rasul, Vollgraf: Fashion-MNIST: a novel image dataset for benchmarking machine learning
algorithms, arXiv 1708.07747.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from cupybnn.data import idx, openml
from cupybnn.data.dataset import Dataset
from cupybnn.errors import DataError

__all__ = ["CLASS_NAMES", "PACKAGE_FOLDER", "SOURCE", "load", "load_folder"]

#: Where the package dataset-fashion-mnist of Debian and Ubuntu puts the four files.
PACKAGE_FOLDER = "/usr/share/datasets/fashion-mnist"

#: As its authors list them.
CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
SOURCE = openml.Source(
    name="fashion",
    title="Fashion-MNIST",
    cache_name="fashion_mnist.npz",
    openml_name="Fashion-MNIST",
    openml_ids=("40996", "18238735"),
    size="30 MB",
    balanced=True,
    class_names=CLASS_NAMES,
    package="dataset-fashion-mnist",
)


def load(*, notify: Callable[[str], None] | None = None) -> Dataset:
    """Load Fashion-MNIST from the data folder or from `PACKAGE_FOLDER`, or fetch and keep it.

    Parameters
    ----------
    notify : callable, optional
        Called with a sentence before the fetch, and if the files of the package are not valid.

    Raises
    ------
    DataError
        As for `cupybnn.data.mnist.load`.
    """
    if os.path.isdir(PACKAGE_FOLDER) and not openml.is_kept(SOURCE):
        try:
            data = load_folder(PACKAGE_FOLDER)
            openml.check(
                SOURCE, {name: getattr(data, name) for name in openml.MEMBERS}, PACKAGE_FOLDER
            )
            return data
        except DataError as error:
            if notify is not None:
                notify(str(error))
    return openml.load(SOURCE, lambda folder: openml.fetch(SOURCE, folder), notify=notify)


def load_folder(
    folder: str | os.PathLike[str], *, notify: Callable[[str], None] | None = None
) -> Dataset:
    """Read Fashion-MNIST's four IDX files, whose names are those of MNIST's.

    Parameters
    ----------
    folder, notify
        As for `cupybnn.data.idx.load_folder`.

    Raises
    ------
    DataError
        As for `cupybnn.data.idx.load_folder`, and if the files are EMNIST's.
    """
    data = idx.load_folder(folder, title=SOURCE.title, notify=notify)
    if data.name != "mnist":
        raise DataError(
            f"The folder of the dataset 'fashion' must hold Fashion-MNIST's four IDX files, named "
            f"like MNIST's; {os.fspath(folder)} has those of {data.name}. Leave out --dataset "
            f"fashion, or name another folder."
        )
    return replace(data, name="fashion", class_names=CLASS_NAMES)

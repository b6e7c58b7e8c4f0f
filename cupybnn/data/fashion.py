"""Fashion-MNIST: pictures of clothes, of MNIST's form; fetched and kept like MNIST.

Xiao, Rasul, Vollgraf: Fashion-MNIST: a novel image dataset for benchmarking machine learning
algorithms, arXiv 1708.07747.
"""

from __future__ import annotations

from collections.abc import Callable

from cupybnn.data import openml
from cupybnn.data.dataset import Dataset

__all__ = ["CLASS_NAMES", "SOURCE", "load"]

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
)


def load(*, notify: Callable[[str], None] | None = None) -> Dataset:
    """Load Fashion-MNIST from the data folder, or fetch it and keep it there.

    Parameters
    ----------
    notify : callable, optional
        Called with a sentence before the fetch.

    Raises
    ------
    DataError
        As for `cupybnn.data.mnist.load`.
    """
    return openml.load(SOURCE, lambda folder: openml.fetch(SOURCE, folder), notify=notify)

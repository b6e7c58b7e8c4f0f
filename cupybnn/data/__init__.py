"""Data sets and batches: MNIST, IDX folders, the bundled digits, any arrays; deformed images."""

from cupybnn.data.augmentation import Augmentation
from cupybnn.data.batches import BatchOrder, DeviceData
from cupybnn.data.dataset import Dataset
from cupybnn.data.loading import DATASETS, load
from cupybnn.data.mixing import Mixing
from cupybnn.data.neighbors import NeighborNoise, nearest_neighbors

__all__ = [
    "DATASETS",
    "Augmentation",
    "BatchOrder",
    "Dataset",
    "DeviceData",
    "Mixing",
    "NeighborNoise",
    "load",
    "nearest_neighbors",
]

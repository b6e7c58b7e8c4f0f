"""Data sets and batches: MNIST, IDX folders, the bundled digits; deformed images."""

from cupybnn.data.augmentation import Augmentation
from cupybnn.data.batches import BatchOrder, DeviceData
from cupybnn.data.dataset import DATASETS, Dataset, load

__all__ = ["DATASETS", "Augmentation", "BatchOrder", "Dataset", "DeviceData", "load"]

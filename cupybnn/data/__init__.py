"""Data sets and batches: MNIST, IDX folders, the bundled digits."""

from cupybnn.data.batches import BatchOrder, DeviceData
from cupybnn.data.dataset import DATASETS, Dataset, load

__all__ = ["DATASETS", "BatchOrder", "Dataset", "DeviceData", "load"]

"""Trained networks in use: packed, predicted with, evaluated, exported."""

from cupybnn.deploy.evaluation import ClassificationReport
from cupybnn.deploy.network import PackedNetwork
from cupybnn.deploy.opening import open_network
from cupybnn.deploy.reading import read_image

__all__ = ["ClassificationReport", "PackedNetwork", "open_network", "read_image"]

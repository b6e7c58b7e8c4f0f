"""Trained networks in use: packed, predicted with, exported."""

from cupybnn.deploy.network import PackedNetwork

__all__ = ["PackedNetwork"]

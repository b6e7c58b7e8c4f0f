"""Our own predictions: ``net(x)``, as a user calls it."""

from __future__ import annotations

import numpy as np

from cupybnn.backends.devices import Device
from cupybnn.benchmark.inference.network import Network
from cupybnn.benchmark.inference.variants import Calls, Variant
from cupybnn.deploy import PackedNetwork

__all__ = ["variants"]


def variants(device: Device) -> list[Variant]:
    """Return what is measured of this library."""
    return [Variant("cupybnn", "net(x)", "float32 ends", _make)]


def _make(variant: Variant, network: Network, x: np.ndarray, device: Device) -> Calls:
    net = PackedNetwork.from_model(network.model()).to(device)
    there = device.xp.asarray(x)
    return Calls(lambda: net(there), lambda y: y.get() if device.kind == "cuda" else y)

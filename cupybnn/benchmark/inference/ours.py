"""Our own predictions: ``net(x)``, as a user calls it."""

from __future__ import annotations

import numpy as np

from cupybnn.backends.devices import Device
from cupybnn.benchmark.inference.network import PIXEL_MAX, Network
from cupybnn.benchmark.inference.variants import Calls, Variant
from cupybnn.deploy import PackedNetwork

__all__ = ["variants"]


def variants(device: Device) -> list[Variant]:
    """Return what is measured of this library."""
    found = [Variant("cupybnn", "net(x)", "float32 ends", _make)]
    if device.kind == "cuda":
        found.append(Variant("cupybnn", "net(x)", "binary first", _make, binary_first=True))
    return found


def _make(variant: Variant, network: Network, x: np.ndarray, device: Device) -> Calls:
    made = vars(network)  # of this network and no other: batches of all sizes share it
    net = made.get("packed")
    if net is None or net.device != device:
        net = made["packed"] = PackedNetwork.from_model(network.model, pixel_max=PIXEL_MAX).to(
            device
        )
    there = device.xp.asarray(x)
    return Calls(lambda: net(there), lambda y: y.get() if device.kind == "cuda" else y)

"""Predictions of trained networks within a fused step: dense products, in the step's precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cupybnn.backends.cuda import blas
from cupybnn.backends.cuda.fused import Launcher
from cupybnn.backends.cuda.fused_virtual import Soften, TeacherLayer
from cupybnn.training.fast.hidden import rounded
from cupybnn.training.fast.layers import Unsupported
from cupybnn.training.fast.plan import NetworkPlan
from cupybnn.training.teachers import Teachers

if TYPE_CHECKING:
    from cupybnn.deploy.layers import PackedLayer

__all__ = ["LayerPlan", "Teaching", "plan_layers"]


@dataclass(frozen=True)
class LayerPlan:
    """How the kernels compute a layer: a dense product, then one step for each element.

    Attributes
    ----------
    kind : {"affine", "relu", "sign"}
    weight : ndarray of float32, shape (inputs, units)
    a, b : ndarray of float32, shape (units,)
        As in `fused_virtual.TeacherLayer`.
    """

    kind: str
    weight: np.ndarray
    a: np.ndarray
    b: np.ndarray


def plan_layers(layers: tuple[PackedLayer, ...]) -> list[LayerPlan]:
    """Plan the layers of a packed network, which are on the CPU.

    Raises
    ------
    Unsupported
        If a ReLU is followed by anything but a product.
    """
    planned = []
    for layer in layers:
        weight = layer.weight if layer.product == "real" else layer.weight.unpack(np.float32)
        if layer.threshold is not None:
            a = layer.threshold.astype(np.float32)
            b = np.where(layer.flip, np.float32(-1), np.float32(1))
            planned.append(LayerPlan("sign", weight, a, b))
            continue
        a, b = np.ones(layer.units, np.float32), np.zeros(layer.units, np.float32)
        kinds = [step.kind for step in layer.steps]
        if "relu" in kinds[:-1] or (layer is layers[-1] and "relu" in kinds):
            raise Unsupported(f"what follows {layer.name} of a teacher is not supported")
        for step in layer.steps:
            if step.kind == "multiply":
                a, b = a * step.by, b * step.by
            elif step.kind == "add":
                b = b + step.by
        planned.append(LayerPlan("relu" if kinds[-1:] == ["relu"] else "affine", weight, a, b))
    return planned


class Teaching:
    """Launches the forward passes of a run's teachers; allocates nothing.

    Parameters
    ----------
    teachers : Teachers
    plan : NetworkPlan
        Of the step.
    pixel_scale : float
        Factor from the whole numbers in a batch to pixels.
    """

    def __init__(self, teachers: Teachers, plan: NetworkPlan, pixel_scale: float) -> None:
        import cupy

        self._blas = blas.Blas(plan.precision)
        self._scale = pixel_scale
        self._temperature = teachers.temperature
        real = blas.operand_dtype(plan.precision)
        networks = [plan_layers(network.to("cpu").layers) for network in teachers.networks]
        self._networks = []
        for layers in networks:
            loaded = []
            for layer in layers:
                weight = cupy.asarray(layer.weight)
                weight = rounded(weight) if real == np.uint16 else weight
                loaded.append((layer.kind, weight, cupy.asarray(layer.a), cupy.asarray(layer.b)))
            self._networks.append(loaded)
        widest = max(layer.weight.shape[1] for layers in networks for layer in layers)
        self._products = cupy.empty(plan.batch * widest, np.float32)
        self._activations = cupy.empty(plan.batch * widest, real)

    def launch(self, launcher: Launcher, images: Any, targets: Any) -> None:
        """Compute the mean of the networks' predictions, on the current stream.

        Parameters
        ----------
        launcher : Launcher
        images : cupy.ndarray, shape (batch, features)
            Pixels as whole numbers, in the operands' dtype.
        targets : cupy.ndarray of float32, shape (batch, classes)
            Receives the predictions.
        """
        batch = len(images)
        for number, layers in enumerate(self._networks):
            x, scale = images, self._scale
            last = layers[-1]
            for layer in layers:
                kind, weight, a, b = layer
                shape = (batch, weight.shape[1])
                z = self._products[: shape[0] * shape[1]].reshape(shape)
                self._blas.multiply(x, weight, z, scale=scale)
                x = None if layer is last else self._activations[: z.size].reshape(shape)
                TeacherLayer(kind=kind, z=z, a=a, b=b, out=x).launch(launcher)
                scale = 1.0
            Soften(
                logits=z,
                out=targets,
                temperature=self._temperature,
                share=1 / len(self._networks),
                add=number > 0,
            ).launch(launcher)

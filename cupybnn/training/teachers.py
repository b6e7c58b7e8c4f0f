"""Trained networks whose predictions a run learns instead of labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cupybnn.autograd.storage import module_of
from cupybnn.backends.devices import Device
from cupybnn.data import Dataset
from cupybnn.errors import SettingError
from cupybnn.training.config import TrainConfig

if TYPE_CHECKING:
    from cupybnn.deploy.network import PackedNetwork

__all__ = ["Teachers"]


class Teachers:
    """The mean of the predictions of trained networks.

    Parameters
    ----------
    networks : sequence of PackedNetwork
        At least one; all with the same inputs and classes.
    temperature : float
        Divisor of their logits.

    Notes
    -----
    Hinton, Vinyals, Dean: Distilling the knowledge in a neural network, arXiv 1503.02531. There the
    student's logits are divided, too; here they are not, so that it learns the teachers'
    probabilities as they are at this temperature.
    """

    def __init__(self, networks: Sequence[PackedNetwork], temperature: float) -> None:
        self.networks = tuple(networks)
        self.temperature = temperature

    @classmethod
    def open(cls, config: TrainConfig, dataset: Dataset, device: Device) -> Teachers | None:
        """Open the networks that `config` names, on `device`; None if it names none.

        Raises
        ------
        CheckpointError
            If there is no network at a path, it cannot be read, or it cannot be packed.
        SettingError
            If a network's inputs or classes are not those of the data.
        """
        if not config.teacher:
            return None
        from cupybnn.deploy.opening import open_network  # it is built on this package

        networks = [open_network(path, device=str(device)) for path in config.teacher]
        for path, network in zip(config.teacher, networks, strict=True):
            has = network.inputs.features, len(network.classes)
            if has != (dataset.features, dataset.classes):
                raise SettingError(
                    f"A 'teacher' must have the inputs and classes of the data, "
                    f"{dataset.features} and {dataset.classes} for {dataset.name}; {path} has "
                    f"{has[0]} and {has[1]}. Name a network that was trained on such data."
                )
        return cls(networks, config.teacher_temperature)

    def arrays(self) -> list[dict[str, np.ndarray]]:
        """Return the content of each network, as in its file."""
        from cupybnn.deploy.file import to_arrays

        on_host = [network.to("cpu") for network in self.networks]
        return [to_arrays(n.layers, n.inputs, n.classes) for n in on_host]

    def targets(self, inputs: Any) -> Any:
        """Return the mean over the networks of softmax(logits / temperature).

        Parameters
        ----------
        inputs : array of floating dtype, shape (n, features)
            On the networks' device.

        Returns
        -------
        array of the dtype of `inputs`, shape (n, classes)
        """
        xp = module_of(inputs)
        total: Any = 0
        for network in self.networks:
            logits = network(inputs) / xp.float32(self.temperature)
            powers = xp.exp(logits - logits.max(axis=1, keepdims=True))
            total = total + powers / powers.sum(axis=1, keepdims=True)
        return (total / xp.float32(len(self.networks))).astype(inputs.dtype)

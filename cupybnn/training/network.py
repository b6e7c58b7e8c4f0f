"""The network of the command line: a multilayer perceptron, full-precision or binarized."""

from __future__ import annotations

import numpy as np

from cupybnn import nn, ops
from cupybnn.autograd import Tensor
from cupybnn.backends.random import Stream
from cupybnn.training.config import TrainConfig

__all__ = ["NETWORK_SETTINGS", "Scale", "build_network"]

#: The settings that `build_network` reads, seed and dtype aside.
NETWORK_SETTINGS = (
    "n_hidden",
    "hidden_layers",
    "binary",
    "xnor",
    "first",
    "last",
    "batch_norm",
    "keep_prob",
    "input_keep_prob",
    "sign_keep_prob",
    "ste",
)

_BATCH_NORM_EPS = 1e-4
_BATCH_NORM_DECAY = 0.9
#: Where the trained factors of a layer with binary weights begin; products of signs are about
#: sqrt(inputs) large, far outside the window in which the sign has a pseudo-gradient.
_FIRST_SCALE = 0.05


class Scale(nn.Module):
    """Multiplies by one trained number.

    Parameters
    ----------
    value : float
        Where it begins.
    dtype : str
    """

    def __init__(self, value: float, dtype: str) -> None:
        self.factor = nn.Parameter(np.full((1,), value, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x * factor``."""
        return x * self.factor


def build_network(config: TrainConfig, features: int, classes: int) -> nn.Sequential:
    """Return the network of a configuration, initialised by its seed, on the CPU.

    ``fc1``, ``fc2``, ... and ``fcout``, and what stands between them.

    Full precision: each hidden layer is product, batch norm, ReLU, dropout.

    Binary: product, dropout, batch norm, sign, dropout of signs. The first dropout comes before the
    sign, and the second makes signs of signs, so that what enters the next product is two-valued.
    Weights of the first and the last layer and the input of the last are real, and nothing but
    batch norm stands between the last hidden product and it. With `first` the first layer's weights
    are binary too, and where there is no batch norm, a trained factor brings its products into the
    window of the sign; with `last` input and weights of the last layer are binary, and batch norm,
    or without it a trained factor, makes logits of its products.

    Parameters
    ----------
    config : TrainConfig
        Its `NETWORK_SETTINGS`, `dtype` and `seed`.
    features, classes : int
        Inputs and outputs.
    """
    make = _Layers(config)
    layers: dict[str, nn.Module | None] = {}
    inputs = features
    layers["dropout0"] = make.dropout(config.input_keep_prob)
    for number, units in enumerate(config.hidden_sizes, 1):
        first, last = number == 1, number == len(config.hidden_sizes)
        binary = config.binary and (config.first or not first)
        layers[f"fc{number}"] = make.linear(inputs, units, binary, not first)
        if config.binary:
            layers[f"dropout{number}"] = make.dropout(config.keep_prob)
            layers[f"bn{number}"] = make.batch_norm(units)
            if first and config.first and not config.batch_norm:
                layers[f"scale{number}"] = Scale(_FIRST_SCALE, config.storage_dtype)
            if not last or config.last:
                layers[f"sign{number}"] = nn.Sign(make.quantizer())
                if config.sign_keep_prob < 1:
                    coins = nn.SignDropout(config.sign_keep_prob, rng=make.noise)
                    layers[f"signdropout{number}"] = coins
        else:
            layers[f"bn{number}"] = make.batch_norm(units)
            layers[f"relu{number}"] = nn.ReLU()
            layers[f"dropout{number}"] = make.dropout(config.keep_prob)
        inputs = units
    binary = config.binary and config.last
    layers["fcout"] = make.linear(inputs, classes, binary, True)
    if binary and config.batch_norm:
        layers["bnout"] = make.batch_norm(classes)
    elif binary:
        layers["scaleout"] = Scale(_FIRST_SCALE, config.storage_dtype)
    return nn.Sequential(**{name: layer for name, layer in layers.items() if layer is not None})


class _Layers:
    """Makes the layers of a configuration; None where it has no such layer."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        # Two generators, so that dropout and stochastic signs leave the first weights alone.
        self._weights = np.random.default_rng([config.seed, 0x1417])
        self.noise = np.random.default_rng([config.seed, 0x2015E])

    def quantizer(self) -> ops.Quantizer:
        quantizer = ops.get_quantizer(self._config.ste)
        if hasattr(quantizer, "random"):  # each layer throws coins of its own
            quantizer.random = Stream(int(self.noise.integers(2**63)))
        return quantizer

    def linear(self, inputs: int, outputs: int, binary: bool, binary_input: bool) -> nn.Linear:
        config, rng = self._config, self._weights
        if not binary:
            return nn.Linear(inputs, outputs, rng=rng, dtype=config.storage_dtype)
        quantizer = self.quantizer()
        return nn.BinaryLinear(
            inputs,
            outputs,
            binary_input=binary_input,
            xnor=config.xnor,
            ste=quantizer,
            # As in the original program, unless weights could leave the window for good.
            clip=quantizer.window is not None,
            rng=rng,
            dtype=config.storage_dtype,
        )

    def dropout(self, keep_prob: float) -> nn.Dropout | None:
        return nn.Dropout(keep_prob, rng=self.noise) if keep_prob < 1 else None

    def batch_norm(self, units: int) -> nn.BatchNorm | None:
        if not self._config.batch_norm:
            return None
        dtype = self._config.storage_dtype
        return nn.BatchNorm(units, eps=_BATCH_NORM_EPS, decay=_BATCH_NORM_DECAY, dtype=dtype)

"""The network of the command line: a multilayer perceptron, full-precision or binarized."""

from __future__ import annotations

import numpy as np

from cupybnn import nn, ops
from cupybnn.backends.random import Stream
from cupybnn.training.config import TrainConfig

__all__ = ["NETWORK_SETTINGS", "LayerMaker", "build_network"]

#: The settings that `build_network` reads, except seed and dtype.
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
    "grad_bits",
)

_BATCH_NORM_EPS = 1e-4
_BATCH_NORM_DECAY = 0.9
#: Initial value of the trained factors of a layer with binary weights. Products of signs have a
#: magnitude of about sqrt(inputs), far outside the window in which sign has a pseudo-gradient.
_INITIAL_SCALE = 0.05


def build_network(config: TrainConfig, features: int, classes: int) -> nn.Sequential:
    """Return the network that `config` describes, initialized from its seed, on the CPU.

    Its layers are ``fc1``, ``fc2``, ... and ``fcout``, with others between them.

    Full precision: each hidden layer is product, batch norm, ReLU, dropout.

    Binary: product, dropout, batch norm, sign, dropout of signs. The first dropout comes before the
    sign, and the second maps signs to signs, so that the next product's input stays two-valued.
    The first layer's weights and the last layer's weights and input are real; only batch norm comes
    between the last hidden product and the last layer. With `first`, the first layer's weights are
    binary too, and without batch norm a trained factor scales its products into the window of the
    sign. With `last`, the last layer's input and weights are binary, and batch norm or, without it,
    a trained factor turns its products into logits. With `grad_bits`, the gradients of products of
    signs are rounded, in all layers but the last.

    Parameters
    ----------
    config : TrainConfig
        Its `NETWORK_SETTINGS`, `dtype` and `seed`.
    features, classes : int
        Inputs and outputs.
    """
    make = LayerMaker(config)
    layers: dict[str, nn.Module | None] = {}
    inputs = features
    layers["dropout0"] = make.dropout(config.input_keep_prob)
    for number, units in enumerate(config.hidden_sizes, 1):
        first, last = number == 1, number == len(config.hidden_sizes)
        binary = config.binary and (config.first or not first)
        linear = layers[f"fc{number}"] = make.linear(inputs, units, binary, not first)
        if isinstance(linear, nn.BinaryLinear) and linear.binary_input:
            linear.rounding = make.rounding()
        if config.binary:
            layers[f"dropout{number}"] = make.dropout(config.keep_prob)
            layers[f"bn{number}"] = make.batch_norm(units)
            if first and config.first and not config.batch_norm:
                layers[f"scale{number}"] = nn.Scale(_INITIAL_SCALE, config.storage_dtype)
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
        layers["scaleout"] = nn.Scale(_INITIAL_SCALE, config.storage_dtype)
    return nn.Sequential(**{name: layer for name, layer in layers.items() if layer is not None})


class LayerMaker:
    """Makes a configuration's layers; returns None for a layer that it does not have."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        # Generators of their own, so that no setting affects what others draw: the initial weights,
        # dropout and stochastic signs, rounding.
        self._weights = np.random.default_rng([config.seed, 0x1417])
        self.noise = np.random.default_rng([config.seed, 0x2015E])
        self._rounds = np.random.default_rng([config.seed, 0x20D])

    def quantizer(self) -> ops.Quantizer:
        """Return a new quantizer, with random numbers of its own if it draws any."""
        quantizer = ops.get_quantizer(self._config.ste)
        if hasattr(quantizer, "random"):  # each layer has its own stream
            quantizer.random = Stream(int(self.noise.integers(2**63)))
        return quantizer

    def linear(self, inputs: int, outputs: int, binary: bool, binary_input: bool) -> nn.Linear:
        """Return a product with real or binary weights."""
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
            # As in the original program, if there is a window that weights could leave for good.
            clip=quantizer.window is not None,
            rng=rng,
            dtype=config.storage_dtype,
        )

    def rounding(self) -> nn.GradientRounding | None:
        """Return the rounding of a layer's gradient, if the configuration has it."""
        bits = self._config.grad_bits
        return nn.GradientRounding(bits, rng=self._rounds) if bits else None

    def dropout(self, keep_prob: float) -> nn.Dropout | None:
        """Return a dropout layer, unless it would keep everything."""
        return nn.Dropout(keep_prob, rng=self.noise) if keep_prob < 1 else None

    def batch_norm(self, units: int) -> nn.BatchNorm | None:
        """Return a batch norm, if the network has them."""
        if not self._config.batch_norm:
            return None
        dtype = self._config.storage_dtype
        return nn.BatchNorm(units, eps=_BATCH_NORM_EPS, decay=_BATCH_NORM_DECAY, dtype=dtype)

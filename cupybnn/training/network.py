"""The network that is trained: a multilayer perceptron, full-precision or binarized."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cupybnn import nn, ops
from cupybnn.autograd import Tensor
from cupybnn.backends.random import Stream
from cupybnn.nn import Scale
from cupybnn.training.config import TrainConfig

__all__ = ["Perceptron", "Scale", "build_network"]

_BATCH_NORM_EPS = 1e-4
_BATCH_NORM_DECAY = 0.9
#: Where the trained factors of a layer with binary weights begin; products of signs are about
#: sqrt(inputs) large, far outside the window in which the sign has a pseudo-gradient.
_FIRST_SCALE = 0.05


class Perceptron(nn.Module):
    """``fc1``, ``fc2``, ... and ``fcout``, and what stands between them.

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
        Its fields `hidden_layers`, `n_hidden`, `binary`, `xnor`, `first`, `last`, `batch_norm`,
        `keep_prob`, `input_keep_prob`, `sign_keep_prob`, `ste`, `dtype` and `seed`.
    features, classes : int
        Inputs and outputs.
    """

    def __init__(self, config: TrainConfig, features: int, classes: int) -> None:
        self._config = config
        # Two generators, so that dropout and stochastic signs leave the first weights alone.
        self._weights = np.random.default_rng([config.seed, 0x1417])
        self._noise = np.random.default_rng([config.seed, 0x2015E])
        inputs = features
        if config.input_keep_prob < 1:
            self.dropout0 = nn.Dropout(config.input_keep_prob, rng=self._noise)
        for number in range(1, config.hidden_layers + 1):
            first, last = number == 1, number == config.hidden_layers
            binary = config.binary and (config.first or not first)
            self._add_linear(f"fc{number}", inputs, config.n_hidden, binary, not first)
            if config.binary:
                self._add_dropout(f"dropout{number}")
                self._add_batch_norm(f"bn{number}", config.n_hidden)
                if first and config.first and not config.batch_norm:
                    setattr(self, f"scale{number}", Scale(_FIRST_SCALE, config.storage_dtype))
                if not last or config.last:
                    setattr(self, f"sign{number}", nn.Sign(self._quantizer()))
                    if config.sign_keep_prob < 1:
                        coins = nn.SignDropout(config.sign_keep_prob, rng=self._noise)
                        setattr(self, f"signdropout{number}", coins)
            else:
                self._add_batch_norm(f"bn{number}", config.n_hidden)
                setattr(self, f"relu{number}", nn.ReLU())
                self._add_dropout(f"dropout{number}")
            inputs = config.n_hidden
        binary = config.binary and config.last
        self._add_linear("fcout", inputs, classes, binary, True)
        if binary and config.batch_norm:
            self._add_batch_norm("bnout", classes)
        elif binary:
            self.scaleout = Scale(_FIRST_SCALE, config.storage_dtype)

    def _quantizer(self) -> ops.Quantizer:
        quantizer = ops.get_quantizer(self._config.ste)
        if hasattr(quantizer, "random"):  # each layer throws coins of its own
            quantizer.random = Stream(int(self._noise.integers(2**63)))
        return quantizer

    def _add_linear(
        self, name: str, inputs: int, outputs: int, binary: bool, binary_input: bool
    ) -> None:
        config, rng = self._config, self._weights
        if not binary:
            setattr(self, name, nn.Linear(inputs, outputs, rng=rng, dtype=config.storage_dtype))
            return
        quantizer = self._quantizer()
        layer = nn.BinaryLinear(
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
        setattr(self, name, layer)

    def _add_dropout(self, name: str) -> None:
        if self._config.keep_prob < 1:
            setattr(self, name, nn.Dropout(self._config.keep_prob, rng=self._noise))

    def _add_batch_norm(self, name: str, units: int) -> None:
        if self._config.batch_norm:
            layer = nn.BatchNorm(
                units,
                eps=_BATCH_NORM_EPS,
                decay=_BATCH_NORM_DECAY,
                dtype=self._config.storage_dtype,
            )
            setattr(self, name, layer)

    def stages(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield what arises on the way from input to logits, by name.

        "fc1/product", "fc1/activation" (what the next layer gets), ..., "fcout/product" and
        "logits".
        """
        layer = ""
        for name, module in vars(self).items():
            if not isinstance(module, nn.Module):
                continue
            if name.startswith("fc"):
                if layer:
                    yield f"{layer}/activation", x
                layer = name
                x = module(x)
                yield f"{name}/product", x
            else:
                x = module(x)
        yield "logits", x

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, shape (batch, classes), of inputs of shape (batch, features)."""
        for _, value in self.stages(x):
            x = value
        return x


def build_network(config: TrainConfig, features: int, classes: int) -> Perceptron:
    """Return the network of a configuration, initialised by its seed, on the CPU."""
    return Perceptron(config, features, classes)

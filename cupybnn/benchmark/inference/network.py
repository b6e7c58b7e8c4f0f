"""The network whose predictions are timed, in numbers that every order of summation gets right."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cupybnn import nn

__all__ = ["CLASSES", "FEATURES", "PIXEL_MAX", "Network", "random_inputs"]

FEATURES, CLASSES = 784, 10
_STEPS = 64  # real weights are multiples of 1 / 64 from -1/2 to 1/2
#: What pixels are divided by: 784 products add up to less than 2**24 times 1 / 64 / 256.
PIXEL_MAX = 256
_EPS = 1e-4


@dataclass(frozen=True)
class Network:
    """784-H-H-H-10 with random parameters: binary hidden layers, batch norm and sign.

    Attributes
    ----------
    weights : list of ndarray of float32
        Of the two ends; and -1 or +1 of the layers between, and of the first if it is binary.
    gamma, beta, mean, variance : list of ndarray of float32
        Of the batch norm after each hidden product.
    """

    weights: list[np.ndarray]
    gamma: list[np.ndarray]
    beta: list[np.ndarray]
    mean: list[np.ndarray]
    variance: list[np.ndarray]
    eps: float = _EPS
    binary_first: bool = False

    @classmethod
    def random(cls, hidden: int, *, binary_first: bool = False) -> Network:
        """Return a network with `hidden` units in each hidden layer, and such a first layer."""
        rng = np.random.default_rng(0)

        def real(inputs: int, units: int) -> np.ndarray:
            return (rng.integers(-32, 33, (inputs, units)) / _STEPS).astype(np.float32)

        def signs(inputs: int = hidden) -> np.ndarray:
            return (rng.integers(0, 2, (inputs, hidden), np.int8) * 2 - 1).astype(np.float32)

        def norm(scale: float) -> np.ndarray:
            return (scale * rng.normal(size=hidden)).astype(np.float32)

        # Of a product, about.
        spread = (FEATURES**0.5 * (0.6 if binary_first else 0.3), hidden**0.5, hidden**0.5)
        first = signs(FEATURES) if binary_first else real(FEATURES, hidden)
        return cls(
            [first, signs(), signs(), real(hidden, CLASSES)],
            binary_first=binary_first,
            gamma=[norm(1.0) for _ in spread],
            beta=[norm(0.1) for _ in spread],
            mean=[norm(0.3 * s) for s in spread],
            variance=[np.float32(s * s) * rng.uniform(0.5, 2, hidden).astype(np.float32)
                      for s in spread],
        )  # fmt: skip

    @cached_property
    def model(self) -> nn.Module:
        """The network as a model of this library, for evaluation."""
        layers: list[nn.Module] = []
        sizes = [FEATURES, *(len(g) for g in self.gamma), CLASSES]
        for i, pair in enumerate(itertools.pairwise(sizes)):
            layer: nn.Linear
            if 0 < i < len(self.gamma) or (i == 0 and self.binary_first):
                layer = nn.BinaryLinear(*pair, binary_input=i > 0, rng=0)
            else:
                layer = nn.Linear(*pair, rng=0)
            layer.weight.write()[...] = self.weights[i]
            layers.append(layer)
            if i < len(self.gamma):
                norm = nn.BatchNorm(pair[1], eps=self.eps)
                norm.gamma.write()[...], norm.beta.write()[...] = self.gamma[i], self.beta[i]
                norm.mean[...], norm.variance[...] = self.mean[i], self.variance[i]
                layers += [norm, nn.Sign()]
        return nn.Sequential(*layers).eval()

    def folded(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return scale and shift that batch norm number `i` is, in float32."""
        scale = self.gamma[i] * (1 / np.sqrt(self.variance[i] + np.float32(self.eps)))
        return scale, self.beta[i] - self.mean[i] * scale

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """Return the logits by plain products in float64, whose sums are exact."""
        x = pixels / np.float64(PIXEL_MAX)
        for i in range(len(self.gamma)):
            product = (x.astype(np.float64) @ self.weights[i]).astype(np.float32)
            scale, shift = self.folded(i)
            x = np.where(product * scale + shift >= 0, np.float32(1), np.float32(-1))
        return (x.astype(np.float64) @ self.weights[-1]).astype(np.float32)


def random_inputs(batch: int) -> np.ndarray:
    """Return pixels: uint8 of shape (batch, features)."""
    return np.random.default_rng(0).integers(0, PIXEL_MAX, (batch, FEATURES), np.uint8)

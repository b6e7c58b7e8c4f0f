"""Models whose exported files are compared, and what an exact program makes of them."""

from __future__ import annotations

import functools

import numpy as np
from test_packed_network import MODELS, made, settle

import cupybnn
from cupybnn import PackedNetwork, nn

#: Chains that the other models do not have: signs that real and binary layers take as numbers,
#: integers that a real layer takes, logits that are integers.
MORE = {
    "signs as numbers": lambda: nn.Sequential(
        nn.BinaryLinear(20, 33, binary_input=False, rng=0), nn.BatchNorm(33), nn.ReLU(),
        nn.Linear(33, 30, rng=1), nn.BatchNorm(30), nn.Sign(),
        nn.BinaryLinear(30, 29, binary_input=False, rng=2), nn.BatchNorm(29), nn.Sign(),
        nn.BinaryLinear(29, 20, rng=3), nn.Linear(20, 7, rng=4),
    ),
    "integers": lambda: nn.Sequential(
        nn.BinaryLinear(20, 40, binary_input=False, rng=0), nn.BatchNorm(40), nn.Sign(),
        nn.BinaryLinear(40, 7, rng=1),
    ),
}  # fmt: skip
NAMES = [*MODELS, *MORE]
#: Those whose results are integers up to the last steps, so that every program finds the same.
EXACT = ("all binary", "scales", "integers")


def network(name: str, pixel_max: float | None = 16) -> PackedNetwork:
    """Return a network of 4 x 5 pixels and 7 classes."""
    model = made(name) if name in MODELS else settle(MORE[name]())
    shape = None if pixel_max is None else (4, 5)
    return PackedNetwork.from_model(model, pixel_max=pixel_max, image_shape=shape)


def images(greatest: int = 16, count: int = 300) -> np.ndarray:
    """Return images of pixels from 0 on."""
    return np.random.default_rng(9).integers(0, greatest + 1, (count, 4, 5)).astype(np.uint8)


@functools.cache
def mnist_networks(mnist_dir) -> tuple[dict[str, PackedNetwork], np.ndarray]:
    """Train, briefly, an all-binary network and one with real ends; return them and all images."""
    data = cupybnn.data.load("mnist", mnist_dir)
    networks = {}
    for name, binary in (("all binary", True), ("real ends", False)):
        config = cupybnn.TrainConfig(
            binary=True, xnor=True, n_hidden=128, max_steps=30, eval_every_n=100, device="cpu",
            first=binary, last=binary, batch_norm=True,
        )  # fmt: skip
        trainer = cupybnn.Trainer(config, data=data)
        model = trainer.run().model
        networks[name] = PackedNetwork.from_model(model, pixel_max=255, image_shape=(28, 28))
    return networks, data.test_images.reshape(-1, 28, 28)


def exact_logits(net: PackedNetwork, pixels: np.ndarray) -> np.ndarray:
    """Return logits of a network with binary weights alone, exactly up to the last steps.

    Pixels are summed whole; such a sum and its product with the scale of the pixels, which is
    compared with the threshold of the scaled sum, are numbers that float64 has.
    """
    factor = float(np.float32(1 / net.inputs.pixel_max))
    x = pixels.reshape(len(pixels), -1).astype(np.float64)
    for i, layer in enumerate(net.layers):
        product = x @ layer.weight.unpack(np.float64)
        if layer.threshold is not None:
            number = product * (1 if i else factor)
            x = np.where((number >= layer.threshold.astype(np.float64)) != layer.flip, 1.0, -1.0)
    logits = product.astype(np.float32)
    for step in net.layers[-1].steps:
        logits = logits * step.by if step.kind == "multiply" else logits + step.by
    return logits

"""Small networks that the fused step trains, and running them."""

from __future__ import annotations

import numpy as np

from cupybnn.data.dataset import Dataset
from cupybnn.training import Callback, TrainConfig, Trainer

#: Every network that the fused step knows, with each thing that changes what a kernel does. Dropout
#: keeps a half: other factors do not leave the sums of a binary product exact, and where a unit is
#: exactly at its mean the last bit would decide its sign.
NETWORKS = {
    "xnor": {"binary": True, "xnor": True, "batch_norm": True},
    "xnor, odd sizes": {
        "binary": True,
        "xnor": True,
        "batch_norm": True,
        "n_hidden": 45,
        "batch_size": 33,
    },
    "xnor, wide": {
        "binary": True,
        "xnor": True,
        "batch_norm": True,
        "n_hidden": 2048,
        "batch_size": 300,
    },
    "xnor, a word more than a chunk": {
        "binary": True,
        "xnor": True,
        "batch_norm": True,
        "n_hidden": 1056,
        "batch_size": 700,
    },
    "xnor without batch norm": {"binary": True, "xnor": True, "batch_norm": False},
    "sign": {"binary": True, "batch_norm": True},
    "dropout before sign": {
        "binary": True,
        "xnor": True,
        "batch_norm": True,
        "keep_prob": 0.5,
    },
    "clipped": {
        "binary": True,
        "xnor": True,
        "batch_norm": True,
        "ste": "clipped_grad",
        "loss": "squared_hinge",
    },
    "all binary": {
        "binary": True,
        "xnor": True,
        "batch_norm": True,
        "first": True,
        "last": True,
        "loss": "squared_hinge",
        "input_keep_prob": 0.8,
    },
    "last layer binary, clipped": {
        "binary": True,
        "batch_norm": True,
        "last": True,
        "ste": "clipped_grad",
        "label_smoothing": 0.1,
        "batch_size": 700,
    },
    "last layer binary, without batch norm": {"binary": True, "last": True, "batch_norm": False},
    "deformed images": {
        "batch_norm": True,
        "augment_shift": 1.5,
        "augment_rotation": 10.0,
        "augment_scale": 0.1,
        "augment_shear": 0.1,
    },
    "elastic images": {"batch_norm": True, "augment_elastic": 1.0, "augment_shift": 1.0},
    "mirrored images": {"batch_norm": True, "augment_flip": True, "augment_rotation": 10.0},
    "against the network": {
        "binary": True,
        "xnor": True,
        "batch_norm": True,
        "first": True,
        "last": True,
        "loss": "squared_hinge",
        "keep_prob": 0.5,
        "input_keep_prob": 0.8,
        "adversarial": 0.1,
    },
    "virtual, all binary": {
        "binary": True,
        "xnor": True,
        "batch_norm": True,
        "first": True,
        "last": True,
        "vat": 2.0,
    },
    "virtual, of different widths": {
        "binary": True,
        "xnor": True,
        "batch_norm": True,
        "n_hidden": (40, 200, 72),
        "last": True,
        "vat": 2.0,
    },
    "virtual, of mixed images, dropout": {
        "binary": True,
        "xnor": True,
        "batch_norm": True,
        "loss": "squared_hinge",
        "keep_prob": 0.5,
        "input_keep_prob": 0.8,
        "vat": 1.5,
        "vat_xi": 0.5,
        "mix": "some",
    },
    "virtual, full precision": {"batch_norm": True, "vat": 1.0, "label_smoothing": 0.1},
    "virtual and against the network": {
        "binary": True,
        "last": True,
        "batch_norm": False,
        "vat": 1.0,
        "adversarial": 0.05,
        "label_smoothing": 0.1,
    },
    "among neighbors": {
        "binary": True,
        "xnor": True,
        "batch_norm": True,
        "first": True,
        "neighbor_noise": 0.5,
        "mix": "some",
        "augment_rotation": 9.0,
    },
    "among three neighbors": {"batch_norm": True, "neighbor_noise": 1.0, "neighbors": 3},
    "mixed images": {"batch_norm": True, "mix": "uniform", "augment_shift": 1.5},
    "many rows": {
        "binary": True,
        "xnor": True,
        "batch_norm": True,
        "n_hidden": 64,
        "batch_size": 5000,
    },
    "xnor, products of 16-bit integers": {
        "binary": True,
        "xnor": True,
        "batch_norm": True,
        "n_hidden": 4104,
        "batch_size": 64,
    },
    "more rows than shared memory holds": {
        "binary": True,
        "xnor": True,
        "batch_norm": True,
        "n_hidden": 40,
        "batch_size": 20000,
    },
    "layers of different width": {
        "binary": True,
        "xnor": True,
        "batch_norm": True,
        "n_hidden": (192, 72, 130),
    },
    "deep": {"binary": True, "xnor": True, "batch_norm": True, "hidden_layers": 5},
    "shallow": {"binary": True, "xnor": True, "batch_norm": True, "hidden_layers": 1},
    "full precision": {},
    "full precision, batch norm, dropout": {
        "batch_norm": True,
        "keep_prob": 0.6,
        "input_keep_prob": 0.8,
        "label_smoothing": 0.1,
    },
}
SMALL = {"n_hidden": 128, "batch_size": 96, "reg": 0.0, "max_steps": 1000}


def dataset(images: int = 500, classes: int = 10) -> Dataset:
    random = np.random.default_rng(7)
    pixels = random.integers(0, 256, (images, 96)).astype(np.uint8)
    labels = random.integers(0, classes, images).astype(np.uint8)
    return Dataset("digits", pixels, labels, pixels[:50], labels[:50], (8, 12), 255, classes)


def trainer(callbacks=(), data: Dataset | None = None, **settings) -> Trainer:
    config = TrainConfig(**{**SMALL, "device": "cuda", "fused": True, **settings})
    return Trainer(config, callbacks, data=data or dataset())


class Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step(self, trainer, step, output):
        self.losses.append(float(output.loss))


def run(**settings) -> tuple[Trainer, list[float]]:
    losses = Losses()
    made = trainer([losses], **settings)
    made.run()
    return made, losses.losses


def arrays(made: Trainer) -> dict[str, np.ndarray]:
    return dict(made.state().arrays)

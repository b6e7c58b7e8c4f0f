"""Measures of the signs during training: flips, weights that no longer learn, entropy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from cupybnn import nn
from cupybnn.autograd import Tensor, no_grad
from cupybnn.autograd.storage import module_of
from cupybnn.backends.totals import column_means, fraction, total
from cupybnn.training.records import Callback

if TYPE_CHECKING:
    from cupybnn.training.protocol import TrainingRun
    from cupybnn.training.records import Evaluation, TrainResult
    from cupybnn.training.step import StepOutput

__all__ = [
    "EntropyRecord",
    "FlipCounter",
    "FlipRecord",
    "Flips",
    "flipped",
    "outside_window",
    "sign_entropy",
    "stages_of",
    "weight_signs",
]


class Flips(NamedTuple):
    """Fractions of a layer's binary weights whose sign has changed, from 0 to 1.

    Examples
    --------
    >>> from cupybnn.training.measures import Flips
    >>> Flips(since_last=0.0, since_start=0.25).since_start
    0.25
    """

    since_last: float
    since_start: float


def _binary_weights(model: nn.Module) -> Iterator[tuple[str, nn.BinaryLinear, Any]]:
    """Yield (name of the weight, layer, latent weights' array) for each binary layer."""
    for name, module in model.named_modules():
        if isinstance(module, nn.BinaryLinear):
            # Only read here; `weight.data` would be watched for edits.
            yield f"{name}.weight" if name else "weight", module, module.weight._data


def weight_signs(model: nn.Module) -> dict[str, Any]:
    """Return, by name of a binary layer's weight, a bool array that is True where it is +1.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import nn
    >>> from cupybnn.training import measures
    >>> model = nn.Sequential(nn.BinaryLinear(4, 2, binary_input=False, rng=0))
    >>> signs = measures.weight_signs(model)
    >>> {name: array.shape for name, array in signs.items()}
    {'0.weight': (4, 2)}
    """
    return {name: array >= 0 for name, _, array in _binary_weights(model)}


def flipped(model: nn.Module, before: dict[str, Any]) -> dict[str, float]:
    """Return, by name, the fraction of binary weights whose sign differs from `before`.

    `before` is an earlier result of `weight_signs`. Reading the counts waits for the device.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import nn
    >>> from cupybnn.training import measures
    >>> model = nn.Sequential(nn.BinaryLinear(4, 2, binary_input=False, rng=0))
    >>> before = measures.weight_signs(model)
    >>> weight = model[0].weight
    >>> weight.data[0] *= -1  # one of four rows
    >>> measures.flipped(model, before)
    {'0.weight': 0.25}
    """
    return {name: fraction(signs != before[name]) for name, signs in weight_signs(model).items()}


class FlipCounter:
    """Counts the binary weights that flip.

    Parameters
    ----------
    model : Module
        Flips are counted from its current weights.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import nn
    >>> from cupybnn.training import measures
    >>> model = nn.Sequential(nn.BinaryLinear(4, 2, binary_input=False, rng=0))
    >>> counter = measures.FlipCounter(model)
    >>> model[0].weight.data[0] *= -1
    >>> counter.update()
    {'0.weight': Flips(since_last=0.25, since_start=0.25)}
    >>> counter.update()
    {'0.weight': Flips(since_last=0.0, since_start=0.25)}
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._start = weight_signs(model)
        self._last = dict(self._start)

    def update(self) -> dict[str, Flips]:
        """Return, by name of a binary layer's weight, the flips since the last call.

        Reading the counts waits for the device.
        """
        flips = {}
        for name, signs in weight_signs(self._model).items():
            shares = (fraction(signs != then[name]) for then in (self._last, self._start))
            flips[name] = Flips(*shares)
            self._last[name] = signs
        return flips


def outside_window(model: nn.Module) -> dict[str, float]:
    """Return, by name of a binary layer's weight, the fraction that no longer gets a gradient.

    These are the latent weights outside the quantizer's window; 0 for a quantizer without one.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn import nn
    >>> from cupybnn.training import measures
    >>> model = nn.Sequential(nn.BinaryLinear(4, 2, binary_input=False, rng=0))
    >>> model[0].weight.data[0] = 2.0  # beyond |w| <= 1
    >>> measures.outside_window(model)
    {'0.weight': 0.25}
    """
    shares = {}
    for name, layer, array in _binary_weights(model):
        window = layer.quantizer.window
        shares[name] = 0.0 if window is None else fraction(abs(array) > window)
    return shares


def sign_entropy(activations: Tensor | Any) -> float:
    """Return the mean entropy, in bits, of the signs of each unit over a batch.

    Parameters
    ----------
    activations : Tensor or ndarray, shape (..., units)
        Signs, or the values whose signs to take.

    Returns
    -------
    float
        ``mean(-p log2(p) - (1 - p) log2(1 - p))`` over the units, where p is the fraction of the
        batch for which a unit is +1: 1 if each unit is +1 for half of the batch, 0 if no unit ever
        changes.

    Examples
    --------
    >>> import numpy as np
    >>> from cupybnn.training.measures import sign_entropy
    >>> sign_entropy(np.array([[1.0, 1.0], [-1.0, 1.0]]))  # one unit varies, the other does not
    0.5
    """
    array = activations.data if isinstance(activations, Tensor) else activations
    if array.ndim < 1 or array.size == 0:
        raise ValueError(
            f"The 'activations' of sign_entropy must have shape (..., units) and not be empty; got "
            f"{array.shape}."
        )
    xp = module_of(array)
    p = column_means(array.reshape(-1, array.shape[-1]) >= 0)
    entropy = xp.zeros_like(p)
    for part in (p, 1 - p):
        entropy -= part * xp.log2(xp.where(part > 0, part, 1))
    return total(entropy) / entropy.size


class FlipRecord(Callback):
    """Records each step's flips and the fraction of weights outside the window, by layer.

    Attributes
    ----------
    steps : list of int
        Step numbers.
    flips : dict of str to list of Flips
        By the weight's name, one for each step.
    outside : dict of str to list of float
        Likewise, the fraction of latent weights outside the quantizer's window.

    Examples
    --------
    >>> import cupybnn
    >>> from cupybnn.training.measures import FlipRecord
    >>> config = cupybnn.TrainConfig(dataset="digits", binary=True, n_hidden=32, max_steps=5)
    >>> record = FlipRecord()
    >>> result = cupybnn.Trainer(config, [record]).run()
    >>> len(record.flips["fc2.weight"])
    5
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.flips: dict[str, list[Flips]] = {}
        self.outside: dict[str, list[float]] = {}
        self._counter: FlipCounter | None = None

    def on_start(self, trainer: TrainingRun) -> None:
        """Count from the weights before the first step."""
        self._counter = FlipCounter(trainer.model)

    def on_step(self, trainer: TrainingRun, step: int, output: StepOutput) -> None:
        """Record the flips."""
        assert self._counter is not None
        self.steps.append(step)
        for name, flips in self._counter.update().items():
            self.flips.setdefault(name, []).append(flips)
        for name, share in outside_window(trainer.model).items():
            self.outside.setdefault(name, []).append(share)


def stages_of(trainer: TrainingRun, images: int) -> list[tuple[str, Tensor]]:
    """Return (tag, value) for everything that the model computes from the first test images.

    Examples
    --------
    >>> import cupybnn
    >>> from cupybnn.training.measures import stages_of
    >>> config = cupybnn.TrainConfig(dataset="digits", binary=True, n_hidden=32, max_steps=5)
    >>> trainer = cupybnn.Trainer(config)
    >>> [tag for tag, value in stages_of(trainer, 4)][:2]
    ['fc1/product', 'fc1/activation']
    """
    inputs = trainer.data.scale(trainer.data.test_images[:images])
    trainer.model.eval()
    with no_grad():
        return list(nn.stages(trainer.model, Tensor(inputs)))


class EntropyRecord(Callback):
    """Records the entropy of the activations' signs at each evaluation and at the end, by layer.

    Parameters
    ----------
    images : int
        Number of test images, from the first on, to compute it over.

    Attributes
    ----------
    steps : list of int
        Step numbers.
    entropy : dict of str to list of float
        `sign_entropy` in bits, one for each of `steps`, by the name of the layer that the
        activations come from, such as "fc1". Layers whose activations are not signs are left out.

    Examples
    --------
    >>> import cupybnn
    >>> from cupybnn.training.measures import EntropyRecord
    >>> config = cupybnn.TrainConfig(dataset="digits", binary=True, n_hidden=32, max_steps=5)
    >>> record = EntropyRecord()
    >>> result = cupybnn.Trainer(config, [record]).run()
    >>> sorted(record.entropy)
    ['fc1', 'fc2']
    """

    def __init__(self, images: int = 256) -> None:
        self.steps: list[int] = []
        self.entropy: dict[str, list[float]] = {}
        self._images = images

    def on_evaluate(self, trainer: TrainingRun, evaluation: Evaluation) -> None:
        """Record the entropy."""
        self.steps.append(evaluation.step)
        for tag, value in stages_of(trainer, self._images):
            if value.two_valued:
                layer = tag.removesuffix("/activation")
                self.entropy.setdefault(layer, []).append(sign_entropy(value))

    def on_end(self, trainer: TrainingRun, result: TrainResult) -> None:
        """Record the entropy after the last step, unless that has just been done."""
        if result.final.step not in self.steps[-1:]:
            self.on_evaluate(trainer, result.final)

"""Every setting of a training run, checked, in one frozen object that goes to and from JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from cupybnn.data import DATASETS
from cupybnn.training import checks

__all__ = ["DTYPES", "TrainConfig"]

DTYPES = ("float32", "float64", "tf32", "bfloat16")
_CHOICES = {
    "dataset": DATASETS,
    "dtype": DTYPES,
    "loss": ("cross_entropy", "squared_hinge"),
    "penalty": ("l1", "bipolar"),
    "optimizer": ("adam", "adamw", "sgd", "bop"),
    "lr_scale": ("none", "binarynet"),
    "schedule": ("constant", "cosine", "exponential", "step"),
    "average": ("none", "ema", "swa"),
}
_SWITCHES = ("binary", "xnor", "batch_norm", "debug", "first", "last", "fused", "graph")
_NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "reg": ("at least 0", lambda x: x >= 0),
    "lr": ("greater than 0", lambda x: x > 0),
    "keep_prob": ("in (0, 1]", lambda x: 0 < x <= 1),
    "input_keep_prob": ("in (0, 1]", lambda x: 0 < x <= 1),
    "label_smoothing": ("in [0, 1)", lambda x: 0 <= x < 1),
    "momentum": ("in [0, 1)", lambda x: 0 <= x < 1),
    "weight_decay": ("at least 0", lambda x: x >= 0),
    "final_lr": ("in [0, 1]", lambda x: 0 <= x <= 1),
    "milestone_factor": ("in (0, 1]", lambda x: 0 < x <= 1),
    "latent_lr": ("greater than 0", lambda x: x > 0),
    "bop_rate": ("in (0, 1]", lambda x: 0 < x <= 1),
    "bop_threshold": ("at least 0", lambda x: x >= 0),
    "sign_keep_prob": ("in (0, 1]", lambda x: 0 < x <= 1),
    "average_decay": ("in [0, 1)", lambda x: 0 <= x < 1),
    "augment_shift": ("at least 0", lambda x: x >= 0),
    "augment_rotation": ("at least 0", lambda x: x >= 0),
    "augment_scale": ("in [0, 1)", lambda x: 0 <= x < 1),
    "augment_shear": ("at least 0", lambda x: x >= 0),
    "augment_elastic": ("at least 0", lambda x: x >= 0),
    "adversarial": ("at least 0", lambda x: x >= 0),
}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; the defaults are those of ``cupybnn train``.

    Attributes
    ----------
    data_dir : str or None
        Folder with MNIST's IDX files.
    dataset : {"auto", "mnist", "digits"}
        See `cupybnn.data.load`.
    log_dir : str or None
        Where run folders are made; None: nothing is written.
    n_hidden : int
        Units in each hidden layer.
    reg : float
        Factor of the penalty.
    lr : float
        Learning rate.
    batch_size : int
    max_steps : int
        The step at which training ends, counted from the very first, also after a restore.
    eval_every_n : int
        Test, log and save after every so many steps.
    binary : bool
        Binary weights in the second and third layer and binary activations before them.
    xnor : bool
        Do the binary products with `cupybnn.xnor_gemm`; the numbers are the same as with dense
        products. No effect without `binary`.
    batch_norm : bool
        Batch normalization after each hidden product.
    debug : bool
        Stop at the first NaN or infinity; slow.
    keep_prob : float
        Chance of a hidden unit not to be dropped, in (0, 1]; 1 means no dropout.
    first, last : bool
        Binary weights in the first layer; binary weights and inputs in the last. No effect
        without `binary`.
    restore : str or None
        A run folder or checkpoint to go on from.
    device : str
        "auto", "cpu", "cuda" or "cuda:N".
    seed : int
        Decides initial weights, order of the images and dropout.
    ste : str
        Pseudo-gradient of sign: a name of `cupybnn.ops.quantizer_names`, such as "hard_tanh" (the
        gradient where ``|x| <= 1``) or "clipped_grad" (the original program's).
    dtype : {"float32", "float64", "tf32", "bfloat16"}
        Of weights and arithmetic. "tf32" and "bfloat16" keep weights and all else in float32, but
        let the tensor cores of a GPU round the factors of dense products, and "bfloat16" also the
        results of those that are not of signs alone; they need the fused step.
    validation : int
        Hold out the last so many training images and evaluate on them instead of on the test
        set, to choose settings by; 0: evaluate on the test set.
    hidden_layers : int
        Number of hidden layers.
    input_keep_prob : float
        Chance of a pixel not to be dropped, in (0, 1].
    loss : {"cross_entropy", "squared_hinge"}
        See `cupybnn.ops.softmax_cross_entropy` and `cupybnn.ops.squared_hinge`.
    label_smoothing : float
        Share of each label that is spread over all classes, in [0, 1); for the cross-entropy.
    penalty : {"l1", "bipolar"}
        What `reg` is the factor of: the sum of the magnitudes of all weights, or Tang et al.'s
        ``sum(1 - w**2)`` over the latent weights of binary layers.
    optimizer : {"adam", "adamw", "sgd", "bop"}
        "bop": binary weights are flipped by `cupybnn.optim.Bop`, all others learn by Adam; no
        penalty is taken of binary weights, which have no magnitudes then.
    momentum : float
        Of "sgd", in [0, 1).
    weight_decay : float
        Of "adamw".
    lr_scale : {"none", "binarynet"}
        "binarynet": learning rates of latent weights times `cupybnn.optim.binarynet_scale`.
    latent_lr : float
        Further factor of the learning rates of latent weights.
    bop_rate, bop_threshold : float
        Of "bop": the part of the newest gradient in the running mean, which follows the schedule,
        and how large the mean must be for a flip.
    schedule : {"constant", "cosine", "exponential", "step"}
        How the learning rate goes from `lr` to ``lr * final_lr`` at `max_steps`; "step": it is
        multiplied by `milestone_factor` at each of `milestones`.
    final_lr : float
        Last factor of the learning rate, in [0, 1]; for "exponential" greater than 0.
    milestones : tuple of int
        Rising numbers of steps, for the schedule "step".
    milestone_factor : float
        In (0, 1].
    warm_up : int
        Steps over which the learning rate first rises.
    sign_keep_prob : float
        Chance of a binary activation not to be replaced by a coin toss
        (`cupybnn.nn.SignDropout`), in (0, 1]. No effect without `binary`.
    average : {"none", "ema", "swa"}
        Evaluate with averages of the weights over the steps, exponential or of equal weights, and
        with batch norm's statistics taken for them anew.
    average_decay : float
        Of "ema", in [0, 1).
    average_from : int
        Number of the step after which the average begins.
    augment_shift, augment_elastic : float
        Random deformations of training images, in pixels; see `cupybnn.data.Augmentation`. 0: off.
    augment_rotation : float
        In degrees.
    augment_scale, augment_shear : float
        As shares.
    adversarial : float
        Learn from images whose pixels, from 0 to 1, were each moved by so much in the direction in
        which the loss rises: Goodfellow, Shlens, Szegedy: Explaining and harnessing adversarial
        examples, ICLR 2015. Costs a second forward and backward pass. 0: off.
    fused : bool
        On a GPU, make steps by the fused kernels where these can (`cupybnn.training.fast`);
        otherwise operation by operation.
    graph : bool
        Capture the fused step as a CUDA graph.
    """

    data_dir: str | None = None
    dataset: str = "auto"
    log_dir: str | None = None
    n_hidden: int = 512
    reg: float = 1e-4
    lr: float = 1e-3
    batch_size: int = 128
    max_steps: int = 1000
    eval_every_n: int = 100
    binary: bool = False
    xnor: bool = False
    batch_norm: bool = False
    debug: bool = False
    keep_prob: float = 1.0
    first: bool = False
    last: bool = False
    restore: str | None = None
    device: str = "auto"
    seed: int = 0
    ste: str = "hard_tanh"
    dtype: str = "float32"
    validation: int = 0
    hidden_layers: int = 3
    input_keep_prob: float = 1.0
    loss: str = "cross_entropy"
    label_smoothing: float = 0.0
    penalty: str = "l1"
    optimizer: str = "adam"
    momentum: float = 0.9
    weight_decay: float = 0.0
    lr_scale: str = "none"
    schedule: str = "constant"
    final_lr: float = 0.0
    warm_up: int = 0
    fused: bool = True
    graph: bool = True
    latent_lr: float = 1.0
    bop_rate: float = 1e-4
    bop_threshold: float = 1e-8
    milestones: tuple[int, ...] = ()
    milestone_factor: float = 0.1
    sign_keep_prob: float = 1.0
    average: str = "none"
    average_decay: float = 0.999
    average_from: int = 0
    augment_shift: float = 0.0
    augment_rotation: float = 0.0
    augment_scale: float = 0.0
    augment_shear: float = 0.0
    augment_elastic: float = 0.0
    adversarial: float = 0.0

    @property
    def hidden_sizes(self) -> tuple[int, ...]:
        """Units of each hidden layer."""
        return (self.n_hidden,) * self.hidden_layers

    @property
    def storage_dtype(self) -> str:
        """The dtype of weights: float32 or float64."""
        return "float64" if self.dtype == "float64" else "float32"

    def __post_init__(self) -> None:
        for name in ("data_dir", "log_dir", "restore"):
            value = getattr(self, name)
            if value is not None:
                self._set(name, checks.path(name, value))
        for name, least in (
            ("n_hidden", 1),
            ("batch_size", 1),
            ("max_steps", 0),
            ("eval_every_n", 1),
            ("seed", 0),
            ("validation", 0),
            ("hidden_layers", 1),
            ("warm_up", 0),
            ("average_from", 0),
        ):
            self._set(name, checks.integer(name, getattr(self, name), least))
        self._set("milestones", checks.integers("milestones", self.milestones, 1))
        for name, (rule, holds) in _NUMBERS.items():
            self._set(name, checks.number(name, getattr(self, name), rule, holds))
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"The {name!r} must be True or False; got {getattr(self, name)!r}."
                )
        for name, choices in _CHOICES.items():
            checks.choice(name, getattr(self, name), choices)
        checks.choice("ste", self.ste, _ste_names())
        if not isinstance(self.device, str):
            self._set("device", str(self.device))
        if self.dataset == "digits" and self.data_dir is not None:
            raise ValueError(
                f"The dataset 'digits' reads no data directory; got the data directory "
                f"{self.data_dir!r}. Leave out one of the two."
            )
        if self.schedule == "exponential" and self.final_lr == 0:
            raise ValueError(
                "The 'final_lr' must be greater than 0 for the schedule 'exponential'; got 0.0."
            )
        if self.schedule == "step" and not self.milestones:
            raise ValueError(
                "The 'milestones' must be given for the schedule 'step': the steps at which the "
                "learning rate falls; got none."
            )
        layers = self.first + self.last + self.hidden_layers - 1 if self.binary else 0
        if self.optimizer == "bop" and layers == 0:
            raise ValueError(
                f"The 'optimizer' 'bop' must have binary weights to flip; got a network without "
                f"any (binary={self.binary}, hidden_layers={self.hidden_layers})."
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen; only __post_init__ calls

    def to_json(self) -> str:
        """Return the settings as a JSON object, one setting a line."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any], *, source: str = "settings") -> TrainConfig:
        """Build a configuration from a mapping of names to values.

        Raises
        ------
        ValueError
            If a name is unknown (`source` and the name are in the message) or a value is bad.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ValueError(
                f"The {source} must name settings of TrainConfig; got {', '.join(unknown)}. "
                f"Known: {', '.join(sorted(known))}."
            )
        return cls(**settings)

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """Read what `to_json` wrote.

        Raises
        ------
        ValueError
            If `text` is not a JSON object of known settings with good values.
        """
        try:
            settings = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"The configuration is not JSON: {error}.") from error
        if not isinstance(settings, dict):
            raise ValueError(
                f"The configuration must be a JSON object; got {type(settings).__name__}."
            )
        return cls.from_mapping(settings, source="configuration")


def _ste_names() -> tuple[str, ...]:
    from cupybnn import ops

    return tuple(ops.quantizer_names())

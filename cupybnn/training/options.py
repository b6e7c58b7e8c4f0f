"""Every setting of a training run, declared once. `TrainConfig` adds checks across settings."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from cupybnn.data import DATASETS
from cupybnn.training.checks import (
    Choice,
    Device,
    Number,
    OneOf,
    PathName,
    PathNames,
    Switch,
    Whole,
    Wholes,
    Widths,
)
from cupybnn.training.declaration import setting

__all__ = ["DTYPES", "Options"]

DTYPES = ("float32", "float64", "tf32", "bfloat16")

_positive = partial(Number, "greater than 0", lambda x: x > 0)
_from_0 = partial(Number, "at least 0", lambda x: x >= 0)
_up_to_1 = partial(Number, "in [0, 1]", lambda x: 0 <= x <= 1)
_share = partial(Number, "in [0, 1)", lambda x: 0 <= x < 1)
_part = partial(Number, "in (0, 1]", lambda x: 0 < x <= 1)

# The headings under which settings are listed.
_data = partial(setting, "data")
_network = partial(setting, "network")
_images = partial(setting, "augmentation")
_learning = partial(setting, "learning")
_run = partial(setting, "run")


def _ste_names() -> tuple[str, ...]:
    from cupybnn import ops

    return tuple(ops.quantizer_names())


def _max_steps_restored(config: Any) -> str:
    """Some schedules, and one pseudo-gradient, depend on the number of steps."""
    depends = config.schedule in ("cosine", "exponential") or config.ste == "ede_sign"
    return "reported" if depends else "free"


@dataclass(frozen=True, kw_only=True)
class Options:
    """The fields of `TrainConfig`.

    Each declares its default, rule, help text and more: see
    `cupybnn.training.declaration.Setting`.
    """

    data_dir: str | None = _data(
        None,
        PathName(),
        "folder with MNIST's four IDX files, plain or .gz",
        restore="free",
        synonyms=("data", "path", "data_folder"),
    )
    dataset: str = _data(
        "auto",
        Choice.of(*DATASETS),
        "data set: mnist, fashion (Fashion-MNIST), digits, or auto (MNIST if available, otherwise "
        "the digits)",
        restore="free",  # the images themselves are compared
        synonyms=("data",),
    )
    validation: int = _data(
        0,
        Whole(0),
        "hold out the last N training images and evaluate on them instead of the test images",
        synonyms=("val", "valid", "validation_split", "holdout"),
    )
    batch_size: int = _data(
        128, Whole(1, "B"), "images per step", synonyms=("batch", "bs", "minibatch")
    )
    seed: int = _data(
        0,
        Whole(0, "S"),
        "seed for initial weights, image order and dropout",
        synonyms=("random_state", "rng"),
    )
    shuffle: bool = _data(
        True,
        Switch(),
        "permute the training images in each epoch",
        synonyms=("permute", "random_order"),
    )

    n_hidden: int | tuple[int, ...] = _network(
        512,
        Widths(),
        "units in each hidden layer; 1024,512,256 makes three layers of different width",
        synonyms=("hidden", "units", "width", "hidden_size", "hidden_units"),
    )
    hidden_layers: int = _network(
        3,
        Whole(1),
        "number of hidden layers, where n_hidden is one number",
        synonyms=("layers", "n_layers", "depth", "hidden"),
    )
    binary: bool = _network(
        False,
        Switch(),
        "binary weights and activations in the hidden layers; the first layer's weights and the "
        "last layer stay real",
        synonyms=("bnn", "binarize", "binarized", "one_bit"),
    )
    first: bool = _network(
        False,
        Switch(),
        "binary weights in the first layer too",
        needs=("binary",),
        synonyms=("first_layer", "binary_first"),
    )
    last: bool = _network(
        False,
        Switch(),
        "binary weights and inputs in the last layer too",
        needs=("binary",),
        synonyms=("last_layer", "binary_last"),
    )
    xnor: bool = _network(
        False,
        Switch(),
        "compute binary products with xnor_gemm; the results equal those of dense products",
        needs=("binary",),
        restore="free",
    )
    ste: str = _network(
        "hard_tanh",
        Choice(_ste_names, listed=False),
        "pseudo-gradient of sign: hard_tanh or ste_sign (passes where |x| <= 1), clipped_grad "
        "(clipped to [-1, 1], as in the original program), identity, approx_sign, swish_sign, "
        "magnitude_aware_sign, stochastic_sign, or ede_sign (sharpens over training)",
        needs=("binary",),
        synonyms=("quantizer", "estimator"),
    )
    grad_bits: int = _network(
        0,
        OneOf((0, 1, 2, 4, 8), "BITS"),
        "round the gradients of hidden binary products at random to levels of BITS bits, 1, 2, 4 "
        "or 8, and compute the products of the backward pass from their bit planes (after Zhou et "
        "al.: DoReFa-Net, arXiv 1606.06160); 0: no rounding",
        needs=("binary",),
        synonyms=("gradient_bits", "quantize_gradients", "grad_quant", "dorefa"),
    )
    batch_norm: bool = _network(
        None,
        Switch(),
        "batch normalization after each hidden product",
        by_binary=(False, True),
        synonyms=("batchnorm", "bn", "norm"),
    )
    sync_batch_norm: bool = _network(
        False,
        Switch(),
        "where a run has several ranks, normalize with the statistics of the whole batch, as one "
        "rank would, not with those of each rank's part",
        needs=("batch_norm",),
        synonyms=("syncbn", "sync_bn", "synchronized"),
    )
    keep_prob: float = _network(
        1.0,
        _part("P"),
        "probability that dropout keeps a hidden unit",
        synonyms=("dropout", "drop"),
    )
    input_keep_prob: float = _network(
        1.0, _part("P"), "probability that dropout keeps a pixel", synonyms=("input_dropout",)
    )
    sign_keep_prob: float = _network(
        1.0,
        _part("P"),
        "probability that a binary activation is kept, not replaced by a random sign",
        needs=("binary",),
        synonyms=("sign_dropout",),
    )

    augment_shift: float = _images(
        0.0,
        _from_0("PIXELS"),
        "maximum shift in each direction, in pixels",
        synonyms=("augment", "shift"),
    )
    augment_rotation: float = _images(
        0.0, _from_0("DEGREES"), "maximum rotation, in degrees", synonyms=("augment", "rotate")
    )
    augment_scale: float = _images(
        0.0,
        _share("FRACTION"),
        "maximum change of height and of width, as a fraction",
        synonyms=("augment", "zoom"),
    )
    augment_shear: float = _images(
        0.0, _from_0("FRACTION"), "maximum shear, as a fraction", synonyms=("augment", "shear")
    )
    augment_elastic: float = _images(
        0.0,
        _from_0("PIXELS"),
        "typical size of elastic displacements, in pixels",
        synonyms=("augment", "elastic"),
    )
    augment_flip: bool = _images(
        False,
        Switch(),
        "mirror half of the images, left to right",
        synonyms=("augment", "flip", "mirror", "horizontal_flip", "hflip"),
    )
    neighbor_noise: float = _images(
        0.0,
        _from_0("S"),
        "move each image by random multiples, of standard deviation S, of its differences to its "
        "nearest neighbors (after Vincent and Bengio: Manifold Parzen windows, NIPS 2002)",
        synonyms=("neighbour_noise", "manifold", "tangent"),
    )
    neighbors: int = _images(
        8,
        Whole(1, "K"),
        "how many nearest neighbors an image has",
        needs=("neighbor_noise",),
        synonyms=("neighbours", "n_neighbors"),
    )
    adversarial: float = _images(
        0.0,
        _from_0("E"),
        "move each pixel, which is in [0, 1], by E in the direction that increases the loss "
        "(Goodfellow, Shlens, Szegedy: Explaining and harnessing adversarial examples, ICLR 2015); "
        "costs a second forward and backward pass",
        synonyms=("fgsm", "epsilon", "attack"),
    )
    mix: str = _images(
        "none",
        Choice.of("none", "some", "uniform"),
        "mix images in pairs, their labels by the same shares (Zhang et al.: mixup, ICLR 2018): "
        "uniform, by random shares; some, only a random half of them; none",
        synonyms=("mixup", "blend"),
    )

    max_steps: int = _learning(
        1000,
        Whole(0),
        "total number of training steps, including those before a restore",
        restore=_max_steps_restored,
        synonyms=("epochs", "steps", "iterations", "num_steps", "n_epochs", "max_iter"),
    )
    loss: str = _learning(
        "cross_entropy",
        Choice.of("cross_entropy", "squared_hinge"),
        "loss function: cross_entropy or squared_hinge",
        synonyms=("criterion", "objective"),
    )
    label_smoothing: float = _learning(
        0.0, _share("S"), "label smoothing factor", needs=("loss", "cross_entropy")
    )
    vat: float = _learning(
        0.0,
        _from_0("DISTANCE"),
        "virtual adversarial training: also minimize how far predictions change when each image "
        "moves by DISTANCE (L2) where they change most (Miyato et al.: Virtual adversarial "
        "training, arXiv 1704.03976); costs two more forward and backward passes",
        synonyms=("virtual_adversarial", "vat_distance", "vat_eps"),
    )
    vat_xi: float = _learning(
        1.0,
        _positive("XI"),
        "distance of the step that finds this direction",
        needs=("vat",),
        synonyms=("xi",),
    )
    teacher: tuple[str, ...] = _learning(
        (),
        PathNames(),
        "learn the class probabilities that trained networks predict, their mean, instead of the "
        "labels (Hinton et al.: Distilling the knowledge in a neural network, 2015): run folders "
        "or packed networks",
        restore="reported",
        synonyms=("teachers", "distill", "distillation"),
    )
    teacher_temperature: float = _learning(
        1.0,
        _positive("T"),
        "divisor of the teachers' logits",
        needs=("teacher",),
        synonyms=("temperature",),
    )
    penalty: str = _learning(
        "l1",
        Choice.of("l1", "l2", "bipolar"),
        "penalty on weights: l1, the sum of their magnitudes; l2, half the sum of the squares of "
        "real weights, latent ones excluded; or bipolar, sum(1 - w**2) of the latent weights of "
        "binary layers",
        needs=("binary",),
        synonyms=("regularizer", "regularization"),
    )
    reg: float = _learning(
        None,
        _from_0("R"),
        "penalty factor",
        by_binary=(1e-4, 0.0),
        restore="reported",
        synonyms=("regularization", "l1", "l2", "penalty_factor", "lambda"),
    )
    optimizer: str = _learning(
        "adam",
        Choice.of("adam", "adamw", "sgd", "bop"),
        "optimizer: adam, adamw, sgd, or bop (Bop for binary weights, Adam for the others)",
        synonyms=("optim", "solver", "optimiser"),
    )
    momentum: float = _learning(0.9, _share("M"), "momentum", needs=("optimizer", "sgd"))
    weight_decay: float = _learning(
        0.0,
        _from_0("D"),
        "decoupled weight decay",
        needs=("optimizer", "adamw"),
        synonyms=("wd", "decay", "l2"),
    )
    bop_rate: float = _learning(
        1e-4, _part("R"), "weight of the newest gradient in the mean", needs=("optimizer", "bop")
    )
    bop_threshold: float = _learning(
        1e-8, _from_0("T"), "minimum running mean for a flip", needs=("optimizer", "bop")
    )
    lr: float = _learning(
        1e-3,
        _positive("LR"),
        "learning rate",
        restore="reported",
        synonyms=("learning_rate", "rate", "step_size", "eta"),
    )
    latent_lr: float = _learning(
        1.0, _positive("F"), "additional learning rate factor for latent weights", needs=("binary",)
    )
    lr_scale: str = _learning(
        "none",
        Choice.of("none", "binarynet"),
        "learning rate scale per layer: none, or binarynet (larger for binary weights)",
        needs=("binary",),
    )
    schedule: str = _learning(
        "constant",
        Choice.of("constant", "cosine", "exponential", "step"),
        "learning rate schedule: constant, cosine, exponential or step",
        synonyms=("scheduler", "lr_schedule", "lr_scheduler"),
    )
    final_lr: float = _learning(
        0.0,
        _up_to_1("F"),
        "final learning rate, as a fraction of --lr",
        needs=("schedule", "cosine", "exponential"),
        synonyms=("min_lr",),
    )
    milestones: tuple[int, ...] = _learning(
        (), Wholes(1), "steps at which the learning rate drops", needs=("schedule", "step")
    )
    milestone_factor: float = _learning(
        0.1,
        _part("F"),
        "learning rate factor at each milestone",
        needs=("schedule", "step"),
        synonyms=("gamma",),
    )
    warm_up: int = _learning(
        0,
        Whole(0),
        "steps of learning rate warm-up, which is linear",
        synonyms=("warmup", "warmup_steps"),
    )
    average: str = _learning(
        "none",
        Choice.of("none", "ema", "swa"),
        "evaluate with averaged weights: none, ema (exponential moving average) or swa (equal "
        "weighting); batch norm's statistics are recomputed for them, on images as training makes "
        "them",
        synonyms=("averaging", "ema", "swa"),
    )
    average_decay: float = _learning(
        0.999, _share("D"), "EMA decay", needs=("average", "ema"), synonyms=("ema_decay",)
    )
    average_from: int = _learning(
        0, Whole(0), "step at which averaging begins", needs=("average", "ema", "swa")
    )

    log_dir: str | None = _run(
        None,
        PathName(),
        "make a numbered run folder in DIR for configuration, checkpoints and TensorBoard events",
        restore="free",
        synonyms=("logdir", "output", "out", "save_dir", "save", "log", "tensorboard"),
    )
    restore: str | None = _run(
        None,
        PathName(),
        "continue from a run folder's newest checkpoint, or from a checkpoint file",
        restore="free",
        synonyms=("resume", "load", "checkpoint", "continue"),
    )
    eval_every_n: int = _run(
        100,
        Whole(0),
        "evaluate, log and save a checkpoint every N steps; 0: only after the last step",
        restore="free",
        synonyms=("eval", "eval_every", "log_every", "eval_interval"),
    )
    device: str = _run(
        "auto",
        Device(),
        "device: auto, cpu, cuda or cuda:N",
        restore="free",
        synonyms=("cuda", "cpu"),
    )
    dtype: str = _run(
        "float32",
        Choice.of(*DTYPES),
        "dtype of weights and arithmetic: float32 or float64; on a GPU also tf32 or bfloat16, to "
        "which the fused step rounds the operands of dense products",
        synonyms=("precision", "fp16", "bf16", "amp"),
    )
    fused: bool = _run(
        True, Switch(), "on a GPU, train with fused kernels where possible", restore="reported"
    )
    graph: bool = _run(
        True, Switch(), "replay fused steps as a CUDA graph", needs=("fused",), restore="free"
    )
    rank_timeout: float = _run(
        30.0,
        _positive("SECONDS"),
        "with several ranks, how long one may hang before the others end",
        restore="free",
        synonyms=("timeout", "nccl_timeout"),
    )
    debug: bool = _run(
        False,
        Switch(),
        "stop at the first NaN or infinity, on a terminal in the debugger; with several ranks, "
        "also compare their weights after each step; slow",
        restore="free",
    )

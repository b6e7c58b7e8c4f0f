"""Preparing a run: its data, its model, and the kind of step that trains it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from cupybnn import nn, optim
from cupybnn.data import DATASETS, BatchOrder, Dataset, DeviceData, load
from cupybnn.errors import CheckpointError, SettingError
from cupybnn.parallel import Ranks
from cupybnn.training.agreement import first_reason
from cupybnn.training.checkpoint import Checkpoint
from cupybnn.training.config import TrainConfig
from cupybnn.training.images import augmentation
from cupybnn.training.network import NETWORK_SETTINGS
from cupybnn.training.step import Objective, PlainStep, Step
from cupybnn.training.teachers import Teachers
from cupybnn.training.team import Team

__all__ = [
    "check_data",
    "check_images",
    "check_model",
    "check_ranks",
    "choose_step",
    "find_dataset",
    "find_neighbors",
    "in_turn",
    "refusal",
]

T = TypeVar("T")

#: Multiplications that a CPU computes within some seconds.
_SECONDS = 3 * 10**11


def refusal(ranks: Ranks, sentence: str) -> SettingError:
    """Return an error that every rank raises and rank 0 alone reports."""
    error = SettingError(sentence)
    error.report = ranks.rank == 0
    return error


def check_ranks(config: TrainConfig, ranks: Ranks) -> None:
    """Raise SettingError unless the ranks can share the work, with an image at least for each."""
    if config.batch_size < ranks.size:
        raise refusal(
            ranks,
            f"The 'batch_size', which the ranks share, must be at least their number, so that each "
            f"has an image; got {config.batch_size} images for {ranks.size} ranks.",
        )


def in_turn(ranks: Ranks, load: Callable[[], T]) -> T:
    """Return what `load` returns, called on rank 0 before the others, which find its downloads."""
    if ranks.size == 1:
        return load()
    found = None
    if ranks.rank == 0:
        with ranks.busy():
            found = load()
    ranks.barrier()
    return load() if found is None else found


def find_dataset(
    config: TrainConfig,
    given: Dataset | None,
    stored: Checkpoint | None,
    notify: Callable[[str], None],
) -> Dataset:
    """Return the data of a run, with the validation images that `config` asks for held out.

    Parameters
    ----------
    config : TrainConfig
    given : Dataset or None
        Used instead of the data set that `config` names.
    stored : Checkpoint or None
        The run to continue: if it fell back to the digits, this one does too.
    notify : callable
        Called with a sentence before a long operation.
    """
    dataset = given
    if dataset is None:
        name, reason = config.dataset, None
        if stored is not None and name == "auto" and config.data_dir is None:
            name = stored.info["dataset"]  # what "auto" chose when the run began
            if name not in DATASETS:
                raise CheckpointError(
                    f"The run in {config.restore} was trained on a data set of your own, {name!r}, "
                    f"which only you can load. Continue it from Python: pass that data to a "
                    f"Trainer, cupybnn.Trainer(config, data=data).run(), with the config of "
                    f"cupybnn.training.restored_config({config.restore!r}, max_steps=N)."
                )
            if name == "digits":
                reason = f"The run in {config.restore} fell back to them."
        elif stored is not None and config.data_dir is None:
            check_data(name, stored)  # before it is fetched
        dataset = load(name, config.data_dir, notify=notify)
        if reason is not None:
            dataset = replace(dataset, fallback_reason=reason)
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"The 'data' must be a Dataset; got {type(dataset).__name__}. Convert arrays with "
            f"Dataset.from_arrays."
        )
    if config.validation:
        dataset = dataset.with_validation(config.validation)
    unseen = config.eval_every_n == 0 and config.log_dir is None
    if len(dataset.test_labels) == 0 and not unseen:
        raise ValueError(
            f"The dataset {dataset.name!r} must have a test part to evaluate on; got none. "
            f"Pass test_x and test_y to it, or hold out training examples with validation=N. To "
            f"train without any evaluation, set eval_every_n=0 and no log_dir."
        )
    return dataset


def check_data(name: str, stored: Checkpoint) -> None:
    """Raise CheckpointError unless a run was trained on the data set of that name."""
    if stored.info["dataset"] != name:
        raise CheckpointError(
            f"The data set must be the checkpoint's, {stored.info['dataset']}; got {name}."
        )


def check_images(config: TrainConfig, dataset: Dataset) -> None:
    """Raise unless the training images can be deformed and moved as `config` asks."""
    augmentation(config).check(dataset.image_shape)
    weights = dataset.train_weights
    examples = len(dataset.train_labels) if weights is None else int((weights > 0).sum())
    if config.neighbor_noise and config.neighbors >= examples:
        of_weight = "" if weights is None else " of positive weight"
        raise SettingError(
            f"The 'neighbors' must be less than the number of training images{of_weight}, "
            f"{examples:,}; got {config.neighbors}. Choose fewer, or leave out 'neighbor_noise'."
        )


def find_neighbors(config: TrainConfig, data: DeviceData, mention: Callable[[str], None]) -> None:
    """Find the nearest neighbors of training images, if training moves images among them.

    `mention` is called with a sentence if this takes long.
    """
    if not config.neighbor_noise:
        return
    examples = len(data.train_labels)
    # A neighbor of all images takes a pass over the distances, as long as some 100 features.
    work = examples**2 * (data.features + 100 * config.neighbors)
    if data.device.kind == "cpu" and work > _SECONDS:
        mention(
            f"Finding the {config.neighbors} nearest neighbors of {examples:,} images, which may "
            f"take a minute or more on a CPU."
        )
    data.nearest_neighbors(config.neighbors)


def check_model(model: Any, config: TrainConfig) -> None:
    """Raise unless `model` can be trained in place of the network of `config`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"The 'model' must be an nn.Module; got {type(model).__name__}.")
    if next(model.parameters(), None) is None:
        raise ValueError(f"The 'model' must have trainable parameters; got {model!r}.")
    default = TrainConfig()
    idle = [n for n in NETWORK_SETTINGS if getattr(config, n) != getattr(default, n)]
    if idle:
        raise ValueError(
            f"The 'config' of a Trainer with a 'model' must leave the network settings at their "
            f"defaults; got {', '.join(idle)}. They have no effect on a given model."
        )


def choose_step(
    model: nn.Module,
    objective: Objective,
    optimizer: optim.Optimizer,
    data: DeviceData,
    order: BatchOrder,
    config: TrainConfig,
    notify: Callable[[str], None],
    teachers: Teachers | None = None,
    team: Team | None = None,
) -> Step:
    """Return the fused step if the kernels support it, on all ranks, else the plain one.

    `notify` is called with the reason if there is a GPU whose kernels are not used.
    """
    asked = config
    if team is not None:
        # Several ranks compare what a step has computed, rather than check its operations.
        asked = replace(config, debug=False)
    reason = _unfused_reason(model, optimizer, data, asked, teachers)
    if team is not None:
        reason = first_reason(team.ranks, reason)
    if reason is None:
        from cupybnn.training.fast import FusedStep

        assert isinstance(optimizer, optim.Adam)
        return FusedStep(model, objective, optimizer, data, order, config, notify, teachers, team)
    if config.dtype in ("tf32", "bfloat16"):
        notify(f"Dense products are in float32, not {config.dtype}: {reason}.")
    elif data.device.kind == "cuda" and config.fused and not asked.debug:
        notify(f"Training runs operation by operation, without the fused kernels: {reason}.")
    return PlainStep(model, objective, optimizer, data, order, config, teachers, team)


def _unfused_reason(
    model: nn.Module,
    optimizer: optim.Optimizer,
    data: DeviceData,
    config: TrainConfig,
    teachers: Teachers | None,
) -> str | None:
    """Return why the fused step cannot be used, to end a sentence; None if it can."""
    if data.device.kind == "cpu":
        return "there is no GPU"
    if not config.fused:
        return "fused is False"
    if data.pixel_scale is None:
        return f"the features are {data.dtype}, not 8-bit pixels"
    from cupybnn.backends.cuda.compiler import architecture, shared_memory_limit
    from cupybnn.backends.cuda.fused_neighbors import shared_bytes
    from cupybnn.training.fast import unsupported_reason
    from cupybnn.training.fast.images import deformation

    index = data.device.index
    reason = unsupported_reason(config, model, optimizer, architecture(index), teachers)
    amounts, shape = augmentation(config), data.image_shape
    most = shared_memory_limit(index) - 1024
    if reason is None and amounts and shape and deformation(amounts, shape, 0).shared > most:
        reason = "the images are too large to be deformed in shared memory"
    if reason is None and config.neighbor_noise and shared_bytes(config.neighbors) > most:
        reason = "shared memory does not hold that many neighbors"
    return reason

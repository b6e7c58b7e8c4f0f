"""Refusing runs that cannot fit into memory, before anything is allocated."""

from __future__ import annotations

from cupybnn import machine
from cupybnn.backends.devices import Device
from cupybnn.errors import SettingError
from cupybnn.training.config import TrainConfig

__all__ = ["check_memory", "needed_bytes"]

# Minimum host memory of a layer's objects, however few units it has.
_LAYER_BYTES = 4096
_MILLION_GIB = 10**6 << 30


def needed_bytes(
    config: TrainConfig, features: int, classes: int, device: Device
) -> tuple[int, int]:
    """Return a lower bound on the memory that a run needs.

    It counts what certainly exists at the same time: the weights and their optimizer state, and a
    batch's input, logits and activations of one hidden layer. A run that is certain not to use the
    fused step also keeps all gradients and, if activations are not binary, those of all layers.

    Parameters
    ----------
    config : TrainConfig
    features, classes : int
        Of the data.
    device : Device

    Returns
    -------
    weights, batch : int
        Bytes.
    """
    # Each width and how many layers have it: `hidden_sizes` may itself be more than fits.
    widths = config.n_hidden
    runs = (
        [(n, 1) for n in widths] if isinstance(widths, tuple) else [(widths, config.hidden_layers)]
    )
    plain = device.kind == "cpu" or not config.fused
    item = 8 if config.dtype == "float64" else 4
    copies = (3 if config.optimizer in ("adam", "adamw") else 1) + plain
    count, inputs = 0, features
    for units, layers in runs:
        count += inputs * units + (layers - 1) * units * units
        inputs = units
    count += inputs * classes
    if plain and not config.binary:
        kept = sum(units * layers for units, layers in runs)
    else:
        kept = max(units for units, _ in runs)
    rounded = 2 if config.dtype == "bfloat16" else item
    batch = config.batch_size * (features + kept + classes) * rounded
    return count * item * copies + config.hidden_layers * _LAYER_BYTES, batch


def check_memory(config: TrainConfig, features: int, classes: int, device: Device) -> None:
    """Refuse a run that cannot fit into the memory of `device`.

    Without this check, a size that is far too large would not fail immediately: the system
    overcommits memory until it has to kill the process.

    Raises
    ------
    SettingError
        If `needed_bytes` exceeds the memory; the message gives the sizes.
    """
    there = machine.memory_bytes(device)
    weights, batch = needed_bytes(config, features, classes, device)
    if weights + batch <= there:
        return
    sizes = config.n_hidden if isinstance(config.n_hidden, tuple) else (config.n_hidden,)
    widths = ",".join(map(_number, sizes))
    smaller = "'n_hidden' or 'hidden_layers'" if weights > batch else "'batch_size' or 'n_hidden'"
    raise SettingError(
        f"A run must fit into the memory of its device: {device} has {_size(there)}, the weights "
        f"(n_hidden = {widths}, hidden_layers = {_number(config.hidden_layers)}) "
        f"need {_size(weights)} or more and a batch (batch_size = {_number(config.batch_size)}) "
        f"{_size(batch)}. Choose a smaller {smaller}."
    )


def _size(count: int) -> str:
    if count >= _MILLION_GIB:  # may exceed the range of a float
        return "more than a million GiB"
    return f"{count / 2**30:,.1f} GiB" if count >= 1 << 30 else f"{count / 2**20:,.1f} MiB"


def _number(number: int) -> str:
    return str(number) if number < 10**30 else "more than 10**30"

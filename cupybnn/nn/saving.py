"""Saving a model's state to a file and loading it again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cupybnn.errors import CheckpointError
from cupybnn.files import atomic_write
from cupybnn.nn.module import Module
from cupybnn.npz import NpzFile, open_npz
from cupybnn.paths import user_path

__all__ = ["load", "read_state", "save"]

_FORMAT = "cupybnn-model"
_VERSION = 1
_HEADER = "header"  # member with the JSON text; arrays are in members named "array/<name>"
_PREFIX = "array/"
_LONGEST_HEADER = 1 << 24  # bytes

_M = TypeVar("_M", bound=Module)


def save(model: Module, path: str | os.PathLike[str]) -> None:
    """Write a model's parameters, buffers and random states to a file.

    Parameters
    ----------
    model : Module
        On any device.
    path : path-like
        The .npz file to write, under exactly this name; a leading ``~`` is the home folder. A
        reader finds the old file or the new one.

    Raises
    ------
    TypeError
        If `model` is not a `Module`, or a buffer has a dtype that .npz files do not support.
    CheckpointError
        If the file cannot be written; an existing file is left untouched.

    Notes
    -----
    The file holds arrays and names, no code and no pickle: build the same model to load it into.

    Examples
    --------
    >>> import tempfile
    >>> from cupybnn import nn
    >>> model = nn.Linear(3, 2, rng=0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     nn.save(model, f"{folder}/model.npz")
    ...     again = nn.load(nn.Linear(3, 2), f"{folder}/model.npz")
    >>> bool((again.weight.data == model.weight.data).all())
    True
    """
    _check_model("save", model)
    path = user_path(path)
    state = model.state_dict()
    for name, array in state.items():
        if array.dtype.kind not in "biuf":
            raise TypeError(
                f"The arrays of a model file must be numbers of NumPy's own dtypes; {name!r} is "
                f"{array.dtype}. Keep it in float32."
            )
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "arrays": {name: [array.dtype.name, list(array.shape)] for name, array in state.items()},
    }
    members: dict[str, Any] = {_PREFIX + name: array for name, array in state.items()}
    members[_HEADER] = np.array(json.dumps(header))
    try:
        with atomic_write(path) as file:
            np.savez(file, **members)
    except OSError as error:
        raise CheckpointError(
            f"The model file {path} cannot be written: {error.strerror or error}."
        ) from error


def load(model: _M, path: str | os.PathLike[str], strict: bool = True) -> _M:
    """Set a model's parameters, buffers and random states from a file that `save` wrote.

    Parameters
    ----------
    model : Module
        Built like the saved one; it stays on its device.
    path : path-like
    strict : bool
        As in `Module.load_state_dict`.

    Returns
    -------
    Module
        The model itself.

    Raises
    ------
    TypeError
        If `model` is not a `Module`.
    CheckpointError
        If the file cannot be read, is damaged or not a model file, or does not match the model;
        all mismatches are listed by name, and the model is left unchanged.

    Examples
    --------
    >>> from cupybnn import nn
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm(3), nn.Sign(), nn.Linear(3, 2))
    >>> nn.save(model, "model.npz")
    >>> other = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm(3), nn.Sign(), nn.Linear(3, 2))
    >>> bool((nn.load(other, "model.npz")[0].weight.numpy() == model[0].weight.numpy()).all())
    True
    """
    _check_model("load", model)
    own = model._state()
    state = _read(path, lambda name, shape: name in own and own[name].shape == shape)
    try:
        model.load_state_dict(state, strict)
    except ValueError as error:
        raise CheckpointError(f"The model file {path} cannot be loaded. {error}") from error
    return model


def read_state(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return the state in a file that `save` wrote, as `Module.state_dict` returned it.

    Raises
    ------
    CheckpointError
        If the file cannot be read, is damaged or not a model file.

    Examples
    --------
    >>> from cupybnn import nn
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm(3), nn.Sign(), nn.Linear(3, 2))
    >>> nn.save(model, "model.npz")
    >>> nn.read_state("model.npz")["0.weight"].shape
    (4, 3)
    """
    return _read(path, lambda name, shape: True)


def _read(
    path: str | os.PathLike[str], wanted: Callable[[str, tuple[int, ...]], bool]
) -> dict[str, np.ndarray]:
    """Read arrays by name; unwanted ones become zeros that take no memory."""
    path = user_path(path)
    try:
        with open_npz(path) as file:
            state = {}
            for name, (dtype, shape) in _declared_arrays(path, file).items():
                member = _PREFIX + name
                is_shape, is_dtype = file.header(member)
                if is_dtype.name != dtype or list(is_shape) != shape:
                    raise ValueError(
                        f"the array {name!r} must be {tuple(shape)} {dtype} according to the "
                        f"header, is {is_shape} {is_dtype}"
                    )
                if wanted(name, is_shape):
                    state[name] = file.read(member)
                else:
                    state[name] = np.broadcast_to(np.zeros((), is_dtype), is_shape)
            return state
    except OSError as error:
        raise CheckpointError(
            f"The model file {path} cannot be read: {error.strerror or error}."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"The model file {path} is damaged: {error}.") from error


def _check_model(function: str, model: Any) -> None:
    if not isinstance(model, Module):
        raise TypeError(
            f"The 'model' of nn.{function} must be a Module; got {type(model).__name__}. Call "
            f"nn.{function}(model, path)"
            + (", or nn.read_state(path) for the arrays alone." if function == "load" else ".")
        )


def _declared_arrays(path: Path, file: NpzFile) -> dict[str, Any]:
    """Return the dtype and shape of each array, from the validated header."""
    if _HEADER in file.names:
        text = str(file.read(_HEADER, _LONGEST_HEADER))
    else:
        text = ""
    try:
        header = json.loads(text)
        ours = header["format"] == _FORMAT
    except (KeyError, TypeError, ValueError, RecursionError):
        ours = False
    if not ours:
        raise CheckpointError(
            f"{path} is not a cupybnn model file. nn.save(model, path) writes one."
        )
    version, arrays = header.get("version"), header.get("arrays")
    if type(version) is not int or version < 1:
        raise ValueError(f"its version must be an integer of at least 1, is {version!r}")
    if version > _VERSION:
        raise CheckpointError(
            f"{path} is a model file of version {version}; this cupybnn reads versions up to "
            f"{_VERSION}. Update cupybnn."
        )
    if not isinstance(arrays, dict) or not all(map(_is_declaration, arrays.values())):
        raise ValueError("its header does not list the arrays with dtypes and shapes")
    return arrays


def _is_declaration(entry: Any) -> bool:
    if not isinstance(entry, list) or len(entry) != 2:
        return False
    dtype, shape = entry
    if not isinstance(dtype, str) or not isinstance(shape, list):
        return False
    return all(type(n) is int and n >= 0 for n in shape)

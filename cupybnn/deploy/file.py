"""The file of a packed network: an .npz of bits, thresholds and a small JSON header."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cupybnn.deploy.inputs import InputSpec
from cupybnn.deploy.layers import PRODUCTS, STEPS, PackedLayer, Step
from cupybnn.files import atomic_write
from cupybnn.npz import NpzFile, open_npz
from cupybnn.packed import pack
from cupybnn.schema import (
    SchemaError,
    boolean,
    integer,
    list_of,
    nullable,
    number,
    one_of,
    parse,
    record,
    text,
)

__all__ = ["from_arrays", "read", "to_arrays", "write"]

FORMAT = "cupybnn.PackedNetwork"
VERSION = 1


def write(
    path: str | os.PathLike[str], layers: Sequence[PackedLayer], inputs: InputSpec, classes: Any
) -> None:
    """Write a network whose arrays are on the CPU; `path` then holds all of it or what it held."""
    with atomic_write(path) as out:
        np.savez(out, **to_arrays(layers, inputs, classes))  # type: ignore[arg-type]


def to_arrays(
    layers: Sequence[PackedLayer], inputs: InputSpec, classes: Any
) -> dict[str, np.ndarray]:
    """Return the entries of the file of a network whose arrays are on the CPU.

    The signs of a binary layer are the entry "<number>.bits": one bit each, row by row, 1 for +1,
    the first in the highest bit of a byte, as `numpy.packbits` has it.
    """
    header = {
        "format": FORMAT,
        "version": VERSION,
        "features": inputs.features,
        "image_shape": None if inputs.image_shape is None else list(inputs.image_shape),
        "pixel_max": inputs.pixel_max,
        "classes": classes.tolist(),
        "layers": [
            {
                "name": layer.name,
                "product": layer.product,
                "inputs": layer.inputs,
                "units": layer.units,
                "steps": [step.kind for step in layer.steps],
                "threshold": layer.threshold is not None,
            }
            for layer in layers
        ],
    }
    encoded = json.dumps(header, ensure_ascii=False).encode()
    arrays: dict[str, np.ndarray] = {"header": np.frombuffer(encoded, np.uint8)}
    for i, layer in enumerate(layers):
        if layer.binary:
            arrays[f"{i}.bits"] = np.packbits(layer.weight.unpack(np.int8) > 0)
        for name, array in layer.arrays():
            arrays[f"{i}.{name}"] = np.packbits(array) if name == "flip" else array
    return arrays


_MOST = 1 << 24  # of units and inputs: a float32 counts no further
_NAME = text(most=200)
_LAYER = record(
    {
        "name": _NAME,
        "product": one_of(*PRODUCTS),
        "inputs": integer(1, _MOST),
        "units": integer(1, _MOST),
        "steps": list_of(one_of(*STEPS), most=100),
        "threshold": boolean,
    }
)


def _class(value: Any, place: str) -> None:
    (_NAME if isinstance(value, str) else integer(-(2**53)))(value, place)


def _fitting(header: Any, place: str) -> None:
    """Check that each layer takes what the one before it gives."""
    width, signs = header["features"], False
    for i, layer in enumerate(header["layers"]):
        if layer["inputs"] != width:
            raise SchemaError(f"layers[{i}].inputs must be {width}; got {layer['inputs']}")
        if (layer["product"] == "bits") > signs:
            raise SchemaError(f"layers[{i}].product must not be 'bits', because no signs come in")
        if layer["threshold"] and layer["steps"]:
            raise SchemaError(f"layers[{i}] must have steps or a threshold, not both")
        width, signs = layer["units"], layer["threshold"]
    if signs:
        raise SchemaError("the last layer must have no threshold, because it gives logits")
    if len(header["classes"]) != width:
        raise SchemaError(f"classes must name {width} outputs; got {len(header['classes'])}")
    if len({type(name) for name in header["classes"]}) != 1:
        raise SchemaError("classes must be numbers or names, not both")
    shape = header["image_shape"]
    if shape is not None and math.prod(shape) != header["features"]:
        raise SchemaError(f"image_shape must have {header['features']} pixels; got {shape}")


_HEADER = record(
    {
        "format": one_of(FORMAT),
        "version": one_of(VERSION),
        "features": integer(1, _MOST),
        "image_shape": nullable(list_of(integer(1, _MOST), least=1, most=8)),
        "pixel_max": nullable(number(above=0)),
        "classes": list_of(_class, least=1),
        "layers": list_of(_LAYER, least=1, most=1000),
    },
    also=_fitting,
)


def read(path: str | os.PathLike[str]) -> tuple[list[PackedLayer], InputSpec, list[Any]]:
    """Read a file that `write` made, and check that it does not contradict itself.

    Returns
    -------
    layers : list of PackedLayer
        On the CPU.
    inputs : InputSpec
    classes : list of int or str

    Raises
    ------
    ValueError
        If the file is truncated, damaged, of another kind or version, or contradicts itself. No
        more memory is taken than the file itself has bytes, but for what is unpacked of it.
    """
    try:
        with open_npz(path) as archive:
            return _decoded(archive)
    except ValueError as error:
        raise ValueError(
            f"{os.fspath(path)!r} cannot be read as a PackedNetwork: {error}."
        ) from error


def from_arrays(
    arrays: Mapping[str, np.ndarray],
) -> tuple[list[PackedLayer], InputSpec, list[Any]]:
    """Return what `read` returns, from what `to_arrays` returned; ValueError if it is damaged."""
    try:
        return _decoded(_Arrays(arrays))
    except ValueError as error:
        raise ValueError(f"These arrays are not those of a PackedNetwork: {error}.") from error


class _Arrays:
    """Arrays in memory, read as those of an `NpzFile`."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = arrays

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        array = self.read(name)
        return array.shape, array.dtype

    def read(self, name: str, most_bytes: int | None = None) -> np.ndarray:
        if not isinstance(array := self._arrays.get(name), np.ndarray):
            raise ValueError(f"the array {name!r} is missing")
        return array


def _decoded(archive: NpzFile | _Arrays) -> tuple[list[PackedLayer], InputSpec, list[Any]]:
    header = parse(archive.read("header", 1 << 20).tobytes())
    _HEADER(header, "")
    layers = [_layer(archive, i, fields) for i, fields in enumerate(header["layers"])]
    shape = header["image_shape"]
    inputs = InputSpec(
        header["features"], None if shape is None else tuple(shape), header["pixel_max"]
    )
    return layers, inputs, header["classes"]


def _layer(archive: NpzFile | _Arrays, position: int, fields: dict[str, Any]) -> PackedLayer:
    inputs, units, product = fields["inputs"], fields["units"], fields["product"]

    def array(name: str, dtype: Any, *shape: int) -> np.ndarray:
        entry = f"{position}.{name}"
        found = archive.header(entry)
        if found != (shape, np.dtype(dtype)):
            raise SchemaError(
                f"its entry {entry!r} must be {np.dtype(dtype)} of shape {shape}; got {found[1]} "
                f"of shape {found[0]}"
            )
        return archive.read(entry)

    def bits(name: str, *shape: int) -> np.ndarray:
        count = math.prod(shape)
        octets = array(name, np.uint8, -(-count // 8))
        if count % 8 and octets[-1] & (0xFF >> count % 8):
            raise SchemaError(f"its entry '{position}.{name}' must end with zeros")
        return np.unpackbits(octets, count=count).astype(bool).reshape(shape)

    weight: Any = None
    signs = None
    if product == "real":
        weight = array("weight", np.float32, inputs, units)
    else:
        plus = bits("bits", inputs, units)
        weight = pack(plus, axis=-2)
        if product == "signs":
            signs = np.where(plus, np.float32(1), np.float32(-1))
    threshold = flip = None
    if fields["threshold"]:
        kind = np.int32 if product == "bits" else np.float32
        threshold, flip = array("threshold", kind, units), bits("flip", units)
    steps = tuple(
        Step(kind, None if kind == "relu" else array(f"step{i}", np.float32, units))
        for i, kind in enumerate(fields["steps"])
    )
    return PackedLayer(fields["name"], product, weight, steps, threshold, flip, signs)

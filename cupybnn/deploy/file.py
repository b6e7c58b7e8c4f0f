"""The file of a packed network: an .npz of bits, thresholds and a small JSON header."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cupybnn.deploy.inputs import InputSpec
from cupybnn.deploy.layers import PRODUCTS, STEPS, PackedLayer, Step
from cupybnn.files import atomic_write
from cupybnn.npz import NpzFile, open_npz
from cupybnn.packed import pack
from cupybnn.schema import (
    Check,
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
VERSION = 2  # 1, which is still read, had an entry for each array and int32 thresholds


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

    "header" is JSON. "data" has the bytes of all arrays, layer after layer, in the order of
    `_parts`, little-endian. Signs and flips take one bit each, row by row, 1 for +1, the first in
    the highest bit of a byte, as `numpy.packbits` has it.
    """
    described, data = [], []
    for layer in layers:
        arrays = dict(layer.arrays())
        if layer.binary:
            arrays["bits"] = np.packbits(layer.weight.unpack(np.int8) > 0)
        if layer.threshold is not None:
            arrays["threshold"] = _smallest(layer)
            arrays["flip"] = np.packbits(layer.flip)
        fields = {
            "name": layer.name,
            "product": layer.product,
            "inputs": layer.inputs,
            "units": layer.units,
            "steps": [step.kind for step in layer.steps],
            "threshold": None if layer.threshold is None else arrays["threshold"].dtype.name,
        }
        described.append(fields)
        for name, dtype, _ in _parts(fields):
            data.append(np.ascontiguousarray(arrays[name], dtype).reshape(-1).view(np.uint8))
    header = {
        "format": FORMAT,
        "version": VERSION,
        "features": inputs.features,
        "image_shape": None if inputs.image_shape is None else list(inputs.image_shape),
        "pixel_max": inputs.pixel_max,
        "classes": classes.tolist(),
        "layers": described,
    }
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return {"header": np.frombuffer(encoded, np.uint8), "data": np.concatenate(data)}


def _smallest(layer: PackedLayer) -> np.ndarray:
    """Return the thresholds in the smallest type that holds them.

    A product of signs lies between -inputs and inputs: thresholds beyond are moved to its ends.
    """
    if layer.product != "bits":
        return np.asarray(layer.threshold)
    clipped = np.clip(layer.threshold, -layer.inputs, layer.inputs + 1)
    low, high = int(clipped.min()), int(clipped.max())
    fits = (t for t in (np.int8, np.int16) if np.iinfo(t).min <= low and high <= np.iinfo(t).max)
    return clipped.astype(next(fits, np.int32))


def _parts(fields: dict[str, Any]) -> Iterator[tuple[str, np.dtype[Any], tuple[int, ...]]]:
    """Yield name, dtype and shape of each array of a layer in a file, in their order."""
    inputs, units = fields["inputs"], fields["units"]
    if fields["product"] == "real":
        yield "weight", np.dtype("<f4"), (inputs, units)
    else:
        yield "bits", np.dtype("u1"), (-(-inputs * units // 8),)
    if fields["threshold"] is not None:
        yield "threshold", np.dtype(fields["threshold"]).newbyteorder("<"), (units,)
        yield "flip", np.dtype("u1"), (-(-units // 8),)
    for i, kind in enumerate(fields["steps"]):
        if kind != "relu":
            yield f"step{i}", np.dtype("<f4"), (units,)


_MOST = 1 << 24  # of units and inputs: a float32 counts no further
_NAME = text(most=200)
_THRESHOLDS = ("int8", "int16", "int32", "float32")


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
        if isinstance(layer["threshold"], str):
            kind = "int" if layer["product"] == "bits" else "float"
            if not layer["threshold"].startswith(kind):
                raise SchemaError(
                    f"layers[{i}].threshold must be of {kind}, because its product is "
                    f"{layer['product']!r}; got {layer['threshold']!r}"
                )
        width, signs = layer["units"], bool(layer["threshold"])
    if signs:
        raise SchemaError("the last layer must have no threshold, because it gives logits")
    if len(header["classes"]) != width:
        raise SchemaError(f"classes must name {width} outputs; got {len(header['classes'])}")
    if len({type(name) for name in header["classes"]}) != 1:
        raise SchemaError("classes must be numbers or names, not both")
    if len(set(header["classes"])) != width:
        raise SchemaError("classes must be different names")
    shape = header["image_shape"]
    if shape is not None and math.prod(shape) != header["features"]:
        raise SchemaError(f"image_shape must have {header['features']} pixels; got {shape}")


def _header(versions: tuple[int, ...], threshold: Check) -> Check:
    """Return the check of a header; versions differ in what they say of a threshold."""
    layer = record(
        {
            "name": _NAME,
            "product": one_of(*PRODUCTS),
            "inputs": integer(1, _MOST),
            "units": integer(1, _MOST),
            "steps": list_of(one_of(*STEPS), most=100),
            "threshold": threshold,
        }
    )
    return record(
        {
            "format": one_of(FORMAT),
            "version": one_of(*versions),
            "features": integer(1, _MOST),
            "image_shape": nullable(list_of(integer(1, _MOST), least=1, most=8)),
            "pixel_max": nullable(number(above=0)),
            "classes": list_of(_class, least=1),
            "layers": list_of(layer, least=1, most=1000),
        },
        also=_fitting,
    )


_HEADER = _header((1, VERSION), nullable(one_of(*_THRESHOLDS)))
_OLD_HEADER = _header((1,), boolean)


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
    old = isinstance(header, dict) and header.get("version") == 1
    (_OLD_HEADER if old else _HEADER)(header, "")
    described = header["layers"]
    if old:
        for fields in described:
            kind = "int32" if fields["product"] == "bits" else "float32"
            fields["threshold"] = kind if fields["threshold"] else None
    parts = (_by_name if old else _in_order)(archive, described)
    layers = [_layer(f"{i}.", described[i], each) for i, each in enumerate(parts)]
    shape = header["image_shape"]
    inputs = InputSpec(
        header["features"], None if shape is None else tuple(shape), header["pixel_max"]
    )
    return layers, inputs, header["classes"]


_Layer = dict[str, np.ndarray]  # arrays of a layer by name


def _in_order(archive: NpzFile | _Arrays, layers: list[dict[str, Any]]) -> Iterator[_Layer]:
    """Yield the arrays of each layer, which the entry "data" has one after the other."""
    parts = [list(_parts(fields)) for fields in layers]
    total = sum(math.prod(shape) * dtype.itemsize for each in parts for _, dtype, shape in each)
    data, at = _entry(archive, "data", np.dtype("u1"), (total,)), 0
    for each in parts:
        arrays = {}
        for name, dtype, shape in each:
            end = at + math.prod(shape) * dtype.itemsize
            arrays[name] = data[at:end].view(dtype).reshape(shape)
            at = end
        yield arrays


def _by_name(archive: NpzFile | _Arrays, layers: list[dict[str, Any]]) -> Iterator[_Layer]:
    """Yield the arrays of each layer, which have an entry each, as in version 1."""
    for i, fields in enumerate(layers):
        parts = _parts(fields)
        yield {name: _entry(archive, f"{i}.{name}", dtype, shape) for name, dtype, shape in parts}


def _entry(
    archive: NpzFile | _Arrays, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> np.ndarray:
    found = archive.header(name)
    if found != (shape, dtype):
        raise SchemaError(
            f"its entry {name!r} must be {dtype} of shape {shape}; got {found[1]} of shape "
            f"{found[0]}"
        )
    return archive.read(name)


def _layer(place: str, fields: dict[str, Any], arrays: _Layer) -> PackedLayer:
    inputs, units, product = fields["inputs"], fields["units"], fields["product"]

    def bits(name: str, *shape: int) -> np.ndarray:
        count = math.prod(shape)
        octets = arrays[name]
        if count % 8 and octets[-1] & (0xFF >> count % 8):
            raise SchemaError(f"its {place}{name} must end with zeros")
        return np.unpackbits(octets, count=count).astype(bool).reshape(shape)

    def numbers(name: str, dtype: Any) -> np.ndarray:
        return arrays[name].astype(dtype)  # a copy: aligned, and without the rest of the file

    weight: Any = None
    signs = None
    if product == "real":
        weight = numbers("weight", np.float32)
    else:
        plus = bits("bits", inputs, units)
        weight = pack(plus, axis=-2)
        if product == "signs":
            signs = np.where(plus, np.float32(1), np.float32(-1))
    threshold = flip = None
    if fields["threshold"] is not None:
        threshold = numbers("threshold", np.int32 if product == "bits" else np.float32)
        flip = bits("flip", units)
    steps = tuple(
        Step(kind, None if kind == "relu" else numbers(f"step{i}", np.float32))
        for i, kind in enumerate(fields["steps"])
    )
    return PackedLayer(fields["name"], product, weight, steps, threshold, flip, signs)

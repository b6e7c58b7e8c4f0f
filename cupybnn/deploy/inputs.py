"""What goes into a packed network, and what comes out: pixels or numbers, of any array library."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupybnn.backends.devices import Device, array_module, device_of, to_device
from cupybnn.backends.interop import as_native, type_name

__all__ = ["InputSpec", "like"]


@dataclass(frozen=True)
class InputSpec:
    """The inputs of a network.

    Attributes
    ----------
    features : int
    image_shape : tuple of int or None
        (height, width), where inputs are images.
    pixel_max : float or None
        Greatest pixel of whole numbers, which are divided by it as in training; None: the network
        takes numbers as they are.
    """

    features: int
    image_shape: tuple[int, ...] | None = None
    pixel_max: float | None = None

    def read(self, x: Any, device: Device) -> tuple[Any, bool]:
        """Return inputs as the first layer takes them, and whether there was only one.

        See `rows` for the parameters and what is raised.

        Returns
        -------
        inputs : array of float32, shape (batch, features)
        single : bool
        """
        rows, single = self.rows(x, device)
        return self.numbers(rows), single

    def rows(self, x: Any, device: Device) -> tuple[Any, bool]:
        """Return inputs as a matrix of pixels or numbers, and whether there was only one.

        Parameters
        ----------
        x : array_like, shape (batch, features) or (features,); or with `image_shape` at the end
        device : Device
            Of the network. An array must be there already; lists are taken to it.

        Returns
        -------
        rows : array, shape (batch, features)
        single : bool

        Raises
        ------
        TypeError
            If `x` is on another device or holds what is no number.
        ValueError
            If the shape does not fit or an input is not finite. On a GPU that is not looked for,
            since the host would have to wait.
        """
        array = as_native(x, "'x' of a PackedNetwork")
        if isinstance(x, (list, tuple)):
            array = to_device(array, device)
        where = device_of(array)
        if where != device:
            raise TypeError(
                f"The 'x' of a PackedNetwork must be where the network is, on {device}; got a "
                f"{type_name(x)} on {where}. Move the network with net.to('{where}'), or the array."
            )
        pixels = array.dtype.kind in "iu"
        if not pixels and array.dtype.kind != "f" and array.dtype.name != "bfloat16":
            raise TypeError(
                f"The 'x' of a PackedNetwork must hold pixels (whole numbers) or numbers as the "
                f"network was trained on them (floating); got dtype {array.dtype}."
            )
        rows, single = self._rows(array)
        if pixels and self.pixel_max is None:
            raise TypeError(
                f"The 'x' of this PackedNetwork must be of floating dtype, because it was "
                f"trained on numbers, not on pixels; got {rows.dtype}."
            )
        if device.kind == "cpu" and not pixels and not _all_finite(rows):
            first = np.argwhere(~np.isfinite(rows.astype(np.float32)))[0]
            raise ValueError(
                f"The 'x' of a PackedNetwork must be finite; got {rows[tuple(first)]} in row "
                f"{first[0]}, feature {first[1]}."
            )
        return rows, single

    def numbers(self, rows: Any) -> Any:
        """Return rows as contiguous float32: pixels scaled, numbers as they are."""
        xp = array_module(rows)
        if rows.dtype.kind in "iu":
            # As `cupybnn.data.DeviceData` scales them.
            assert self.pixel_max is not None
            return xp.multiply(rows, np.float32(1.0 / self.pixel_max), dtype=np.float32)
        return xp.ascontiguousarray(rows, dtype=np.float32)

    def _rows(self, array: Any) -> tuple[Any, bool]:
        """Return the inputs as a matrix, and whether there was only one."""
        shapes: list[tuple[int, ...]] = [(self.features,)]
        if self.image_shape is not None:
            shapes.append(self.image_shape)
        for shape in shapes:
            if array.shape == shape:
                return array.reshape(1, self.features), True
            if array.ndim == len(shape) + 1 and array.shape[1:] == shape:
                return array.reshape(len(array), self.features), False
        wanted = " or ".join(f"(batch, {', '.join(map(str, shape))})" for shape in shapes)
        raise ValueError(
            f"The 'x' of this PackedNetwork must have shape {wanted}, or one input without the "
            f"batch; got {array.shape}."
        )


def _all_finite(rows: np.ndarray) -> bool:
    """Whether all numbers are finite as float32, too."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(rows.astype(np.float32, copy=False)).all())


def like(result: Any, x: Any) -> Any:
    """Return `result`, a NumPy or CuPy array, as an array of the library that `x` is of."""
    if type(result) is type(x):
        return result
    library = sys.modules.get(type(x).__module__.partition(".")[0])
    if array_module(result) is library or not hasattr(type(x), "__dlpack__"):
        return result
    if type(x).__module__.startswith("jax"):
        library = sys.modules["jax.dlpack"]
    convert = getattr(library, "from_dlpack", None)
    return result if convert is None else convert(result)

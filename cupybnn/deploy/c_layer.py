"""A layer of a packed network in C: its tables, and the function that walks over them.

All names begin with ``net_`` or ``NET_``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from cupybnn.deploy.layers import Step
from cupybnn.deploy.plan import Planned

__all__ = ["LayerCode", "described", "function", "literal", "not_ours"]

NOT_OURS = "\0"  # stands in names of users that could be taken for names in C
_C_NAMES = {
    "uint8": "uint8_t",
    "uint32": "uint32_t",
    "int16": "int16_t",
    "int32": "int32_t",
    "float32": "float",
}
_STEPS = {
    "multiply": "value *= {};",
    "add": "value += {};",
    "relu": "value = value < 0 ? 0 : value;",
}


class LayerCode:
    """The code of a layer.

    Parameters
    ----------
    number : int
        Of the layer, from 1: part of all names.
    layer : Planned
    steps : tuple of Step
        Those of the layer's steps that belong into its function.
    scale : float32
        What pixels are multiplied by for a product of numbers.
    whole : bool
        Whether results may be integers; another layer takes them as floating numbers.

    Attributes
    ----------
    result : str
        The type of a result in C; signs are bits of uint32_t.
    result_size : int
        How many of them there are.
    table_bytes : int
    text : str
    """

    def __init__(
        self,
        number: int,
        layer: Planned,
        steps: tuple[Step, ...],
        scale: np.float32,
        whole: bool,
    ) -> None:
        self._number, self._layer, self._steps = number, layer, steps
        self._words = -(-layer.inputs // 32)
        self._tables: list[str] = []
        self.table_bytes = 0
        self.result, self.result_size = "float", layer.units
        if layer.signs:
            self.result, self.result_size = "uint32_t", -(-layer.units // 32)
        elif layer.integer and whole and not steps:
            self.result = "int32_t"
        self._add_tables()
        source = {"pixels": "uint8_t", "signs": "uint32_t", "numbers": "float"}[layer.source]
        head = f"void net_layer{number}(const {source} *x, {self.result} *y)"
        code = function(head, [*self._before(scale), *self._loop()])
        self.text = f"/* {described(layer)} */\n{''.join(self._tables)}\n{code}"

    def _add_tables(self) -> None:
        layer, weights, threshold = self._layer, self._layer.plus, self._layer.threshold
        if layer.integer and threshold is not None:
            assert weights is not None
            assert layer.flip is not None
            # A unit that is +1 below its threshold is one of the opposite weights that is +1 from
            # another threshold on.
            threshold = np.where(layer.flip, 1 - threshold, threshold)
            threshold = threshold.astype(np.int16 if -layer.least < 1 << 15 else np.int32)
            weights = weights != layer.flip
        if weights is not None:
            self._add_table("bits", _words(weights.T))
        else:
            assert layer.weight is not None
            self._add_table("weights", layer.weight.T)
        if threshold is not None:
            self._add_table("threshold", threshold)
        if self._flips:
            assert layer.flip is not None
            self._add_table("flip", _words(layer.flip[None]))
        for i, step in enumerate(self._steps, 1):
            if step.by is not None:
                self._add_table(f"step{i}_", step.by)

    @property
    def _flips(self) -> bool:
        flip = self._layer.flip
        return not self._layer.integer and flip is not None and bool(flip.any())

    def _add_table(self, name: str, array: np.ndarray) -> None:
        self.table_bytes += array.nbytes
        flat = array.reshape(-1)
        if array.dtype == np.uint32:
            numbers, columns = [f"0x{x:08x}" for x in flat.tolist()], 8
        elif array.dtype == np.float32:
            numbers, columns = [literal(x) for x in flat], 6
        else:
            numbers, columns = [str(x) for x in flat.tolist()], 10
        lines = [", ".join(numbers[i : i + columns]) for i in range(0, len(numbers), columns)]
        head = f"static const {_C_NAMES[array.dtype.name]} net_{name}{self._number}[{flat.size}]"
        self._tables.append(f"{head} = {{\n    " + ",\n    ".join(lines) + "};\n")

    def _before(self, scale: np.float32) -> list[str]:
        """Return what comes before the loop over units."""
        layer, lines = self._layer, []
        if layer.source == "pixels" and layer.integer:
            lines += [
                f"uint32_t planes[{8 * self._words}];",
                f"const int32_t sum = net_bit_planes(x, {layer.inputs}, planes);",
            ]
        elif layer.source == "pixels":
            lines += [
                f"float scaled[{layer.inputs}];",
                f"net_scaled(x, {layer.inputs}, {literal(scale)}, scaled);",
            ]
        if layer.signs:
            lines.append(f"net_clear(y, {layer.units});")
        return lines

    def _loop(self) -> list[str]:
        layer, number = self._layer, self._number
        if layer.integer and self.result != "float":
            lines = [f"const int32_t value = {self._product()};"]
        else:
            lines = [f"float value = {'(float)' if layer.integer else ''}{self._product()};"]
        if layer.signs:
            plus = f"value >= net_threshold{number}[u]"
            if self._flips:
                plus = f"({plus}) != net_is_plus(net_flip{number}, u)"
            lines.append(f"net_put(y, u, {plus});")
        else:
            for i, step in enumerate(self._steps, 1):
                lines.append(_STEPS[step.kind].format(f"net_step{i}_{number}[u]"))
            lines.append("y[u] = value;")
        head = f"for (int32_t u = 0; u < {layer.units}; ++u) {{"
        return [head, *(f"    {line}" for line in lines), "}"]

    def _product(self) -> str:
        """Return the product of unit u."""
        layer, number = self._layer, self._number
        bits = f"net_bits{number} + u * {self._words}"
        weights = f"net_weights{number} + u * {layer.inputs}"
        x = "scaled" if layer.source == "pixels" else "x"
        if layer.integer and layer.source == "signs":
            return f"net_signs_product(x, {bits}, {layer.inputs})"
        if layer.integer:
            return f"net_pixels_product(planes, sum, {bits}, {layer.inputs})"
        if layer.plus is not None:
            return f"net_signed_sum({x}, {bits}, {layer.inputs})"
        if layer.source == "signs":
            return f"net_signed_sum({weights}, x, {layer.inputs})"
        return f"net_real_product({x}, {weights}, {layer.inputs})"


def function(head: str, body: Sequence[str]) -> str:
    """Return a function."""
    return "\n".join([f"static inline {head}", "{", *(f"    {line}" for line in body), "}", ""])


def _words(plus: np.ndarray) -> np.ndarray:
    """Return rows of bits as 32-bit words, the first in the lowest bit."""
    padded = np.pad(plus, ((0, 0), (0, -plus.shape[1] % 32)))
    octets = np.ascontiguousarray(np.packbits(padded, axis=1, bitorder="little"))
    return octets.view("<u4").astype(np.uint32, copy=False)


def literal(x: Any) -> str:
    """Return a float32 as C reads it, without the header that names infinity."""
    if np.isnan(x):
        return "0.0f / 0.0f"
    if np.isinf(x):
        return "1.0f / 0.0f" if x > 0 else "-1.0f / 0.0f"
    text = f"{float(x):.9g}"
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"


def described(layer: Planned) -> str:
    """Return a layer in words, safe within a comment."""
    name = not_ours(re.sub(r"[^A-Za-z0-9_.()-]", "_", layer.name))
    what = "real weights" if layer.plus is None else "binary weights"
    result = "signs" if layer.signs else "numbers"
    return f"{name}: {layer.inputs} {layer.source} to {layer.units} {result}, {what}"


def not_ours(text: str) -> str:
    """Return a user's text so that no name in it is taken for one of the header's."""
    return re.sub("(?i)net_", lambda found: found[0][:-1] + NOT_OURS + "_", text)
